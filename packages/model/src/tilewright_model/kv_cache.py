"""Keys and values of the tokens already seen, in memory that is allocated once.

Shapes: L layers, B batch, S capacity in tokens, T new tokens, K key/value heads, D head dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tilewright_model.config import ModelConfig


class LayerCache(NamedTuple):
    """One layer's part of a `KVCache`: views into it, and how much of it is filled."""

    keys: Tensor
    """[B, S, K, D], rotated."""
    values: Tensor
    """[B, S, K, D]."""
    position: int
    """Tokens already there; the next one goes to this row."""
    lengths: Tensor
    """[B] int32: tokens there once this step's are written, where kernels read it."""

    def append(self, k_BTKD: Tensor, v_BTKD: Tensor) -> tuple[Tensor, Tensor]:
        """Write T new tokens and return all keys and values so far, [B, position + T, K, D] views.

        Raises:
            TypeError: the cache holds another dtype than the model computes in.
        """
        if k_BTKD.dtype != self.keys.dtype:
            raise TypeError(
                f"the cache holds {self.keys.dtype} and the model computes {k_BTKD.dtype}: "
                f"build it with dtype={k_BTKD.dtype}"
            )
        end = self.position + k_BTKD.shape[1]
        self.keys[:, self.position : end] = k_BTKD
        self.values[:, self.position : end] = v_BTKD
        return self.keys[:, :end], self.values[:, :end]


class KVCache:
    """Room for `max_length` tokens of `batch_size` sequences of one length.

    `CausalLM.forward(..., cache=cache)` writes the new tokens' keys and values at `position` and
    moves it on. `reset()` starts over without allocating.

    Args:
        config: of the model that will use it.
        batch_size: B.
        max_length: S, in tokens, prompt and continuation together.
        device: where the model computes.
        dtype: of the model's keys and values: its parameters', or autocast's.

    Raises:
        ValueError: a size below 1, or more tokens than the model has positions.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if batch_size < 1 or max_length < 1:
            raise ValueError(
                f"batch_size {batch_size} and max_length {max_length}: both must be 1 or more"
            )
        if max_length > config.max_position_embeddings:
            raise ValueError(
                f"max_length {max_length} exceeds max_position_embeddings "
                f"{config.max_position_embeddings}: use at most that"
            )
        heads, head_dim = config.num_key_value_heads, config.attention_head_dim
        shape = (config.num_hidden_layers, batch_size, max_length, heads, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        """[L, B, S, K, D]."""
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        """[L, B, S, K, D]."""
        self.position = 0
        """Tokens held so far."""

    @property
    def batch_size(self) -> int:
        """B, sequences."""
        return self.keys.shape[1]

    @property
    def max_length(self) -> int:
        """S, tokens that fit."""
        return self.keys.shape[2]

    def layers(self, length: int) -> list[LayerCache]:
        """Views for a step of `length` new tokens, one a block."""
        lengths = torch.full(
            (self.batch_size,), self.position + length, dtype=torch.int32, device=self.keys.device
        )
        return [
            LayerCache(keys, values, self.position, lengths)
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def check_room(self, batch_size: int, length: int) -> None:
        """Fail before anything is written if [batch_size, length] tokens do not fit.

        Raises:
            ValueError: another batch size, or too few free rows; the message names the lengths.
        """
        if batch_size != self.batch_size:
            raise ValueError(
                f"input of batch size {batch_size} for a cache of batch size {self.batch_size}: "
                f"build the cache with batch_size={batch_size}"
            )
        if self.position + length > self.max_length:
            raise ValueError(
                f"the cache holds {self.position} of {self.max_length} tokens and {length} more "
                f"do not fit: build it with max_length={self.position + length} or reset() it"
            )

    def advance(self, length: int) -> None:
        """Count `length` tokens as held, once every layer has written them."""
        self.position += length

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.position = 0
