"""Names of a model's tensors on disk, as Hugging Face's families have them.

In memory q, k, v are rows of one matrix, gate and up too, and the experts of a layer are one
tensor; on disk they are separate. Pure data: no file is touched here.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tilewright_model.config import ModelConfig


@dataclass(frozen=True)
class TensorOnDisk:
    """Where one tensor of the file lives in the module: rows of a parameter, or of an expert's."""

    parameter: str
    """Name in the module's state_dict."""
    start: int
    """First of its rows there."""
    shape: tuple[int, ...]
    """Its own shape; shape[0] rows."""
    expert: int | None = None
    """Which matrix of the parameter, where that has one for each expert."""

    def of(self, parameter: Tensor) -> Tensor:
        """The view of `parameter` that this tensor is."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return matrix.narrow(0, self.start, self.shape[0])


class MoENames(NamedTuple):
    """What a family calls the parts of a sparse layer."""

    block: str
    gate: str
    up: str
    down: str


QWEN3_MOE_NAMES = MoENames("mlp", "gate_proj", "up_proj", "down_proj")
MIXTRAL_NAMES = MoENames("block_sparse_moe", "w1", "w3", "w2")


def tensors_on_disk(
    config: ModelConfig, moe_names: MoENames = QWEN3_MOE_NAMES
) -> dict[str, TensorOnDisk]:
    """Every tensor of a checkpoint by its Hugging Face name, in the order of the model."""
    hidden, head_dim = config.hidden_size, config.attention_head_dim
    q_rows = config.num_attention_heads * head_dim
    kv_rows = config.num_key_value_heads * head_dim
    tensors: dict[str, TensorOnDisk] = {}

    def add(parameter: str, *shape: int, prefix: str = "model.") -> None:
        tensors[f"{prefix}{parameter}.weight"] = TensorOnDisk(f"{parameter}.weight", 0, shape)

    def add_rows(fused: str, columns: int, **rows: int) -> None:
        start, parent = 0, fused.rpartition(".")[0]
        for name, count in rows.items():
            tensors[f"model.{parent}.{name}.weight"] = TensorOnDisk(
                f"{fused}.weight", start, (count, columns)
            )
            start += count

    def add_mlp(mlp: str, width: int) -> None:
        add_rows(f"{mlp}.gate_up_proj", hidden, gate_proj=width, up_proj=width)
        add(f"{mlp}.down_proj", hidden, width)

    def add_experts(layer: str) -> None:
        width, mlp = config.expert_size, f"{layer}.mlp"
        block = f"model.{layer}.{moe_names.block}"
        tensors[f"{block}.gate.weight"] = TensorOnDisk(
            f"{mlp}.gate.weight", 0, (config.num_experts, hidden)
        )
        for e in range(config.num_experts):
            for name, fused, start, shape in (
                (moe_names.gate, "gate_up_proj", 0, (width, hidden)),
                (moe_names.up, "gate_up_proj", width, (width, hidden)),
                (moe_names.down, "down_proj", 0, (hidden, width)),
            ):
                tensors[f"{block}.experts.{e}.{name}.weight"] = TensorOnDisk(
                    f"{mlp}.experts.{fused}", start, shape, e
                )
        if config.num_shared_experts:
            add_mlp(f"{mlp}.shared_experts", config.num_shared_experts * width)

    add("embed_tokens", config.vocab_size, hidden)
    if config.position_embedding == "learned":
        add("embed_positions", config.max_position_embeddings, hidden)
    for index in range(config.num_hidden_layers):
        layer = f"layers.{index}"
        attention = f"{layer}.self_attn"
        add(f"{layer}.input_layernorm", hidden)
        add_rows(f"{attention}.qkv_proj", hidden, q_proj=q_rows, k_proj=kv_rows, v_proj=kv_rows)
        add(f"{attention}.o_proj", hidden, q_rows)
        if config.qk_norm:
            add(f"{attention}.q_norm", head_dim)
            add(f"{attention}.k_norm", head_dim)
        add(f"{layer}.post_attention_layernorm", hidden)
        if config.is_sparse(index):
            add_experts(layer)
        else:
            add_mlp(f"{layer}.mlp", config.intermediate_size)
    add("norm", hidden)
    if not config.tie_word_embeddings:
        add("lm_head", config.vocab_size, hidden, prefix="")
    return tensors
