# What Gluon's decorators and annotations say of themselves is not what they do.
# pyrefly: ignore-errors
"""`skinny_linear` of several rows for Hopper, in Gluon: weights go to shared memory by themselves.

`skinny_linear_rows_kernel` holds its weights in registers until they are multiplied, so few
programs fit on a multiprocessor and the next launch has no room to ask for its own. Here each
program owns a ring of buffers that the tensor memory accelerator fills. The ring's first weights
are asked for before the launch that makes x has ended; a program of 128 threads and a ring of
half the shared memory leave room for one of the next launch, which does the same.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tilewright_kernels._math import silu
from tilewright_kernels._overlap import allow_next_launch, await_previous_launch

BLOCK_N = 64
"""Rows of W that a program multiplies: what one wgmma takes. Gated, half of them are up's."""

BLOCK_K = 64
"""Columns of a piece: 128 bytes, the widest that lies in shared memory as wgmma wants."""


@gluon.jit
def _ask_for_weights(w_desc, w_ring, bar, slot, piece, GATED: gl.constexpr):
    """Start the copy of W's pieces from `piece` on into a slot of the ring."""
    if GATED:
        HALF: gl.constexpr = w_ring.shape[3]
        at = [piece, 0, gl.program_id(0) * HALF, 0]
    else:
        HEIGHT: gl.constexpr = w_ring.shape[2]
        at = [piece, gl.program_id(0) * HEIGHT, 0]
    tma.async_copy_global_to_shared(w_desc, at, bar, w_ring.index(slot))


@gluon.jit
def _scales(norm_weight_ptr, piece, layout: gl.constexpr, K: gl.constexpr, BLOCK_M: gl.constexpr,
            PIECES: gl.constexpr, BLOCK_K: gl.constexpr):  # fmt: skip
    """The norm's weights beside the rows of a slot, [PIECES · BLOCK_M, BLOCK_K]."""
    rows = gl.arange(0, PIECES * BLOCK_M, gl.SliceLayout(1, layout)) // BLOCK_M
    cols = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
    k = (piece + rows)[:, None] * BLOCK_K + cols[None, :]
    return gl.load(norm_weight_ptr + k, mask=k < K, other=0.0)


@gluon.jit
def skinny_linear_hopper_kernel(
    x_desc, w_desc, norm_weight_ptr, residual_ptr, out_ptr, parts_ptr, arrived_ptr,
    residual_row_stride, M, N,
    EPS: gl.constexpr, K: gl.constexpr, GATED: gl.constexpr, PREFETCH: gl.constexpr,
    SPLITS: gl.constexpr, STAGES: gl.constexpr, PIECES: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `skinny_linear_rows_kernel`; grid (blocks of N, SPLITS).

    x_desc is of x as [K / BLOCK_K, M, BLOCK_K], w_desc of W as [K / BLOCK_K, N, BLOCK_K], or
    [K / BLOCK_K, 2, N, BLOCK_K] if gated: one copy brings all pieces of a step. While one step is
    multiplied, the next one's x is multiplied by the norm's weight.
    """
    STEPS: gl.constexpr = (K + SPLITS * PIECES * BLOCK_K - 1) // (SPLITS * PIECES * BLOCK_K)
    AHEAD: gl.constexpr = min(STAGES, STEPS)
    BYTES: gl.constexpr = (BLOCK_N + BLOCK_M) * PIECES * BLOCK_K * 2
    ROWS: gl.constexpr = PIECES * BLOCK_M
    dtype: gl.constexpr = x_desc.dtype
    w_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_K], dtype)
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], dtype)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    by_column: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    by_row: gl.constexpr = gl.BlockedLayout([8, 1], [4, 8], [1, 4], [0, 1])
    # As the copies see the rings, as wgmma does, and x's as rows of all pieces of a step.
    if GATED:
        w_ring = gl.allocate_shared_memory(
            dtype, [STAGES, PIECES, 2, BLOCK_N // 2, BLOCK_K], w_desc.layout
        )
    else:
        w_ring = gl.allocate_shared_memory(dtype, [STAGES, PIECES, BLOCK_N, BLOCK_K], w_desc.layout)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, PIECES, BLOCK_M, BLOCK_K], x_desc.layout)
    w_bufs = w_ring._reinterpret(dtype, [STAGES * PIECES, BLOCK_N, BLOCK_K], w_layout)
    x_bufs = x_ring._reinterpret(dtype, [STAGES * PIECES, BLOCK_M, BLOCK_K], x_layout)
    x_rows = x_ring._reinterpret(dtype, [STAGES, ROWS, BLOCK_K], x_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)

    allow_next_launch(True)
    block, split = gl.program_id(0), gl.program_id(1)
    begin = split * (STEPS * PIECES)
    if not PREFETCH:
        await_previous_launch(True)
    for slot in gl.static_range(AHEAD):
        mbarrier.expect(full.index(slot), BYTES)
        _ask_for_weights(w_desc, w_ring, full.index(slot), slot, begin + slot * PIECES, GATED)
    if norm_weight_ptr is not None:
        scale = _scales(norm_weight_ptr, begin, by_column, K, BLOCK_M, PIECES, BLOCK_K)
    if PREFETCH:
        await_previous_launch(True)
    for slot in gl.static_range(AHEAD):
        tma.async_copy_global_to_shared(
            x_desc, [begin + slot * PIECES, 0, 0], full.index(slot), x_ring.index(slot)
        )

    WIDTH: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    n = block * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(1, by_row))
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, by_row))
    mask = (n < N)[:, None] & (m < M)[None, :]
    residual = gl.zeros((WIDTH, BLOCK_M), gl.float32, by_row)
    if residual_ptr is not None:
        at = residual_ptr + m[None, :] * residual_row_stride + n[:, None]
        residual = gl.load(at, mask=mask, other=0.0).to(gl.float32)
    out_at = out_ptr + m[None, :] * N + n[:, None]

    acc = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, mma)
    squares = gl.zeros((ROWS, BLOCK_K), gl.float32, by_column)
    for step in range(STEPS):
        now = step % STAGES
        mbarrier.wait(full.index(now), step // STAGES & 1)
        if norm_weight_ptr is not None:
            wide = x_rows.index(now).load(by_column).to(gl.float32)
            squares += wide * wide
            x_rows.index(now).store((wide * scale.to(gl.float32)).to(dtype))
            scale = _scales(
                norm_weight_ptr, begin + (step + 1) * PIECES, by_column, K, BLOCK_M, PIECES, BLOCK_K
            )
            fence_async_shared()
            gl.thread_barrier()
        for piece in gl.static_range(PIECES):
            x = x_bufs.index(now * PIECES + piece).permute((1, 0))
            acc = warpgroup_mma(w_bufs.index(now * PIECES + piece), x, acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=PIECES, deps=(acc,))
        ahead = step - 1 + STAGES
        if (step > 0) & (ahead < STEPS):
            gl.thread_barrier()  # all warps have left the slot of the step before
            free, first = ahead % STAGES, begin + ahead * PIECES
            mbarrier.expect(full.index(free), BYTES)
            _ask_for_weights(w_desc, w_ring, full.index(free), free, first, GATED)
            tma.async_copy_global_to_shared(
                x_desc, [first, 0, 0], full.index(free), x_ring.index(free)
            )
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))

    acc = gl.convert_layout(acc, by_row)
    square = gl.sum(gl.sum(squares, 1).reshape((PIECES, BLOCK_M)), 0)
    square = gl.convert_layout(square, gl.SliceLayout(0, by_row))
    if SPLITS == 1:
        y = _finish(acc, square, residual, norm_weight_ptr, EPS, K, GATED, by_row)
        gl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        # As the twin: a tile of each split and block, and its squares.
        blocks = gl.num_programs(0)
        SIZE: gl.constexpr = (BLOCK_N + 1) * BLOCK_M
        tile = gl.arange(0, BLOCK_N, gl.SliceLayout(1, by_row))[:, None] + m[None, :] * BLOCK_N
        mine = parts_ptr + (split * blocks + block) * SIZE
        gl.store(mine + tile, acc)
        gl.store(mine + BLOCK_N * BLOCK_M + m, square)
        gl.thread_barrier()
        if gl.atomic_add(arrived_ptr + block, 1, sem="acq_rel") == SPLITS - 1:
            acc = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, by_row)
            square = gl.zeros((BLOCK_M,), gl.float32, gl.SliceLayout(0, by_row))
            for other in gl.static_range(SPLITS):
                theirs = parts_ptr + (other * blocks + block) * SIZE
                acc += gl.load(theirs + tile, cache_modifier=".cg")
                if norm_weight_ptr is not None:
                    square += gl.load(theirs + BLOCK_N * BLOCK_M + m, cache_modifier=".cg")
            gl.store(arrived_ptr + block, 0)
            y = _finish(acc, square, residual, norm_weight_ptr, EPS, K, GATED, by_row)
            gl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _finish(
    acc, square, residual, norm_weight_ptr,
    EPS: gl.constexpr, K: gl.constexpr, GATED: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """From sums over all of K to y."""
    WIDTH: gl.constexpr = residual.shape[0]
    BLOCK_M: gl.constexpr = residual.shape[1]
    if norm_weight_ptr is not None:
        acc *= gl.rsqrt(square / K + EPS)[None, :]
    if GATED:
        gate, up = acc.reshape((2, WIDTH, BLOCK_M)).permute((1, 2, 0)).split()
        acc = gl.convert_layout(silu(gate) * up, layout)
    return acc + residual


def describe_rows(x: Tensor, height: int, pieces: int) -> TensorDescriptor:
    """A tensor descriptor of x [M, K] as [K / BLOCK_K, M, BLOCK_K], for the pieces of a step."""
    (rows, k), stride = x.shape, x.stride(0)
    return _describe(
        x, [k // BLOCK_K, rows, BLOCK_K], [BLOCK_K, stride, 1], [pieces, height, BLOCK_K]
    )


def describe_gated(weight: Tensor, pieces: int) -> TensorDescriptor:
    """A tensor descriptor of W [2N, K] as [K / BLOCK_K, 2, N, BLOCK_K], half a tile of each."""
    (rows, k), stride = weight.shape, weight.stride(0)
    return _describe(
        weight,
        [k // BLOCK_K, 2, rows // 2, BLOCK_K],
        [BLOCK_K, rows // 2 * stride, stride, 1],
        [pieces, 2, BLOCK_N // 2, BLOCK_K],
    )


def _describe(
    x: Tensor, shape: list[int], strides: list[int], block: list[int]
) -> TensorDescriptor:
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, shape, strides, block, layout)
