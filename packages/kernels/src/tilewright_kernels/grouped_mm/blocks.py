"""Which rows a program works on, where groups of rows end wherever the device says.

The rows of all groups are cut into blocks of BLOCK_M, the last of a group shorter. A table says of
each block whose it is and which rows it has, so that a program with a number finds its work by one
load. The host knows only that there are no more than rows // BLOCK_M + groups blocks; it makes the
table so long, launches so many programs, and those without a block end at once.
"""

import torch
from torch import Tensor

from tilewright_kernels._launch import next_power_of_2
from tilewright_kernels._operator import Operator
from tilewright_kernels._triton import tl, triton

STEP = 128
"""Entries of the table that a program writes at a time."""


@triton.jit
def row_blocks_kernel(
    offs_ptr, blocks_ptr, groups, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """The number of blocks, then (group, first row, end of the group) of each; a program a group.

    Each adds up for itself how many blocks come before its own. GROUPS is a power of two.
    """
    group = tl.program_id(0)
    others = tl.arange(0, GROUPS)
    inside = others < groups
    ends = tl.load(offs_ptr + others, mask=inside, other=0)
    starts = tl.load(offs_ptr + others - 1, mask=inside & (others > 0), other=0)
    counts = tl.where(inside, (tl.maximum(ends - starts, 0) + BLOCK_M - 1) // BLOCK_M, 0)
    first = tl.sum(tl.where(others < group, counts, 0), axis=0)
    count = tl.sum(tl.where(others == group, counts, 0), axis=0)
    start = tl.sum(tl.where(others == group, starts, 0), axis=0)
    end = tl.sum(tl.where(others == group, ends, 0), axis=0)
    if group == groups - 1:
        tl.store(blocks_ptr, first + count)
    for i in range(0, count, STEP):
        own = i + tl.arange(0, STEP)
        entries = blocks_ptr + 1 + 3 * (first + own)
        tl.store(entries, tl.zeros_like(own) + group, mask=own < count)
        tl.store(entries + 1, start + own * BLOCK_M, mask=own < count)
        tl.store(entries + 2, tl.zeros_like(own) + end, mask=own < count)


@triton.jit
def block_of(blocks_ptr, block, num_blocks):
    """(group, first row, end of its group) of a block, all 0 past the last."""
    entry = blocks_ptr + 1 + 3 * block
    inside = block < num_blocks
    group = tl.load(entry, mask=inside, other=0)
    row = tl.load(entry + 1, mask=inside, other=0)
    end = tl.load(entry + 2, mask=inside, other=0)
    return group, row, end


def most_blocks(rows: int, groups: int, block_m: int) -> int:
    """The most blocks that so many rows in so many groups can make."""
    return rows // block_m + min(groups, rows)


def row_blocks(operator: Operator, offs: Tensor, rows: int, block_m: int) -> Tensor:
    """The table for blocks of block_m rows, [1 + 3 · most_blocks] int32.

    Args:
        operator: whose launch it is.
        offs: [groups] int32, contiguous, at least one.
        rows: at least offs[-1].
        block_m: a power of two.
    """
    (groups,) = offs.shape
    blocks = offs.new_empty(1 + 3 * most_blocks(rows, groups, block_m), dtype=torch.int32)
    operator.launch(
        row_blocks_kernel, (groups,), offs, blocks, groups, BLOCK_M=block_m,
        GROUPS=next_power_of_2(groups), STEP=STEP,
    )  # fmt: skip
    return blocks
