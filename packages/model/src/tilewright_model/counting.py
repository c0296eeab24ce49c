"""Parameters and floating-point operations of a model in closed form, from its configuration.

Nothing is built: the numbers of a 2.7 B model cost as little as those of a small one. Tests hold
them against the module itself and against torch's FLOP counter.
"""

from dataclasses import dataclass

from tilewright_model.config import ModelConfig

H200_BF16_FLOPS = 989e12
"""Dense bfloat16 operations a second that NVIDIA gives for an H100 or H200 (SXM)."""


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Numbers of parameters, by part."""

    embedding: int
    """Input embedding, V·C."""

    position: int = 0
    """Learned position embedding, P·C."""

    attention: int
    """q, k, v and output projections of all layers."""

    mlp: int
    """Gate, up and down projections of all dense layers and of shared experts."""

    experts: int = 0
    """Gate, up and down projections of all routed experts of all layers."""

    router: int = 0
    """Router projections, E·C a sparse layer."""

    norm: int
    """Weights of all normalizations."""

    lm_head: int
    """Output projection, V·C; 0 where it is the embedding."""

    idle: int = 0
    """Of `experts`, those that a token is not routed to."""

    @property
    def total(self) -> int:
        """All parameters, a tied embedding counted once."""
        return self.embedding + self.position + self.non_embedding + self.lm_head

    @property
    def active(self) -> int:
        """Parameters that a token meets: all but those of experts it is not routed to."""
        return self.total - self.idle

    @property
    def non_embedding(self) -> int:
        """Parameters of the blocks and the final norm: without embeddings and output projection."""
        return self.attention + self.mlp + self.experts + self.router + self.norm


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of `CausalLM(config)`, by part."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    sparse = len(config.sparse_layers)
    head_rows = 2 * config.num_attention_heads + 2 * config.num_key_value_heads  # q, o; k, v
    vocab_matrix = config.vocab_size * hidden
    expert = 3 * config.expert_size * hidden
    idle_experts = config.num_experts - config.num_experts_per_tok if sparse else 0
    learned = config.position_embedding == "learned"
    return ParameterCount(
        embedding=vocab_matrix,
        position=config.max_position_embeddings * hidden if learned else 0,
        attention=layers * head_rows * config.attention_head_dim * hidden,
        mlp=(layers - sparse) * 3 * config.intermediate_size * hidden
        + sparse * config.num_shared_experts * expert,
        experts=sparse * config.num_experts * expert,
        router=sparse * config.num_experts * hidden,
        norm=(2 * layers + 1) * hidden
        + (2 * layers * config.attention_head_dim if config.qk_norm else 0),
        lm_head=0 if config.tie_word_embeddings else vocab_matrix,
        idle=sparse * idle_experts * expert,
    )


def flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool = True) -> int:
    """Floating-point operations of training on one token: forward and backward, 6·N + 6·L·T·d.

    A multiplication and an addition are two. Every weight is used by one product forward and two
    backward: 6 a parameter, where N leaves out experts that a token is not routed to and embeddings
    that are only looked up (a tied one counts, as the output projection) and, as is custom, counts
    the norms' few weights too. The products q·kᵀ and p·v of d = H·D columns cost 12·L·T·d over T
    tokens attended to; a causal mask leaves half of them, a window of W tokens W·(1 - W/2T).
    Recomputation (checkpointing, flash attention) is not counted.

    Args:
        config: of the model.
        seq_len: T, tokens of a training sequence.
        causal: without it, what is counted where masked products are computed and thrown away (a
            FLOP counter on plain attention; the 12·L·T·d of PaLM).

    Raises:
        ValueError: seq_len is below 1 or exceeds max_position_embeddings.
    """
    _check_length(config, seq_len)
    multiplied = multiplied_parameters(config)
    width = config.num_attention_heads * config.attention_head_dim
    if not causal:
        return 6 * multiplied + 12 * config.num_hidden_layers * seq_len * width
    seen = 0.0
    for layer in range(config.num_hidden_layers):
        window = min(config.window(layer) or seq_len, seq_len)
        seen += window * (1 - window / (2 * seq_len))
    return 6 * multiplied + round(12 * width * seen)


def multiplied_parameters(config: ModelConfig) -> int:
    """N: active parameters without those that are only looked up."""
    count = count_parameters(config)
    looked_up = 0 if config.tie_word_embeddings else count.embedding
    return count.active - count.position - looked_up


def model_flops_utilization(
    config: ModelConfig,
    seq_len: int,
    tokens_per_second: float,
    peak_flops: float = H200_BF16_FLOPS,
) -> float:
    """MFU: the share of a device's peak that goes into `flops_per_token`, causal-true.

    Args:
        config: of the model.
        seq_len: tokens of a training sequence.
        tokens_per_second: of one device.
        peak_flops: of that device.

    Raises:
        ValueError: a rate or peak that is not positive; seq_len as in `flops_per_token`.
    """
    if tokens_per_second <= 0 or peak_flops <= 0:
        raise ValueError(
            f"tokens_per_second {tokens_per_second} and peak_flops {peak_flops}: both must be "
            f"positive"
        )
    return flops_per_token(config, seq_len) * tokens_per_second / peak_flops


def _check_length(config: ModelConfig, seq_len: int) -> None:
    if not 1 <= seq_len <= config.max_position_embeddings:
        raise ValueError(
            f"seq_len {seq_len} is not between 1 and max_position_embeddings "
            f"{config.max_position_embeddings}"
        )
