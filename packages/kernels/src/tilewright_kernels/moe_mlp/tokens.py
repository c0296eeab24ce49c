"""Between tokens and the rows of experts: there, and back with weights.

Token t has k rows, inverse[t·k] to inverse[t·k + k - 1]. There: every row is a copy of its token,
read once and written k times. Back: y[t] = Σⱼ w[t, j] · rows[inverse[t·k + j]], in the order of j
and without atomics, so that bits repeat.
"""

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv, next_power_of_2
from tilewright_kernels._operator import Operator, accumulator
from tilewright_kernels._triton import tl, triton

MOST_COLUMNS = 1024
"""Numbers of a token that one program moves, 8 a thread."""


@triton.jit
def tokens_to_rows_kernel(
    x_ptr, rows_ptr, inverse_ptr, weights_ptr, row_weights_ptr, N, x_t_stride, x_n_stride,
    TOP_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """rows[inverse[t · k + j]] = x[t], row_weights likewise where asked; (1 + k) · N numbers."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + token * x_t_stride + cols.to(tl.int64) * x_n_stride, mask=cols < N)
    for j in tl.static_range(TOP_K):
        row = tl.load(inverse_ptr + token * TOP_K + j).to(tl.int64)
        tl.store(rows_ptr + row * N + cols, x, mask=cols < N)
        if row_weights_ptr is not None:  # noqa: SIM102 - known to the compiler, unlike the next
            if tl.program_id(1) == 0:
                weight = tl.load(weights_ptr + token * TOP_K + j)
                tl.store(row_weights_ptr + row, weight.to(row_weights_ptr.dtype.element_ty))


@triton.jit
def rows_to_tokens_kernel(
    rows_ptr, y_ptr, inverse_ptr, weights_ptr, N,
    ACC: tl.constexpr, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[t] = Σⱼ w[t, j] · rows[inverse[t · k + j]], weights 1 where None; (k + 1) · N numbers."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.zeros((BLOCK_N,), dtype=ACC)
    for j in tl.static_range(TOP_K):
        row = tl.load(inverse_ptr + token * TOP_K + j).to(tl.int64)
        value = tl.load(rows_ptr + row * N + cols, mask=cols < N, other=0.0).to(ACC)
        if weights_ptr is not None:
            value *= tl.load(weights_ptr + token * TOP_K + j).to(ACC)
        y += value
    tl.store(y_ptr + token * N + cols, y.to(y_ptr.dtype.element_ty), mask=cols < N)


@triton.jit
def weight_grads_kernel(
    dots_ptr, dweights_ptr, inverse_ptr, assignments, parts,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dweights[a] = Σ dots[inverse[a]], the parts of a row in their order."""
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(inverse_ptr + own, mask=own < assignments, other=0).to(tl.int64)
    cols = tl.arange(0, PARTS)
    mask = (own < assignments)[:, None] & (cols < parts)[None, :]
    dots = tl.load(dots_ptr + rows[:, None] * parts + cols[None, :], mask=mask, other=0.0)
    dweights = tl.sum(dots, axis=1).to(dweights_ptr.dtype.element_ty)
    tl.store(dweights_ptr + own, dweights, mask=own < assignments)


def tokens_to_rows(
    operator: Operator, x: Tensor, inverse: Tensor, top_k: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """x [T, N] as rows [T · k, N] in the experts' order, and weights [T, k] as [T · k] likewise."""
    T, N = x.shape
    rows = x.new_empty(T * top_k, N)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    row_weights = None if weights is None else x.new_empty(T * top_k, dtype=wide)
    block = min(MOST_COLUMNS, next_power_of_2(max(N, 1)))
    operator.launch(
        tokens_to_rows_kernel, (T, cdiv(N, block)),
        x, rows, inverse, weights, row_weights, N, *x.stride(), TOP_K=top_k, BLOCK_N=block,
    )  # fmt: skip
    return rows, row_weights


def rows_to_tokens(
    operator: Operator, rows: Tensor, y: Tensor, inverse: Tensor, top_k: int,
    weights: Tensor | None = None,
) -> None:  # fmt: skip
    """y [T, N] of rows [T · k, N], both contiguous, weighted by weights [T, k] where given."""
    T, N = y.shape
    block = min(MOST_COLUMNS, next_power_of_2(max(N, 1)))
    operator.launch(
        rows_to_tokens_kernel, (T, cdiv(N, block)),
        rows, y, inverse, weights, N, ACC=accumulator(y.dtype), TOP_K=top_k, BLOCK_N=block,
    )  # fmt: skip


def weight_grads(operator: Operator, dots: Tensor, dweights: Tensor, inverse: Tensor) -> None:
    """dweights [T, k] of dots [T · k, parts]."""
    assignments, parts = dots.shape
    columns = next_power_of_2(parts)
    block = max(1, min(64, 4096 // columns))
    operator.launch(
        weight_grads_kernel, (cdiv(assignments, block),),
        dots, dweights, inverse, assignments, parts, BLOCK=block, PARTS=columns,
    )  # fmt: skip
