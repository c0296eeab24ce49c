# What Gluon's decorators and annotations say of themselves is not what they do.
# pyrefly: ignore-errors
"""What both products of groups for Hopper are made of, in Gluon: who multiplies does nothing else.

As in `gated_mlp._hopper`, a program of twelve warps stays on its multiprocessor and walks tiles of
128 x 256. Eight warps multiply and fetch their own operands by the tensor memory accelerator, two
steps ahead and across the ends of tiles; four take each finished tile from shared memory and write
it, while the eight are at the next one. `moe_mlp` has other work for the four.

How many tiles there are is known on the device alone, so that a program asks a table (`blocks`)
which rows and whose matrix its next tile has, one tile before it needs to know.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
)


@gluon.jit
def tile_at(index, tiles_m, tiles_n, GROUP_M: gl.constexpr):
    """Row and column of a tile, counted down GROUP_M rows of tiles, then in the next column."""
    group = index // (GROUP_M * tiles_n)
    rows = gl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = index - group * (GROUP_M * tiles_n)
    return group * GROUP_M + within % rows, within // rows


@gluon.jit
def block_at(blocks_ptr, index, num_blocks, tiles_n, GROUP_M: gl.constexpr):
    """Whose matrix a tile multiplies with, its first row, its group's last + 1, and its column.

    Past the last tile all but the column are 0.
    """
    m, n = tile_at(index, num_blocks, tiles_n, GROUP_M)
    inside = index < num_blocks * tiles_n
    entry = blocks_ptr + 1 + 3 * m
    group = gl.load(entry, mask=inside, other=0)
    row = gl.load(entry + 1, mask=inside, other=0)
    end = gl.load(entry + 2, mask=inside, other=0)
    return group, row, end, n


@gluon.jit
def barriers(COUNT: gl.constexpr):
    """COUNT barriers, each of which waits for one arrival."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=1)
    return bars


@gluon.jit
def buffers(
    a_desc, A_SHAPE: gl.constexpr, B_SHAPE: gl.constexpr, b_layout: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Shared memory for the operands of STAGES steps, and for a tile in four parts."""
    dtype: gl.constexpr = a_desc.dtype
    part_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, 64], dtype)
    a_bufs = gl.allocate_shared_memory(dtype, [STAGES, A_SHAPE[0], A_SHAPE[1]], a_desc.layout)
    b_bufs = gl.allocate_shared_memory(dtype, [STAGES, B_SHAPE[0], B_SHAPE[1]], b_layout)
    parts = gl.allocate_shared_memory(dtype, [4, 128, 64], part_layout)
    return a_bufs, b_bufs, parts


@gluon.jit
def hand_over(acc, parts, tile_full, tile_empty, turn):
    """Give a tile to the other warps, in four parts [128, 64] and the operands' dtype."""
    BLOCK_M: gl.constexpr = parts.shape[1]
    mbarrier.wait(tile_empty, turn & 1 ^ 1)
    left, right = acc.reshape((BLOCK_M, 2, 128)).permute((0, 2, 1)).split()
    part_0, part_1 = left.reshape((BLOCK_M, 2, 64)).permute((0, 2, 1)).split()
    part_2, part_3 = right.reshape((BLOCK_M, 2, 64)).permute((0, 2, 1)).split()
    parts.index(0).store(part_0.to(parts.dtype))
    parts.index(1).store(part_1.to(parts.dtype))
    parts.index(2).store(part_2.to(parts.dtype))
    parts.index(3).store(part_3.to(parts.dtype))
    fence_async_shared()
    mbarrier.arrive(tile_full)
