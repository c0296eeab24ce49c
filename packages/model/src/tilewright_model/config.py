"""The configuration of a model: its shape and its constants, and nothing about how it is run.

Field names are those of Hugging Face's LlamaConfig, so that a `config.json` maps onto them one to
one. A configuration that can be built can be run: every contradiction is found here.
"""

import math
from dataclasses import dataclass

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and constants of a dense decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    Derive variants with `dataclasses.replace(config, hidden_size=...)`. What was left to be derived
    (`head_dim`) is derived again from the new values.

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
    """Width of the MLP between its two projections."""

    max_position_embeddings: int
    """Longest sequence, in tokens: rows of the rotary tables."""

    head_dim: int | None = None
    """Width of one head, even; None stands for hidden_size / num_attention_heads.
    Read `attention_head_dim` for the number in force."""

    rms_norm_eps: float = 1e-6
    """Added to the mean square before the root in every normalization."""

    rope_theta: float = 10000.0
    """Base of the rotary frequencies theta^(-2i / head_dim)."""

    tie_word_embeddings: bool = True
    """Whether the output projection is the embedding matrix itself."""

    @property
    def attention_head_dim(self) -> int:
        """Width of one head: `head_dim` where given, else hidden_size / num_attention_heads."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def __post_init__(self) -> None:
        for name in _SIZES if self.head_dim is None else (*_SIZES, "head_dim"):
            _check_size(name, getattr(self, name))
        for name in ("rms_norm_eps", "rope_theta"):
            _check_positive(name, getattr(self, name))
        if not isinstance(self.tie_word_embeddings, bool):
            raise TypeError(f"tie_word_embeddings is {self.tie_word_embeddings!r}: give a bool")
        self._check_heads()

    def _check_heads(self) -> None:
        hidden, heads, kv_heads = (
            self.hidden_size,
            self.num_attention_heads,
            self.num_key_value_heads,
        )
        if self.head_dim is None and hidden % heads:
            # Multiples of twice the heads, so that the head_dim of what is proposed is even.
            below = hidden // (2 * heads) * 2 * heads
            choice = f"{below} or {below + 2 * heads}" if below else f"{2 * heads}"
            raise ValueError(
                f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}: "
                f"use hidden_size {choice}, or set head_dim"
            )
        if self.attention_head_dim % 2:
            raise ValueError(
                f"head_dim {self.attention_head_dim} is odd and rotary embedding turns pairs: "
                f"set head_dim {self.attention_head_dim + 1}, or change hidden_size {hidden} or "
                f"num_attention_heads {heads}"
            )
        if heads % kv_heads:
            divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads "
                f"{kv_heads}: use num_key_value_heads {divisors}"
            )


def _check_size(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}: give an int")
    if value < 1:
        raise ValueError(f"{name} is {value}: give 1 or more")


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}: give a float")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}: give a finite number greater than 0")
