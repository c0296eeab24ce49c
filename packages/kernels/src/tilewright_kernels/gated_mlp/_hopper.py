# What Gluon's decorators and annotations say of themselves is not what they do.
# pyrefly: ignore-errors
"""Both kernels for Hopper, in Gluon; the package's `_hopper` says how the warps share the work.

The four that do not multiply apply the activation or its gradient and write the results. In
`_gate_up` and `_gate_up_grad` all warps do both, one after the other, and the tensor cores wait
meanwhile. H200, bfloat16, 16384 tokens, one run:

    hidden, I      forward: here, there, cuBLAS alone      backward: here, cuBLAS and two kernels
    1536, 4096     0.69     0.73     0.64 ms               0.44    0.59 ms
    4096, 11008    4.51     4.66     4.37 ms               2.34    3.03 ms
"""

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from tilewright_kernels._hopper import (
    barriers,
    buffers,
    describe,
    hand_over,
    next_product,
    tile_at,
)
from tilewright_kernels._launch import cdiv, num_programs
from tilewright_kernels._operator import Operator

BLOCK_M, BLOCK_K, GROUP_M = 128, 64, 8

STAGES = 3
"""Buffers of 48 KiB for operands; with the tile's 64 KiB a multiprocessor has room for no more."""

ROWS = 32
"""Rows of a part that the four warps take at a time, 16 numbers a thread."""

EPILOGUE_REGISTERS = gl.constexpr(104)
"""A thread of the four warps may take so many; those that multiply get the rest."""

_OPTIONS = {
    "BLOCK_M": BLOCK_M, "BLOCK_K": BLOCK_K, "GROUP_M": GROUP_M, "STAGES": STAGES, "ROWS": ROWS,
    "num_warps": 8, "maxnreg": 168,
}  # fmt: skip


@gluon.jit
def _fetch(
    a_desc, b_desc, b_low_desc, a_bufs, b_bufs, full, slot, m, n, k, pred, TRANSPOSED: gl.constexpr
):
    """Start the copies of one step's operands; `full` of the slot is signalled when they are there.

    TRANSPOSED: B is given as rows [N, K], the first half from b_desc, the other from b_low_desc.
    """
    bar, a, b = full.index(slot), a_bufs.index(slot), b_bufs.index(slot)
    BLOCK_M: gl.constexpr = a_bufs.shape[1]
    BLOCK_K: gl.constexpr = a_bufs.shape[2]
    BLOCK_N: gl.constexpr = b_bufs.shape[1] if TRANSPOSED else b_bufs.shape[2]
    mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K * 2, pred=pred)
    tma.async_copy_global_to_shared(a_desc, [m * BLOCK_M, k * BLOCK_K], bar, a, pred=pred)
    if TRANSPOSED:
        HALF: gl.constexpr = BLOCK_N // 2
        upper, lower = b.slice(0, HALF), b.slice(HALF, HALF)
        tma.async_copy_global_to_shared(b_desc, [n * HALF, k * BLOCK_K], bar, upper, pred=pred)
        tma.async_copy_global_to_shared(b_low_desc, [n * HALF, k * BLOCK_K], bar, lower, pred=pred)
    else:
        tma.async_copy_global_to_shared(b_desc, [k * BLOCK_K, n * BLOCK_N], bar, b, pred=pred)


@gluon.jit
def _multiply(
    a_desc, b_desc, b_low_desc, a_bufs, b_bufs, parts, full, tile_full, tile_empty,
    tiles_m, tiles_n, k_tiles, TRANSPOSED: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The eight warps: A·B of each tile, into the four parts [128, 64] of shared memory.

    One product is always in flight. When it is started, the one before is waited for, whose
    operands' buffer then takes those of the step after the next, be they of the next tile.
    """
    STAGES: gl.constexpr = a_bufs.shape[0]
    BLOCK_M: gl.constexpr = a_bufs.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 256, 16]
    )
    tiles = tiles_m * tiles_n
    next_tile, next_k = gl.program_id(0), 0
    next_m, next_n = tile_at(next_tile, tiles_m, tiles_n, GROUP_M)
    for slot in gl.static_range(STAGES - 1):
        _fetch(
            a_desc, b_desc, b_low_desc, a_bufs, b_bufs, full, slot, next_m, next_n, next_k,
            next_tile < tiles, TRANSPOSED,
        )  # fmt: skip
        next_k += 1
        if next_k == k_tiles:
            next_k = 0
            next_tile += gl.num_programs(0)
            next_m, next_n = tile_at(next_tile, tiles_m, tiles_n, GROUP_M)
    step = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        acc = gl.zeros((BLOCK_M, 256), gl.float32, layout)
        for _k in range(k_tiles):
            current = step % STAGES
            mbarrier.wait(full.index(current), step // STAGES & 1)
            b = b_bufs.index(current)
            if TRANSPOSED:
                b = b.permute((1, 0))
            acc = next_product(a_bufs.index(current), b, acc)
            _fetch(
                a_desc, b_desc, b_low_desc, a_bufs, b_bufs, full, (step + STAGES - 1) % STAGES,
                next_m, next_n, next_k, next_tile < tiles, TRANSPOSED,
            )  # fmt: skip
            next_k += 1
            if next_k == k_tiles:
                next_k = 0
                next_tile += gl.num_programs(0)
                next_m, next_n = tile_at(next_tile, tiles_m, tiles_n, GROUP_M)
            step += 1
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        hand_over(acc, parts, tile_full, tile_empty, index // gl.num_programs(0))


@gluon.jit
def _gate(
    h_ptr, gate_desc, up_desc, parts, tile_full, tile_empty, M, N, tiles_m, tiles_n,
    FUNCTION: gl.constexpr, GROUP_M: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """The four warps of the forward: parts 0 and 1 are gate, 2 and 3 are up."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    BLOCK_M: gl.constexpr = parts.shape[1]
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    cols = gl.arange(0, 64, gl.SliceLayout(0, layout))
    for index in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = tile_at(index, tiles_m, tiles_n, GROUP_M)
        mbarrier.wait(tile_full, index // gl.num_programs(0) & 1)
        if gate_desc is not None:
            for half in gl.static_range(2):
                at = [m * BLOCK_M, n * 128 + 64 * half]
                tma.async_copy_shared_to_global(gate_desc, at, parts.index(half))
                tma.async_copy_shared_to_global(up_desc, at, parts.index(2 + half))
        if h_ptr is not None:
            for half in gl.static_range(2):
                for i in gl.static_range(BLOCK_M // ROWS):
                    gate = parts.index(half).slice(ROWS * i, ROWS).load(layout)
                    up = parts.index(2 + half).slice(ROWS * i, ROWS).load(layout)
                    h = FUNCTION(gate.to(gl.float32)) * up.to(gl.float32)
                    row, col = m * BLOCK_M + ROWS * i + rows, n * 128 + 64 * half + cols
                    mask = (row < M)[:, None] & (col < N)[None, :]
                    offsets = row.to(gl.int64)[:, None] * N + col[None, :]
                    gl.store(h_ptr + offsets, h.to(parts.dtype), mask=mask)
        tma.store_wait(0)
        mbarrier.arrive(tile_empty)


@gluon.jit
def gate_up_hopper_kernel(
    x_desc, w_gate_desc, w_up_desc, h_ptr, gate_desc, up_desc, M, N, K,
    FUNCTION: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """`gate_up_persistent_kernel` with a division of labour."""
    tiles_m, tiles_n = gl.cdiv(M, BLOCK_M), gl.cdiv(N, 128)
    b_layout: gl.constexpr = w_gate_desc.layout
    a_bufs, b_bufs, parts = buffers(x_desc, [BLOCK_M, BLOCK_K], [256, BLOCK_K], b_layout, STAGES)
    full, tile = barriers(STAGES, 1), barriers(2, 1)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    x_desc, w_gate_desc, w_up_desc, a_bufs, b_bufs, parts, full,
                    tile.index(0), tile.index(1), tiles_m, tiles_n, gl.cdiv(K, BLOCK_K),
                    True, GROUP_M,
                ),
            ),
            (
                _gate,
                (
                    h_ptr, gate_desc, up_desc, parts, tile.index(0), tile.index(1),
                    M, N, tiles_m, tiles_n, FUNCTION, GROUP_M, ROWS,
                ),
            ),
        ],
        [4],
        [EPILOGUE_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _chunk_at(
    chunk, M, N, stride, tiles_m, tiles_n, layout: gl.constexpr,
    GROUP_M: gl.constexpr, BLOCK_M: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Offsets into gate and into h of a chunk [ROWS, 64], counted over this program's tiles.

    Past the last tile the mask is empty.
    """
    PARTS_M: gl.constexpr = BLOCK_M // ROWS
    index = gl.program_id(0) + chunk // (4 * PARTS_M) * gl.num_programs(0)
    m, n = tile_at(index, tiles_m, tiles_n, GROUP_M)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    cols = gl.arange(0, 64, gl.SliceLayout(0, layout))
    row = m * BLOCK_M + chunk % PARTS_M * ROWS + rows
    col = n * 256 + chunk // PARTS_M % 4 * 64 + cols
    mask = (row < M)[:, None] & ((col < N) & (index < tiles_m * tiles_n))[None, :]
    row = row.to(gl.int64)[:, None]
    return row * stride + col[None, :], row * N + col[None, :], mask


@gluon.jit
def _gate_grad(
    gate_ptr, up_ptr, dgate_ptr, dup_ptr, h_ptr, parts, tile_full, tile_empty, M, N, stride,
    tiles_m, tiles_n,
    FUNCTION: gl.constexpr, SLOPE: gl.constexpr, GROUP_M: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """The four warps of the backward: dh comes in parts, gate and up from memory.

    While one chunk is worked on, the next one's gate and up are on their way to registers.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    BLOCK_M: gl.constexpr = parts.shape[1]
    CHUNKS: gl.constexpr = 4 * BLOCK_M // ROWS
    dh_bufs = parts._reinterpret(parts.dtype, [CHUNKS, ROWS, 64], parts.layout)
    tiles = gl.cdiv(tiles_m * tiles_n - gl.program_id(0), gl.num_programs(0))
    offsets, h_offsets, mask = _chunk_at(
        0, M, N, stride, tiles_m, tiles_n, layout, GROUP_M, BLOCK_M, ROWS
    )
    gate = gl.load(gate_ptr + offsets, mask=mask, other=0.0)
    up = gl.load(up_ptr + offsets, mask=mask, other=0.0)
    for tile in range(tiles):
        mbarrier.wait(tile_full, tile & 1)
        for c in range(CHUNKS):
            next_offsets, next_h_offsets, next_mask = _chunk_at(
                tile * CHUNKS + c + 1, M, N, stride, tiles_m, tiles_n, layout,
                GROUP_M, BLOCK_M, ROWS,
            )  # fmt: skip
            next_gate = gl.load(gate_ptr + next_offsets, mask=next_mask, other=0.0)
            next_up = gl.load(up_ptr + next_offsets, mask=next_mask, other=0.0)
            gate, up = gate.to(gl.float32), up.to(gl.float32)
            dh = dh_bufs.index(c).load(layout).to(gl.float32)
            f = FUNCTION(gate)
            gl.store(dgate_ptr + offsets, (dh * up * SLOPE(gate)).to(parts.dtype), mask=mask)
            gl.store(dup_ptr + offsets, (dh * f).to(parts.dtype), mask=mask)
            if h_ptr is not None:
                gl.store(h_ptr + h_offsets, (f * up).to(parts.dtype), mask=mask)
            gate, up, mask = next_gate, next_up, next_mask
            offsets, h_offsets = next_offsets, next_h_offsets
        mbarrier.arrive(tile_empty)


@gluon.jit
def gate_up_grad_hopper_kernel(
    dy_desc, w_desc, gate_ptr, up_ptr, dgate_ptr, dup_ptr, h_ptr, M, N, K, stride,
    FUNCTION: gl.constexpr, SLOPE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """`gate_up_grad_persistent_kernel` with a division of labour.

    stride is that of the rows of gate, up, dgate and dup; h is contiguous, or None.
    """
    tiles_m, tiles_n = gl.cdiv(M, BLOCK_M), gl.cdiv(N, 256)
    b_layout: gl.constexpr = w_desc.layout
    a_bufs, b_bufs, parts = buffers(dy_desc, [BLOCK_M, BLOCK_K], [BLOCK_K, 256], b_layout, STAGES)
    full, tile = barriers(STAGES, 1), barriers(2, 1)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    dy_desc, w_desc, w_desc, a_bufs, b_bufs, parts, full,
                    tile.index(0), tile.index(1), tiles_m, tiles_n, gl.cdiv(K, BLOCK_K),
                    False, GROUP_M,
                ),
            ),
            (
                _gate_grad,
                (
                    gate_ptr, up_ptr, dgate_ptr, dup_ptr, h_ptr, parts,
                    tile.index(0), tile.index(1), M, N, stride, tiles_m, tiles_n,
                    FUNCTION, SLOPE, GROUP_M, ROWS,
                ),
            ),
        ],
        [4],
        [EPILOGUE_REGISTERS],
    )  # fmt: skip


def launch_gate_up_hopper(
    operator: Operator, x: Tensor, w_gate_up: Tensor, h: Tensor | None, gate_up: Tensor | None,
    function: Any,
) -> None:  # fmt: skip
    """`launch_gate_up` of operands that are `describable`."""
    (M, K), N = x.shape, w_gate_up.shape[0] // 2
    w_gate, w_up = w_gate_up.chunk(2)
    gate, up = (None, None) if gate_up is None else gate_up.chunk(2, dim=1)
    operands = [describe(t, [BLOCK_M, BLOCK_K]) for t in (x, w_gate, w_up)]
    kept = [describe(t, [BLOCK_M, 64]) for t in (gate, up)]
    tiles = cdiv(M, BLOCK_M) * cdiv(N, 128)
    operator.launch(
        gate_up_hopper_kernel, (min(tiles, num_programs(x.device, per_sm=1)),),
        *operands, h, *kept, M, N, K, FUNCTION=function, **_OPTIONS,
    )  # fmt: skip


def launch_gate_up_grad_hopper(
    operator: Operator, dy: Tensor, w_down: Tensor, gate_up: Tensor, dgate_up: Tensor,
    h: Tensor | None, function: Any, slope: Any,
) -> None:  # fmt: skip
    """`launch_gate_up_grad` of operands that are `describable`."""
    (M, K), N = dy.shape, w_down.shape[1]
    tiles = cdiv(M, BLOCK_M) * cdiv(N, 256)
    operator.launch(
        gate_up_grad_hopper_kernel, (min(tiles, num_programs(dy.device, per_sm=1)),),
        describe(dy, [BLOCK_M, BLOCK_K]), describe(w_down, [BLOCK_K, 256]),
        *gate_up.chunk(2, dim=1), *dgate_up.chunk(2, dim=1), h, M, N, K, gate_up.stride(0),
        FUNCTION=function, SLOPE=slope, **_OPTIONS,
    )  # fmt: skip
