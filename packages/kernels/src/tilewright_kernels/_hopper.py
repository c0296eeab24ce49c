# What Gluon's decorators and annotations say of themselves is not what they do.
# pyrefly: ignore-errors
"""What products for Hopper are made of, in Gluon: who multiplies does nothing else.

A program of twelve warps stays on its multiprocessor and walks tiles of 128 x 256. Eight warps
multiply and fetch their own operands by the tensor memory accelerator, two steps ahead and across
the ends of tiles; four take each finished tile from shared memory, in the dtype of the tensors, and
do with it whatever there is to do, while the eight are at the next one.

Twelve warps are the most: with 16 a thread could have 128 registers by default, and the compiler
refuses an accumulator of 128. For the same reason no warp is there just to load.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@gluon.jit
def tile_at(index, tiles_m, tiles_n, GROUP_M: gl.constexpr):
    """Row and column of a tile, counted down GROUP_M rows of tiles, then in the next column."""
    group = index // (GROUP_M * tiles_n)
    rows = gl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = index - group * (GROUP_M * tiles_n)
    return group * GROUP_M + within % rows, within // rows


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each of which waits for so many arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
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
def next_product(a, b, acc):
    """acc + A·B, in flight; the product before is done, and its operands' buffer is free."""
    token = warpgroup_mma(a, b, acc, is_async=True)
    acc = warpgroup_mma_wait(num_outstanding=1, deps=(token,))
    gl.thread_barrier()
    return acc


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


def describe(x: Tensor | None, block: list[int]) -> TensorDescriptor | None:
    """A tensor descriptor for tiles of this shape, which lie in shared memory as wgmma wants."""
    if x is None:
        return None
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)
