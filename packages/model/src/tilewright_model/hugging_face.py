"""Hugging Face's layout of a Llama: names of the tensors on disk and the keys of `config.json`.

Pure data: no file is touched here. In memory q, k, v and gate, up are rows of one matrix each, on
disk they are separate tensors; everything else differs by the prefix `model.` only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tilewright_model.config import ModelConfig

# What a Llama configuration may say besides the fields of ModelConfig, and the one value of each
# that this model computes. All are written; on reading, another value is refused, not ignored.
_FIXED: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "rope_scaling": None,
}

# Facts about training and text that do not change what is computed. Null ids: transformers would
# otherwise take 1 and 2 for the special tokens.
_INFORMATIVE: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)


@dataclass(frozen=True)
class TensorOnDisk:
    """Where one tensor of the file lives in the module: rows of a parameter."""

    parameter: str
    """Name in the module's state_dict."""
    start: int
    """First of its rows there."""
    shape: tuple[int, ...]
    """Its own shape; shape[0] rows."""


def tensors_on_disk(config: ModelConfig) -> dict[str, TensorOnDisk]:
    """Every tensor of a checkpoint by its Hugging Face name, in the order of the model."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_rows = config.num_attention_heads * config.attention_head_dim
    kv_rows = config.num_key_value_heads * config.attention_head_dim
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

    add("embed_tokens", config.vocab_size, hidden)
    for layer in (f"layers.{index}" for index in range(config.num_hidden_layers)):
        add(f"{layer}.input_layernorm", hidden)
        add_rows(
            f"{layer}.self_attn.qkv_proj", hidden, q_proj=q_rows, k_proj=kv_rows, v_proj=kv_rows
        )
        add(f"{layer}.self_attn.o_proj", hidden, q_rows)
        add(f"{layer}.post_attention_layernorm", hidden)
        add_rows(f"{layer}.mlp.gate_up_proj", hidden, gate_proj=intermediate, up_proj=intermediate)
        add(f"{layer}.mlp.down_proj", hidden, intermediate)
    add("norm", hidden)
    if not config.tie_word_embeddings:
        add("lm_head", config.vocab_size, hidden, prefix="")
    return tensors


def to_hugging_face(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The contents of `config.json`, every default written out.

    Both spellings of the rotary base and of the dtype are there: transformers before 5 reads
    `rope_theta` and `torch_dtype`, later ones `rope_parameters` and `dtype`, and a reader that
    finds neither of its own silently takes theta 10000.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        **_INFORMATIVE,
        **_FIXED,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.attention_head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
    }


def from_hugging_face(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a `config.json` describes.

    What it leaves out takes the default of transformers' LlamaConfig, not ours: in particular
    embeddings are then not tied.

    Raises:
        ValueError: a key is missing, or asks for something that this model does not compute.
        TypeError: a value of the wrong type.
    """
    for key in _REQUIRED:
        if key not in values:
            raise ValueError(f"{key} is missing")
    for key, expected in _FIXED.items():
        if values.get(key, expected) != expected:
            raise ValueError(f"{key} is {values[key]!r}: only {expected!r} is computed here")
    if values.get("quantization_config") is not None:
        raise ValueError("quantization_config is set: only unquantized weights are read")
    head_dim, heads = values.get("head_dim"), values["num_attention_heads"]
    if isinstance(head_dim, int) and head_dim * heads == values["hidden_size"]:
        head_dim = None  # follows from the others, and may follow them in dataclasses.replace
    return ModelConfig(
        **{key: values[key] for key in _REQUIRED},
        num_key_value_heads=values.get("num_key_value_heads") or heads,
        max_position_embeddings=values.get("max_position_embeddings", 2048),
        head_dim=head_dim,
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(values),
        tie_word_embeddings=values.get("tie_word_embeddings", False),
    )


def _rope_theta(values: Mapping[str, Any]) -> float:
    parameters = values.get("rope_parameters") or {}
    unknown = set(parameters) - {"rope_type", "rope_theta"}
    if unknown or parameters.get("rope_type", "default") != "default":
        raise ValueError(
            f"rope_parameters is {parameters!r}: only rope_type 'default' is computed here"
        )
    found = [source["rope_theta"] for source in (parameters, values) if "rope_theta" in source]
    if len(set(found)) > 1:
        raise ValueError(f"rope_parameters says rope_theta {found[0]}, config.json {found[1]}")
    return found[0] if found else 10000.0
