"""The backward kernel: the gradient of h, and all that follows from it row by row.

    dh = dy[t] · Wd[e]            dw = dh · h            dgate = w · dh · up · f'(gate)
                                                         dup = w · dh · f(gate)

dh is without the row's weight w, so that its product with h is the weight's gradient, and y's rows
are neither kept nor computed anew. dh never reaches memory. w · h is written beside: the gradient
of Wd needs it.
"""

from typing import Any

from torch import Tensor

from tilewright_kernels._launch import cdiv, is_hopper
from tilewright_kernels._operator import Operator
from tilewright_kernels._product_tiles import operands
from tilewright_kernels._triton import tl, triton
from tilewright_kernels.grouped_mm.blocks import most_blocks
from tilewright_kernels.grouped_mm.launches import (
    HOPPER_BLOCK_M,
    HOPPER_OPTIONS,
    ROWS,
    hopper_can,
    hopper_programs,
    pointer_options,
    table_of,
    tile_for,
)
from tilewright_kernels.grouped_mm.pointers import dot_rows, rows_of_program, store_rows

EPILOGUE_REGISTERS = 112
"""A thread of the warps that do not multiply may take so many; with 104 one number is spilled.

On an H200 all that these warps do makes the product of 16384 tokens 16 % slower at hidden 2048, 64
experts, top 8 and I = 1024 (1.04 ms against 0.90), 7 % at 4096, 8, 2 and 14336. Parts of 16 rows
instead of 32 take 1 % more.
"""


@triton.jit
def expert_gate_up_grad_kernel(
    dy_ptr, w_ptr, gate_up_ptr, dgate_up_ptr, h_ptr, weights_ptr, dots_ptr, blocks_ptr, N, K,
    dy_m_stride, dy_k_stride, w_group_stride, w_k_stride, w_n_stride,
    FUNCTION: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """dgate_up [rows, 2N], w · h [rows, N] and a column of dots [rows, tiles], each where given."""
    group, rows, valid, cols = rows_of_program(blocks_ptr, N, BLOCK_M, BLOCK_N, GROUP_M)
    if tl.max(valid.to(tl.int32), axis=0) == 0:
        return
    mask = valid[:, None] & (cols < N)[None, :]
    gate_ptrs = gate_up_ptr + rows[:, None].to(tl.int64) * (2 * N) + cols[None, :]
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(ACC)
    up = tl.load(gate_ptrs + N, mask=mask, other=0.0).to(ACC)
    weights = tl.load(weights_ptr + rows, mask=valid, other=0.0).to(ACC)
    f = FUNCTION(gate)
    h = f * up
    if h_ptr is not None:
        store_rows(h_ptr, h * weights[:, None], rows, valid, cols, N, N, 1)
    if dgate_up_ptr is not None or dots_ptr is not None:
        dh = dot_rows(
            dy_ptr, w_ptr + group.to(tl.int64) * w_group_stride, rows, valid, cols, N, K,
            dy_m_stride, dy_k_stride, w_k_stride, w_n_stride, ACC, PRECISION, BLOCK_K, NUM_STAGES,
        )  # fmt: skip
        if dots_ptr is not None:
            tiles = tl.cdiv(N, BLOCK_N)
            dots = dots_ptr + rows.to(tl.int64) * tiles + tl.min(cols, axis=0) // BLOCK_N
            tl.store(dots, tl.sum(dh * h, axis=1), mask=valid)
        if dgate_up_ptr is not None:
            dh = dh * weights[:, None]
            store_rows(dgate_up_ptr, dh * up * SLOPE(gate), rows, valid, cols, N, 2 * N, 1)
            store_rows(dgate_up_ptr + N, dh * f, rows, valid, cols, N, 2 * N, 1)


def launch_gate_up_grad(
    operator: Operator, dy: Tensor, w_down: Tensor, gate_up: Tensor, dgate_up: Tensor | None,
    h: Tensor | None, weights: Tensor, wants_dots: bool, offs: Tensor, blocks: dict[int, Tensor],
    function: Any, slope: Any,
) -> Tensor | None:  # fmt: skip
    """Write the gradient of gate_up, and w · h, each where it is given; return the dots, if wanted.

    Args:
        operator: whose launch it is.
        dy: [R, K], contiguous, in the experts' order.
        w_down: [E, K, I], any strides.
        gate_up: [R, 2I], contiguous.
        dgate_up: contiguous, gate_up itself to overwrite it, or None.
        h: [R, I], contiguous, or None.
        weights: [R] of the accumulator's dtype, in the experts' order.
        wants_dots: whether dh · h is to be returned, [R, parts], the parts of a row to be added up.
        offs: [E] int32.
        blocks: tables of row blocks of offs; added to.
        function: f, a device function.
        slope: f', a device function.
    """
    (R, K), (E, _, N) = dy.shape, w_down.shape
    if R == 0 or N == 0 or E == 0:
        return dy.new_zeros(R, 1, dtype=weights.dtype) if wants_dots else None
    if is_hopper(dy.device) and dy.element_size() == 2 and w_down.stride(-1) != 1:
        w_down = w_down.contiguous()
    if K and hopper_can(dy, w_down, gate_up, dgate_up, h) and N % 8 == 0:
        from tilewright_kernels._hopper import describe
        from tilewright_kernels.moe_mlp.hopper import expert_gate_up_grad_hopper_kernel

        table = table_of(operator, blocks, offs, R, HOPPER_BLOCK_M)
        block_k = HOPPER_OPTIONS["BLOCK_K"]
        dots = weights.new_empty(R, cdiv(N, 256)) if wants_dots else None
        tiles = most_blocks(R, E, HOPPER_BLOCK_M) * cdiv(N, 256)
        operator.launch(
            expert_gate_up_grad_hopper_kernel, (hopper_programs(dy.device, tiles),),
            describe(dy, [HOPPER_BLOCK_M, block_k]), describe(w_down, [1, block_k, 256]),
            gate_up, dgate_up, h, weights, dots, table, N, K,
            FUNCTION=function, SLOPE=slope, ROWS=ROWS,
            **HOPPER_OPTIONS | {"EPILOGUE_REGISTERS": EPILOGUE_REGISTERS},
        )  # fmt: skip
        return dots
    dy, w_down, precision = operands(operator, dy, w_down)
    tile = tile_for(R, N, K, dy.element_size())
    tile = tile._replace(BLOCK_N=min(tile.BLOCK_N, 64))  # the epilogue takes registers
    table = table_of(operator, blocks, offs, R, tile.BLOCK_M)
    dots = weights.new_empty(R, cdiv(N, tile.BLOCK_N)) if wants_dots else None
    operator.launch(
        expert_gate_up_grad_kernel, (most_blocks(R, E, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N),),
        dy, w_down, gate_up, dgate_up, h, weights, dots, table, N, K,
        *dy.stride(), *w_down.stride(), FUNCTION=function, SLOPE=slope,
        **pointer_options(tile, dy.dtype, precision),
    )  # fmt: skip
    return dots
