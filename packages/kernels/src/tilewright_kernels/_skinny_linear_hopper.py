# What Gluon's decorators and annotations say of themselves is not what they do.
# pyrefly: ignore-errors
"""`skinny_linear` of several rows for Hopper, in Gluon: weights go to shared memory by themselves.

`skinny_linear_rows_kernel` holds its weights in registers until they are multiplied, so few
programs fit on a multiprocessor and the next launch has no room to ask for its own. Here each
program owns rings of buffers that the tensor memory accelerator fills, with weights and with x. The
first weights are asked for before the launch that makes x has ended.
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

from tilewright_kernels._hopper import barriers
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
    x_desc, w_desc, norm_weight_ptr, squares_ptr, residual_ptr, out_ptr,
    next_norm_ptr, scaled_ptr, next_squares_ptr, parts_ptr, arrived_ptr,
    residual_row_stride, M, N,
    EPS: gl.constexpr, K: gl.constexpr, GATED: gl.constexpr, PREFETCH: gl.constexpr,
    SPLITS: gl.constexpr, STAGES: gl.constexpr, PIECES: gl.constexpr, X_STAGES: gl.constexpr,
    ROUNDED: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `skinny_linear_rows_kernel`; grid (blocks of N, SPLITS).

    squares are sums of a norm that x has been multiplied by all but 1 / sqrt of, [SUMS, M]. scaled
    and next_squares are that for the next norm, of y.

    x_desc is of x as [K / BLOCK_K, M, BLOCK_K], w_desc of W as [K / BLOCK_K, N, BLOCK_K], or
    [K / BLOCK_K, 2, N, BLOCK_K] if gated: one copy brings all pieces of a step. While one step is
    multiplied, the next one's x is multiplied by the norm's weight.
    """
    STEPS: gl.constexpr = (K + SPLITS * PIECES * BLOCK_K - 1) // (SPLITS * PIECES * BLOCK_K)
    W_AHEAD: gl.constexpr = min(STAGES, STEPS)
    X_AHEAD: gl.constexpr = min(X_STAGES, STEPS)
    W_BYTES: gl.constexpr = BLOCK_N * PIECES * BLOCK_K * 2
    X_BYTES: gl.constexpr = BLOCK_M * PIECES * BLOCK_K * 2
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
    x_ring = gl.allocate_shared_memory(dtype, [X_STAGES, PIECES, BLOCK_M, BLOCK_K], x_desc.layout)
    w_bufs = w_ring._reinterpret(dtype, [STAGES * PIECES, BLOCK_N, BLOCK_K], w_layout)
    x_bufs = x_ring._reinterpret(dtype, [X_STAGES * PIECES, BLOCK_M, BLOCK_K], x_layout)
    x_rows = x_ring._reinterpret(dtype, [X_STAGES, ROWS, BLOCK_K], x_layout)
    w_full = barriers(STAGES, 1)
    x_full = barriers(X_STAGES, 1)

    allow_next_launch(True)
    block, split = gl.program_id(0), gl.program_id(1)
    begin = split * (STEPS * PIECES)
    if not PREFETCH:
        await_previous_launch(True)
    for slot in gl.static_range(W_AHEAD):
        mbarrier.expect(w_full.index(slot), W_BYTES)
        _ask_for_weights(w_desc, w_ring, w_full.index(slot), slot, begin + slot * PIECES, GATED)
    if norm_weight_ptr is not None:
        scale = _scales(norm_weight_ptr, begin, by_column, K, BLOCK_M, PIECES, BLOCK_K)
    if PREFETCH:
        await_previous_launch(True)
    for slot in gl.static_range(X_AHEAD):
        mbarrier.expect(x_full.index(slot), X_BYTES)
        tma.async_copy_global_to_shared(
            x_desc, [begin + slot * PIECES, 0, 0], x_full.index(slot), x_ring.index(slot)
        )

    WIDTH: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    n = block * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(1, by_row))
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, by_row))
    mask = (n < N)[:, None] & (m < M)[None, :]
    residual = gl.zeros((WIDTH, BLOCK_M), gl.float32, by_row)
    if residual_ptr is not None:
        at = residual_ptr + m[None, :] * residual_row_stride + n[:, None]
        residual = gl.load(at, mask=mask, other=0.0).to(gl.float32)
    square = gl.zeros((BLOCK_M,), gl.float32, gl.SliceLayout(0, by_row))
    if squares_ptr is not None:
        # Sums of squares from each of the programs that made x.
        SUMS: gl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
        sums = gl.arange(0, ROUNDED, gl.SliceLayout(1, by_row))
        of_block = squares_ptr + sums[:, None] * M + m[None, :]
        of_block = gl.load(of_block, mask=(sums < SUMS)[:, None] & (m < M)[None, :], other=0.0)
        square = gl.sum(of_block, 0)

    acc = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, mma)
    squares = gl.zeros((ROWS, BLOCK_K), gl.float32, by_column)
    for step in range(STEPS):
        w_slot, x_slot = step % STAGES, step % X_STAGES
        mbarrier.wait(w_full.index(w_slot), step // STAGES & 1)
        mbarrier.wait(x_full.index(x_slot), step // X_STAGES & 1)
        if norm_weight_ptr is not None:
            wide = x_rows.index(x_slot).load(by_column).to(gl.float32)
            squares += wide * wide
            x_rows.index(x_slot).store((wide * scale.to(gl.float32)).to(dtype))
            scale = _scales(
                norm_weight_ptr, begin + (step + 1) * PIECES, by_column, K, BLOCK_M, PIECES, BLOCK_K
            )
            fence_async_shared()
            gl.thread_barrier()
        for piece in gl.static_range(PIECES):
            x = x_bufs.index(x_slot * PIECES + piece).permute((1, 0))
            acc = warpgroup_mma(w_bufs.index(w_slot * PIECES + piece), x, acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=PIECES, deps=(acc,))
        w_step, x_step = step - 1 + STAGES, step - 1 + X_STAGES
        w_more, x_more = (step > 0) & (w_step < STEPS), (step > 0) & (x_step < STEPS)
        if w_more | x_more:
            gl.thread_barrier()  # all warps have left the slots of the step before
        if x_more:
            free = x_step % X_STAGES
            mbarrier.expect(x_full.index(free), X_BYTES)
            tma.async_copy_global_to_shared(
                x_desc, [begin + x_step * PIECES, 0, 0], x_full.index(free), x_ring.index(free)
            )
        if w_more:
            free = w_step % STAGES
            mbarrier.expect(w_full.index(free), W_BYTES)
            first = begin + w_step * PIECES
            _ask_for_weights(w_desc, w_ring, w_full.index(free), free, first, GATED)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))

    acc = gl.convert_layout(acc, by_row)
    if norm_weight_ptr is not None:
        square = gl.sum(gl.sum(squares, 1).reshape((PIECES, BLOCK_M)), 0)
        square = gl.convert_layout(square, gl.SliceLayout(0, by_row))
    if SPLITS == 1:
        _finish(
            acc, square, residual, norm_weight_ptr, squares_ptr, out_ptr, next_norm_ptr, scaled_ptr,
            next_squares_ptr, n, m, M, N, EPS, K, GATED, by_row,
        )  # fmt: skip
    else:
        # As the twin: a tile of each split and block, and its squares.
        blocks = gl.num_programs(0)
        SIZE: gl.constexpr = (BLOCK_N + 1) * BLOCK_M
        tile = gl.arange(0, BLOCK_N, gl.SliceLayout(1, by_row))[:, None] + m[None, :] * BLOCK_N
        mine = parts_ptr + (split * blocks + block) * SIZE
        gl.store(mine + tile, acc)
        if norm_weight_ptr is not None:
            gl.store(mine + BLOCK_N * BLOCK_M + m, square)
        gl.thread_barrier()
        if gl.atomic_add(arrived_ptr + block, 1, sem="acq_rel") == SPLITS - 1:
            acc = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, by_row)
            if norm_weight_ptr is not None:
                square = gl.zeros((BLOCK_M,), gl.float32, gl.SliceLayout(0, by_row))
            for other in gl.static_range(SPLITS):
                theirs = parts_ptr + (other * blocks + block) * SIZE
                acc += gl.load(theirs + tile, cache_modifier=".cg")
                if norm_weight_ptr is not None:
                    square += gl.load(theirs + BLOCK_N * BLOCK_M + m, cache_modifier=".cg")
            gl.store(arrived_ptr + block, 0)
            _finish(
                acc, square, residual, norm_weight_ptr, squares_ptr, out_ptr, next_norm_ptr,
                scaled_ptr, next_squares_ptr, n, m, M, N, EPS, K, GATED, by_row,
            )  # fmt: skip


@gluon.jit
def _finish(
    acc, square, residual, norm_weight_ptr, squares_ptr, out_ptr, next_norm_ptr, scaled_ptr,
    next_squares_ptr, n, m, M, N,
    EPS: gl.constexpr, K: gl.constexpr, GATED: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """From sums over all of K to y, and what the next norm wants."""
    WIDTH: gl.constexpr = residual.shape[0]
    BLOCK_M: gl.constexpr = residual.shape[1]
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    if norm_weight_ptr is not None or squares_ptr is not None:
        acc *= gl.rsqrt(square / K + EPS)[None, :]
    if GATED:
        gate, up = acc.reshape((2, WIDTH, BLOCK_M)).permute((1, 2, 0)).split()
        acc = gl.convert_layout(silu(gate) * up, layout)
    y = (acc + residual).to(dtype)
    at = m[None, :] * N + n[:, None]
    mask = (n < N)[:, None] & (m < M)[None, :]
    gl.store(out_ptr + at, y, mask=mask)
    if next_norm_ptr is not None:
        wide = y.to(gl.float32)
        scale = gl.load(next_norm_ptr + n, mask=n < N, other=0.0).to(gl.float32)
        gl.store(scaled_ptr + at, (wide * scale[:, None]).to(dtype), mask=mask)
        sums = gl.sum(gl.where((n < N)[:, None], wide * wide, 0.0), 0)
        gl.store(next_squares_ptr + gl.program_id(0) * M + m, sums, mask=m < M)


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
