"""The forward kernel: the tokens of an expert times its first matrix, and the gated unit of both.

    gate = x[t] · Wg[e]ᵀ          up = x[t] · Wu[e]ᵀ          h = f(gate) · up

Token t of a row is looked up where it is read, so that no row is copied. Not so on Hopper, whose
accelerator cannot gather rows: there a kernel copies them, one read and k writes of a token, and
the product runs at the speed of one without a gather. With two warps that gather by cp.async into
the same buffers instead, and two that write (H200, bfloat16, 16384 tokens):

    hidden, experts, k, I      copy and product      gathered in the product
    2048, 64, 8, 1024          1.89 ms               1.99 ms
    4096, 8, 2, 14336          11.9                  13.7
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
    with_rows,
)
from tilewright_kernels.grouped_mm.pointers import dot_rows, rows_of_program, store_rows
from tilewright_kernels.moe_route.rows import launch_permute


@triton.jit
def expert_gate_up_kernel(
    x_ptr, w_ptr, h_ptr, gate_up_ptr, permutation_ptr, blocks_ptr, N, K,
    x_t_stride, x_k_stride, w_group_stride, w_n_stride, w_k_stride,
    FUNCTION: tl.constexpr, TOP_K: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """h [rows, N] and gate_up [rows, 2N], each where it is given; a tile of both a program."""
    group, rows, valid, cols = rows_of_program(blocks_ptr, N, BLOCK_M, BLOCK_N, GROUP_M)
    if tl.max(valid.to(tl.int32), axis=0) == 0:
        return
    tokens = tl.load(permutation_ptr + rows, mask=valid, other=0) // TOP_K
    dtype = x_ptr.dtype.element_ty
    w_ptr += group.to(tl.int64) * w_group_stride
    gate = dot_rows(
        x_ptr, w_ptr, tokens, valid, cols, N, K, x_t_stride, x_k_stride, w_k_stride, w_n_stride,
        ACC, PRECISION, BLOCK_K, NUM_STAGES,
    ).to(dtype).to(ACC)  # fmt: skip
    up = dot_rows(
        x_ptr, w_ptr + tl.cast(N, tl.int64) * w_n_stride, tokens, valid, cols, N, K,
        x_t_stride, x_k_stride, w_k_stride, w_n_stride, ACC, PRECISION, BLOCK_K, NUM_STAGES,
    ).to(dtype).to(ACC)  # fmt: skip
    if gate_up_ptr is not None:
        store_rows(gate_up_ptr, gate, rows, valid, cols, N, 2 * N, 1)
        store_rows(gate_up_ptr + N, up, rows, valid, cols, N, 2 * N, 1)
    if h_ptr is not None:
        store_rows(h_ptr, FUNCTION(gate) * up, rows, valid, cols, N, N, 1)


def launch_gate_up(
    operator: Operator, x: Tensor, w_gate_up: Tensor, h: Tensor | None, gate_up: Tensor | None,
    permutation: Tensor, inverse: Tensor, offs: Tensor, blocks: dict[int, Tensor], function: Any,
) -> None:  # fmt: skip
    """Write h [R, I] and gate_up [R, 2I], each where it is given.

    Args:
        operator: whose launch it is.
        x: [T, K], any strides.
        w_gate_up: [E, 2I, K], any strides.
        h: contiguous, or None.
        gate_up: contiguous, or None.
        permutation: [R] int32, of which row // k is the token.
        inverse: [R] int32.
        offs: [E] int32.
        blocks: tables of row blocks of offs; added to.
        function: f, a device function.
    """
    (T, K), (E, double, _) = x.shape, w_gate_up.shape
    R, N = permutation.shape[0], double // 2
    if R == 0 or N == 0 or E == 0:
        return
    top_k = R // T
    if is_hopper(x.device) and x.element_size() == 2:
        x, w_gate_up = with_rows(x), w_gate_up.contiguous()
    if K and hopper_can(x, w_gate_up, h, gate_up) and N % 8 == 0:
        # Imported here: Gluon is there where Triton is, and this file must not need it.
        from tilewright_kernels._hopper import describe
        from tilewright_kernels.moe_mlp.hopper import expert_gate_up_hopper_kernel

        table = table_of(operator, blocks, offs, R, HOPPER_BLOCK_M)
        gate, up = (None, None) if gate_up is None else gate_up.chunk(2, dim=1)
        kept = [describe(t, [HOPPER_BLOCK_M, 64]) for t in (gate, up)]
        block = [HOPPER_BLOCK_M, HOPPER_OPTIONS["BLOCK_K"]]
        weights = describe(w_gate_up.flatten(0, 1), block)
        programs = hopper_programs(x.device, most_blocks(R, E, HOPPER_BLOCK_M) * cdiv(N, 128))
        x_rows = launch_permute(operator, x, inverse, top_k)
        operator.launch(
            expert_gate_up_hopper_kernel, (programs,),
            describe(x_rows, block), weights, h, gate_up, *kept, table, N, K,
            FUNCTION=function, ROWS=ROWS, **HOPPER_OPTIONS,
        )  # fmt: skip
        return
    x, w_gate_up, precision = operands(operator, x, w_gate_up)
    tile = tile_for(R, N, K, x.element_size())
    tile = tile._replace(BLOCK_N=min(tile.BLOCK_N, 64))  # two sums are in registers
    table = table_of(operator, blocks, offs, R, tile.BLOCK_M)
    operator.launch(
        expert_gate_up_kernel, (most_blocks(R, E, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N),),
        x, w_gate_up, h, gate_up, permutation, table, N, K, *x.stride(), *w_gate_up.stride(),
        FUNCTION=function, TOP_K=top_k, **pointer_options(tile, x.dtype, precision),
    )  # fmt: skip
