"""Which key a query sees: the mask as two numbers, in plain torch and in the kernels.

Causality and a sliding window say the same kind of thing: query i, whose own place among the keys
is i + shift, sees the keys from `left` before that place to `right` after it. A causal mask is
right = 0. So kernels know no causality, only `left` and `right`, each of which may be missing.

    shift = T_k - T_q (bottom-right: the last query stands at the last key) or 0 (top-left)

Dropout is here too, as the other thing that a tile of probabilities is multiplied with and that
forward, backward and the reference must agree on: `keep` is its device function.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tilewright_kernels._triton import tl, triton
from tilewright_kernels.dropout import kept_words, philox, philox_reference

Alignment = Literal["top_left", "bottom_right"]

UNLIMITED = -1

_FAR = 2**29
"""As good as unlimited, and added to a length it stays within int32."""


@dataclass(frozen=True)
class Mask:
    """What a query sees, as the user says it.

    Args:
        causal: no key after the query's own place.
        bottom_right: the last query stands at the last key; else the first at the first.
        left: keys seen before the query's own place, -1 for all.
        right: keys seen after it, -1 for all.
    """

    causal: bool = False
    bottom_right: bool = False
    left: int = UNLIMITED
    right: int = UNLIMITED

    def as_ints(self) -> list[int]:
        """The mask as torch.library can pass it."""
        return [int(self.causal), int(self.bottom_right), self.left, self.right]

    @staticmethod
    def of_ints(ints: Sequence[int]) -> "Mask":
        """The mask that `as_ints` made them of."""
        causal, bottom_right, left, right = ints
        return Mask(bool(causal), bool(bottom_right), left, right)

    def shift(self, len_q: int, len_k: int) -> int:
        """The first query's own place among the keys; negative where there are fewer keys."""
        return len_k - len_q if self.bottom_right else 0

    @property
    def window(self) -> tuple[int, int]:
        """(left, right) with causality in it, -1 where there is no limit: what kernels take."""
        left, right = (UNLIMITED if n < 0 or n > _FAR else n for n in (self.left, self.right))
        return left, 0 if self.causal else right

    @property
    def hides(self) -> bool:
        """Whether there is a mask at all."""
        return self.window != (UNLIMITED, UNLIMITED)

    def sees(self, place: Tensor, key: Tensor) -> Tensor:
        """Whether a query at `place` among the keys sees `key`; indices that broadcast."""
        left, right = self.window
        shape = torch.broadcast_shapes(place.shape, key.shape)
        seen = torch.ones(shape, dtype=torch.bool, device=key.device)
        if left != UNLIMITED:
            seen = seen & (key >= place - left)
        if right != UNLIMITED:
            seen = seen & (key <= place + right)
        return seen

    def visible(self, len_q: int, len_k: int, device: torch.device | None = None) -> Tensor:
        """The mask written out: [len_q, len_k] bool, true where the query sees the key."""
        query, key = torch.arange(len_q, device=device), torch.arange(len_k, device=device)
        return self.sees(query[:, None] + self.shift(len_q, len_k), key[None, :])


def as_mask(
    is_causal: bool, causal_alignment: Alignment, window_size: tuple[int, int] | None
) -> Mask:
    """What the public functions' arguments say.

    Raises:
        ValueError: an unknown alignment, or a window that is no pair of integers from -1 on.
    """
    if causal_alignment not in get_args(Alignment):
        choices = " or ".join(get_args(Alignment))
        raise ValueError(f"causal_alignment is {causal_alignment!r}; give {choices}")
    left, right = (UNLIMITED, UNLIMITED) if window_size is None else _as_window(window_size)
    return Mask(is_causal, causal_alignment == "bottom_right", left, right)


def _as_window(window_size: Any) -> tuple[int, int]:
    try:
        left, right = (index(n) for n in window_size)
    except (TypeError, ValueError):
        left = right = -2
    if left < UNLIMITED or right < UNLIMITED:
        raise ValueError(
            f"window_size is {window_size!r}; give (left, right), the numbers of keys before and "
            f"after the query's own place, -1 for all of them"
        )
    return left, right


@triton.jit
def shift_of(len_q, len_k, BOTTOM_RIGHT: tl.constexpr):
    """The first query's own place among the keys."""
    shift = len_k * 0
    if BOTTOM_RIGHT:
        shift = len_k - len_q
    return shift


@triton.jit
def visible(
    query, key, len_k, shift, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Where a query sees a key that there is.

    query and key are indices whose shapes broadcast: [:, None] and [None, :], or the other way
    round for a tile of keys by queries.
    """
    seen = key < len_k
    if HAS_LEFT:
        seen = seen & (key >= query + (shift - left))
    if HAS_RIGHT:
        seen = seen & (key <= query + (shift + right))
    return seen


@triton.jit
def key_blocks(
    first_query, last_query, len_k, shift, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The keys that matter to the queries first_query … last_query (both included).

    Returns:
        (begin, full_begin, full_end, end), multiples of BLOCK_N, each at least the one before.
        Blocks in [full_begin, full_end) are seen whole by every query and end within len_k. Blocks
        in [begin, full_begin) and [full_end, end) need `visible`. No other block is seen at all.
    """
    return _blocks(
        first_query + shift, last_query + shift, len_k, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )


@triton.jit
def query_blocks(
    first_key, last_key, len_q, shift, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The queries that matter to the keys first_key … last_key (both included); see `key_blocks`.

    `visible` knows nothing of len_q: rows past it are the caller's, by what it loads for them.
    """
    return _blocks(
        first_key - shift, last_key - shift, len_q, right, left, HAS_RIGHT, HAS_LEFT, BLOCK_M
    )


@triton.jit
def _blocks(
    first, last, length, before, after,
    HAS_BEFORE: tl.constexpr, HAS_AFTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Blocks of [0, length) that some, and that all, of the windows around first … last cover."""
    begin, full_begin = length * 0, length * 0
    end, full_end = length, length
    if HAS_BEFORE:
        begin = tl.maximum(first - before, 0)
        full_begin = tl.maximum(last - before, 0)
    if HAS_AFTER:
        end = tl.maximum(tl.minimum(last + after + 1, length), 0)
        full_end = tl.maximum(tl.minimum(first + after + 1, length), 0)
    nothing = begin >= end
    begin = begin // BLOCK * BLOCK
    end = tl.where(nothing, begin, tl.cdiv(end, BLOCK) * BLOCK)
    full_begin = tl.minimum(tl.cdiv(full_begin, BLOCK) * BLOCK, end)
    full_end = tl.maximum(full_end // BLOCK * BLOCK, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def keep(seed, head, query, key, num_queries, num_keys, kept):
    """Where dropout keeps a probability, and lets it through times 2³² / kept.

    Args:
        seed: int64 scalar.
        head: index of the sequence times the number of query heads, plus that of the query head.
        query: indices of queries within the sequence, [:, None].
        key: indices of keys within the sequence, [None, :].
        num_queries: T_q, or max_seqlen_q where sequences are packed.
        num_keys: T_k, or max_seqlen_k.
        kept: of 2³² equally likely words, how many keep: dropout's `kept_words(dropout_p)`.
    """
    row = head.to(tl.int64) * num_queries + query
    word, _, _, _ = philox(seed, (row * num_keys + key).to(tl.uint64))
    return word < kept.to(tl.uint32)


def keep_reference(
    seed: Tensor, head: Tensor, query: Tensor, key: Tensor, num_queries: int, num_keys: int,
    dropout_p: float,
) -> Tensor:  # fmt: skip
    """`keep` in plain torch: indices of any shapes that broadcast together, and the probability."""
    counter = (head * num_queries + query) * num_keys + key
    words = philox_reference(seed, counter.flatten())[:, 0].view(counter.shape)
    return words < kept_words(dropout_p)
