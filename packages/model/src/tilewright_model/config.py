"""The configuration of a model: its shape and its constants, and nothing about how it is run.

Field names are those of Hugging Face's configurations where these have one, so that a `config.json`
maps onto them one to one. A configuration that can be built can be run: every contradiction is
found here (`config_checks.py`).
"""

from dataclasses import dataclass
from typing import Literal

from tilewright_model.config_checks import check
from tilewright_model.rope_scaling import RopeScaling

PositionEmbedding = Literal["rope", "learned", "sinusoidal", "none"]
LayerType = Literal["full_attention", "sliding_attention"]
RouterLossLayers = Literal["together", "sum", "mean"]
RouterScoring = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and constants of a decoder: RMSNorm, grouped-query attention, SwiGLU or experts.

    The defaults are a dense Llama. Derive variants with `dataclasses.replace(config,
    hidden_size=...)`; what was left to be derived (`head_dim`) is derived again.

    Raises:
        TypeError: a size that is not an int, a constant that is not a number.
        ValueError: a value out of range, or two values that contradict each other; the message
            names them and a value that would do.
    """

    vocab_size: int
    """Token ids run from 0 to vocab_size - 1; one row of the embedding and one logit each."""

    hidden_size: int
    """Width of the residual stream."""

    num_hidden_layers: int
    """Decoder blocks, each attention and then an MLP."""

    num_attention_heads: int
    """Query heads in each block."""

    num_key_value_heads: int
    """Key and value heads, a divisor of num_attention_heads: equal to it for multi-head attention,
    fewer for grouped-query attention, 1 for multi-query attention."""

    intermediate_size: int
    """Width of a dense MLP between its two projections."""

    max_position_embeddings: int
    """Longest sequence, in tokens: rows of the position tables."""

    head_dim: int | None = None
    """Width of one head, even; None stands for hidden_size / num_attention_heads.
    Read `attention_head_dim` for the number in force."""

    rms_norm_eps: float = 1e-6
    """Added to the mean square before the root in every normalization."""

    position_embedding: PositionEmbedding = "rope"
    """How attention knows order: rotary; a learned or sinusoidal vector added to the embedding;
    or nothing but the causal mask."""

    rope_theta: float = 10000.0
    """Base of the rotary frequencies theta^(-2i / head_dim)."""

    rope_scaling: RopeScaling | None = None
    """How rotary frequencies are stretched for longer sequences; None leaves them."""

    tie_word_embeddings: bool = True
    """Whether the output projection is the embedding matrix itself."""

    qk_norm: bool = False
    """Whether each head's query and key are normalized before they are rotated (Qwen3)."""

    sliding_window: int | None = None
    """Tokens that a sliding layer attends to, its own included; None for all."""

    layer_types: tuple[LayerType, ...] | None = None
    """Attention of each layer. None: sliding everywhere if sliding_window is set, else full."""

    attn_logit_softcapping: float | None = None
    """c of c · tanh(score / c) in attention."""

    final_logit_softcapping: float | None = None
    """c of c · tanh(logit / c) in the output."""

    logits_scaling: float = 1.0
    """What the output's logits are divided by (Granite)."""

    attention_dropout: float = 0.0
    """Probability that training drops a weight of attention."""

    residual_dropout: float = 0.0
    """Probability that training drops an element of the embedding, or of what attention and MLP
    add to the residual stream."""

    initializer_range: float = 0.02
    """Standard deviation of weights at the start; residual projections have it over √(2 layers)."""

    num_experts: int = 0
    """Experts of a sparse layer; 0 makes every layer dense."""

    num_experts_per_tok: int = 2
    """Experts that each token is routed to."""

    moe_intermediate_size: int | None = None
    """Width of one expert; None stands for intermediate_size."""

    num_shared_experts: int = 0
    """Experts that every token takes besides, as one MLP of so many times moe_intermediate_size."""

    router_scoring: RouterScoring = "softmax"
    """How router logits become weights: softmax over all experts, or each one's sigmoid."""

    norm_topk_prob: bool = True
    """Whether the weights of the chosen experts are divided by their sum."""

    routed_scaling_factor: float = 1.0
    """What the weights of the chosen experts are multiplied by."""

    router_aux_loss_coef: float = 0.001
    """Weight of the load-balancing loss in training."""

    router_aux_loss_layers: RouterLossLayers = "together"
    """Over what that loss is: the tokens of all layers together, as Hugging Face has it, or the
    sum or mean of each layer's own, which no layer can even out for another."""

    router_z_loss_coef: float = 0.0
    """Weight of the mean squared log-sum-exp of router logits in training (ST-MoE)."""

    first_k_dense_replace: int = 0
    """Layers at the start that are dense whatever follows."""

    decoder_sparse_step: int = 1
    """Every so many layers one is sparse: those where layer + 1 is a multiple."""

    mlp_only_layers: tuple[int, ...] = ()
    """Further layers that are dense."""

    @property
    def attention_head_dim(self) -> int:
        """Width of one head: `head_dim` where given, else hidden_size / num_attention_heads."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def expert_size(self) -> int:
        """Width of one expert: `moe_intermediate_size` where given, else intermediate_size."""
        return self.moe_intermediate_size or self.intermediate_size

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return (
            self.num_experts > 0
            and layer >= self.first_k_dense_replace
            and (layer + 1) % self.decoder_sparse_step == 0
            and layer not in self.mlp_only_layers
        )

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Layers with experts, ascending."""
        return tuple(i for i in range(self.num_hidden_layers) if self.is_sparse(i))

    def window(self, layer: int) -> int | None:
        """Tokens that a layer attends to, or None for all before."""
        if self.layer_types is not None and self.layer_types[layer] == "full_attention":
            return None
        return self.sliding_window

    def __post_init__(self) -> None:
        check(self)
