"""Which blocks the kernels visit, and which of them they mask: the least, by brute force."""

import itertools

import pytest
import torch

from tilewright_kernels._operator import Operator
from tilewright_kernels._triton import tl, triton
from tilewright_kernels.flash_attention.masks import Mask, key_blocks, query_blocks, shift_of

OPERATOR = Operator("attention_blocks_alone")
MASKS = {
    "full": Mask(),
    "causal": Mask(causal=True),
    "bottom right": Mask(causal=True, bottom_right=True),
    "window": Mask(left=20, right=7),
    "narrow": Mask(causal=True, left=3),
    "causal window": Mask(causal=True, bottom_right=True, left=33),
}


@triton.jit
def blocks_kernel(
    to_ptr, first, last, len_q, len_k, left, right,
    OF_KEYS: tl.constexpr, BLOCK: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """The four bounds of the blocks that matter to the queries, or keys, first … last."""
    shift = shift_of(len_q, len_k, BOTTOM_RIGHT)
    if OF_KEYS:
        begin, full_begin, full_end, end = key_blocks(
            first, last, len_k, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK
        )
    else:
        begin, full_begin, full_end, end = query_blocks(
            first, last, len_q, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK
        )
    tl.store(to_ptr, begin)
    tl.store(to_ptr + 1, full_begin)
    tl.store(to_ptr + 2, full_end)
    tl.store(to_ptr + 3, end)


def bounds(mask, lengths, of_keys, first, last, block, device):
    """What `key_blocks` or `query_blocks` returns."""
    to = torch.full((4,), -1, dtype=torch.int32, device=device)
    left, right = mask.window
    OPERATOR.launch(
        blocks_kernel, (1,), to, first, last, *lengths, left, right, OF_KEYS=of_keys, BLOCK=block,
        BOTTOM_RIGHT=mask.bottom_right, HAS_LEFT=left >= 0, HAS_RIGHT=right >= 0,
    )  # fmt: skip
    return to.tolist()


@pytest.mark.parametrize("of_keys", [True, False], ids=["keys", "queries"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_blocks_are_the_least(mask, of_keys, device):
    # Squares, more keys, more queries; blocks that do and that do not divide the lengths.
    rows, block = 32, 16
    for lengths in ((64, 64), (50, 90), (90, 50)):
        seen = mask.visible(*lengths)
        seen = seen if of_keys else seen.T
        for first in range(0, len(seen), rows):
            last = min(first + rows, len(seen)) - 1
            begin, full_begin, full_end, end = bounds(
                mask, lengths, of_keys, first, last, block, device
            )
            assert begin <= full_begin <= full_end <= end
            tile = seen[first : last + 1]
            for at in range(0, tile.shape[1], block):
                part = tile[:, at : at + block]
                whole = part.shape[1] == block and bool(part.all())
                assert (begin <= at < end) == bool(part.any()), (lengths, first, at)
                assert (full_begin <= at < full_end) == whole, (lengths, first, at)


def test_a_window_visits_few_blocks(device):
    # 64 queries with 1024 keys before each see 1088: 17 blocks of 64, of which two are masked.
    mask = Mask(causal=True, left=1024)
    visited = [bounds(mask, (4096, 4096), True, n, n + 63, 64, device) for n in (2048, 4032)]
    for (begin, full_begin, full_end, end), first in zip(visited, (2048, 4032), strict=True):
        assert (end - begin) // 64 == 17
        assert (full_begin - begin, end - full_end) == (64, 64)
        assert (begin, end) == (first - 1024, first + 64)
    starts = itertools.pairwise(bounds(mask, (4096, 4096), False, n, n + 63, 64, device)[0]
                                for n in (0, 64, 128))  # fmt: skip
    assert all(b - a == 64 for a, b in starts)
