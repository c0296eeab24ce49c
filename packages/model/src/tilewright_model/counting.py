"""Parameters and floating-point operations of a model in closed form, from its configuration.

Nothing is built: the numbers of a 2.7 B model cost as little as those of a small one. Tests hold
them against the module itself and against torch's FLOP counter.
"""

from dataclasses import dataclass

from tilewright_model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Numbers of parameters, by part."""

    embedding: int
    """Input embedding, V·C."""

    attention: int
    """q, k, v and output projections of all layers."""

    mlp: int
    """Gate, up and down projections of all layers."""

    norm: int
    """Weights of all normalizations."""

    lm_head: int
    """Output projection, V·C; 0 where it is the embedding."""

    @property
    def total(self) -> int:
        """All parameters, a tied embedding counted once."""
        return self.embedding + self.non_embedding + self.lm_head

    @property
    def non_embedding(self) -> int:
        """Parameters of the blocks and the final norm: without embedding and output projection."""
        return self.attention + self.mlp + self.norm


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of `CausalLM(config)`, by part."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    head_rows = 2 * config.num_attention_heads + 2 * config.num_key_value_heads  # q, o; k, v
    vocab_matrix = config.vocab_size * hidden
    return ParameterCount(
        embedding=vocab_matrix,
        attention=layers * head_rows * config.attention_head_dim * hidden,
        mlp=layers * 3 * config.intermediate_size * hidden,
        norm=(2 * layers + 1) * hidden,
        lm_head=0 if config.tie_word_embeddings else vocab_matrix,
    )


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Floating-point operations of training on one token: forward and backward, 6·N + 6·L·T·d.

    A multiplication and an addition are two. Every weight is used by one product forward and two
    backward: 6 a parameter, where N leaves out an input embedding that is only looked up (a tied
    one counts, as the output projection) and, as is custom, counts the norms' few weights too.
    The products q·kᵀ and p·v of d = H·D columns cost 12·L·T·d over T tokens attended to; a causal
    mask leaves half of them. Recomputation (checkpointing, flash attention) is not counted.

    Args:
        config: of the model.
        seq_len: T, tokens of a training sequence.

    Raises:
        ValueError: seq_len is below 1 or exceeds max_position_embeddings.
    """
    if not 1 <= seq_len <= config.max_position_embeddings:
        raise ValueError(
            f"seq_len {seq_len} is not between 1 and max_position_embeddings "
            f"{config.max_position_embeddings}"
        )
    count = count_parameters(config)
    multiplied = count.total - (0 if config.tie_word_embeddings else count.embedding)
    width = config.num_attention_heads * config.attention_head_dim
    return 6 * multiplied + 6 * config.num_hidden_layers * seq_len * width
