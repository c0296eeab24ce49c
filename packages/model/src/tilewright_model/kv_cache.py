"""Keys and values of the tokens already seen, in memory that is allocated once.

Rows are written where each sequence ends, so sequences of unequal lengths share one allocation, and
what the device has to know of lengths lies on the device: a step can be captured in a CUDA graph.
The alternative, concatenation, copies all earlier rows for every new one.

Shapes: L layers, B batch, S capacity in tokens, T new tokens, K key/value heads, D head dimension.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

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
    """Tokens that the longest sequence has; without `rows` the next one goes to this row."""
    lengths: Tensor
    """[B] int32: tokens there once this step's are written, where kernels read it."""
    rows: Tensor | None = None
    """[B, T] int64, where each new token goes if sequences have unequal lengths."""

    def append(self, k_BTKD: Tensor, v_BTKD: Tensor) -> tuple[Tensor, Tensor]:
        """Write T new tokens.

        Returns:
            All keys and values so far, [B, position + T, K, D] views. Those of unequal lengths are
            the whole cache, of which `lengths` says how much is there.

        Raises:
            TypeError: the cache holds another dtype than the model computes in.
        """
        if k_BTKD.dtype != self.keys.dtype:
            raise TypeError(
                f"the cache holds {self.keys.dtype} and the model computes {k_BTKD.dtype}: "
                f"build it with dtype={k_BTKD.dtype}"
            )
        if self.rows is not None:
            sequence = torch.arange(len(self.rows), device=self.rows.device)[:, None]
            self.keys[sequence, self.rows] = k_BTKD
            self.values[sequence, self.rows] = v_BTKD
            return self.keys, self.values
        end = self.position + k_BTKD.shape[1]
        _copy(self.keys[:, self.position : end], k_BTKD)
        _copy(self.values[:, self.position : end], v_BTKD)
        return self.keys[:, :end], self.values[:, :end]


def computed_dtype(weight: Tensor) -> torch.dtype:
    """What products with a weight come in now: its dtype, or autocast's."""
    kind = weight.device.type
    casts = torch.is_autocast_enabled(kind) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if casts else weight.dtype


def _copy(target: Tensor, source: Tensor) -> None:
    """Copy rows that lie apart, in words of 16 bytes where they can be seen as such.

    torch walks such tensors element by element: 8 × 4096 tokens of 12 heads of 128 in bfloat16 take
    123 µs on an H200, and their bytes at the memory's speed 48.
    """
    size = 16 // source.element_size()
    if all(_holds_words(x, size) for x in (target, source)):
        target, source = target.view(torch.complex128), source.view(torch.complex128)
    target.copy_(source)


def _holds_words(x: Tensor, size: int) -> bool:
    distances = (x.storage_offset(), x.shape[-1], *x.stride()[:-1])
    return x.stride(-1) == 1 and all(n % size == 0 for n in distances)


class KVCache:
    """Room for `max_length` tokens in each of `batch_size` sequences.

    `CausalLM.forward(..., cache=cache)` writes the new tokens' keys and values behind those of each
    sequence and counts them. Prompts of unequal lengths are padded at the end, read together, and
    cut to their lengths:

        model(padded_BT, cache=cache)
        cache.truncate([5, 9, 2])

    `reset()` starts over without allocating.

    Args:
        config: of the model that will use it.
        batch_size: B.
        max_length: S, in tokens, prompt and continuation together.
        device: where the model computes.
        dtype: of the model's keys and values: its parameters', or autocast's.

    Raises:
        ValueError: a size below 1, or more tokens than the model has positions.
        TypeError: dtype is not floating.
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
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype is {dtype}: give the floating dtype that the model computes in")
        heads, head_dim = config.num_key_value_heads, config.attention_head_dim
        shape = (config.num_hidden_layers, batch_size, max_length, heads, head_dim)
        # Zeros, since some of torch's attention multiplies what it hides by zero.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        """[L, B, S, K, D]."""
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        """[L, B, S, K, D]."""
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=self.keys.device)
        """[B] int32: tokens that each sequence has, on the device."""
        self.position = 0
        """Tokens that the longest sequence has."""
        self.ragged = False
        """Whether the sequences may have unequal lengths."""

    @property
    def batch_size(self) -> int:
        """B, sequences."""
        return self.keys.shape[1]

    @property
    def max_length(self) -> int:
        """S, tokens that fit."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def first(self, batch_size: int) -> "KVCache":
        """An empty cache in the memory of the first `batch_size` sequences of this one."""
        if not 1 <= batch_size <= self.batch_size:
            raise ValueError(f"batch_size {batch_size} of a cache of {self.batch_size} sequences")
        part = object.__new__(KVCache)
        part.keys, part.values = self.keys[:, :batch_size], self.values[:, :batch_size]
        part.lengths = torch.zeros_like(self.lengths[:batch_size])
        part.position, part.ragged = 0, False
        return part

    def layers(self, length: int) -> list[LayerCache]:
        """Views for a step of `length` new tokens, one a block."""
        lengths, rows = self.lengths + length, self.position_ids(length)
        return [
            LayerCache(keys, values, self.position, lengths, rows)
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def position_ids(self, length: int) -> Tensor | None:
        """[B, length] int64: where new tokens stand; None if at `position` in every sequence."""
        if not self.ragged:
            return None
        return self.lengths[:, None].long() + torch.arange(length, device=self.lengths.device)

    def check_model(self, config: ModelConfig, dtype: torch.dtype) -> None:
        """Fail before anything is written if this is the cache of another model.

        Raises:
            ValueError: other layers, key/value heads or head dimension.
            TypeError: the cache holds another dtype than the model computes in.
        """
        held = self.keys.shape[0], *self.keys.shape[3:]
        wanted = config.num_hidden_layers, config.num_key_value_heads, config.attention_head_dim
        if held != wanted:
            raise ValueError(
                f"the cache is for {held[0]} layers of {held[1]} key/value heads of {held[2]}, and "
                f"the model has {wanted[0]} of {wanted[1]} of {wanted[2]}: build it with the "
                f"model's config"
            )
        if dtype != self.keys.dtype:
            raise TypeError(
                f"the cache holds {self.keys.dtype} and the model computes {dtype}: build it with "
                f"dtype={dtype}"
            )

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
        self.lengths += length

    def truncate(self, lengths: Sequence[int]) -> Self:
        """Forget what each sequence has beyond its length; the memory stays.

        Args:
            lengths: one a sequence, from 0 to what it has. The host knows the longest's alone:
                that a shorter one has as many is the caller's to know.

        Raises:
            ValueError: another number of lengths, or one out of range.
        """
        if len(lengths) != self.batch_size:
            raise ValueError(
                f"{len(lengths)} lengths for {self.batch_size} sequences: give one each"
            )
        for length in lengths:
            if not 0 <= length <= self.position:
                raise ValueError(
                    f"length {length} of a sequence of {self.position} tokens: give 0 to "
                    f"{self.position}"
                )
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        self.position = max(lengths)
        self.ragged = min(lengths) != self.position
        return self

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.position = 0
        self.ragged = False
        self.lengths.zero_()
