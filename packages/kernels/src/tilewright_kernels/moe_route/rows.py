"""Rows to the order of experts and back, as operators of their own.

    rows[r] = x[token of r]          y[t] = Σ_j w[t, j] · rows[row of (t, j)]

With the gradients drows and dy

    dx[t] = Σ_j drows[row of (t, j)]
    drows[row of (t, j)] = w[t, j] · dy[t]          dw[t, j] = dy[t] · rows[row of (t, j)]

so the gradient of the first is the second without weights, and without weights the reverse. A
program has one token: it reads x[t] or dy[t] once for its k rows, or adds k rows in the order of
its choices, in float32. No atomics: two runs give the same bits. With T tokens of width N and s
bytes a number the first moves (k + 1)·T·N·s, the second as much, its gradient (2k + 1)·T·N·s.
"""

from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._launch import next_power_of_2
from tilewright_kernels._operator import Operator, accumulator, as_rows
from tilewright_kernels._triton import tl, triton

BLOCK_N = 2048
"""Columns that a program holds at a time, at most."""

PERMUTE, COMBINE = Operator("moe_permute"), Operator("moe_combine")


def permute_reference(x: Tensor, indices: Tensor, k: int) -> Tensor:
    """[T·k, N] from x [T, N], in plain torch."""
    return x[indices // k]


def combine_reference(rows: Tensor, weights: Tensor | None, inverse: Tensor, k: int) -> Tensor:
    """[T, N] from rows [T·k, N] and weights [T, k], in plain torch."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    chosen = wide[inverse].unflatten(0, (-1, k))
    if weights is not None:
        chosen = chosen * weights[..., None].to(wide.dtype)
    return chosen.sum(1).to(rows.dtype)


@triton.jit
def _permute_kernel(
    x_ptr, inverse_ptr, rows_ptr, x_row_stride, n_cols, K: tl.constexpr, BLOCK_N: tl.constexpr
):
    """x[t] to its k rows; one read, k writes."""
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + token * x_row_stride + cols, mask=cols < n_cols)
        for j in tl.range(0, K, loop_unroll_factor=min(K, 8)):
            row = tl.load(inverse_ptr + token * K + j).to(tl.int64)
            tl.store(rows_ptr + row * n_cols + cols, x, mask=cols < n_cols)


@triton.jit
def _combine_kernel(
    rows_ptr, weights_ptr, inverse_ptr, y_ptr, rows_stride, n_cols,
    K: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[t], the sum of k rows, weighted where there are weights; k reads, one write."""
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_N], dtype=ACC)
        for j in tl.range(0, K, loop_unroll_factor=min(K, 8)):
            row = tl.load(inverse_ptr + token * K + j).to(tl.int64)
            x = tl.load(rows_ptr + row * rows_stride + cols, mask=cols < n_cols).to(ACC)
            if weights_ptr is not None:
                x *= tl.load(weights_ptr + token * K + j).to(ACC)
            total += x
        tl.store(y_ptr + token * n_cols + cols, total, mask=cols < n_cols)


@triton.jit
def _combine_bwd_kernel(
    dy_ptr, rows_ptr, weights_ptr, inverse_ptr, drows_ptr, dweights_ptr,
    dy_stride, rows_stride, n_cols,
    K: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """drows and dw of one token; dy[t] and k rows in, k rows out."""
    token = tl.program_id(0).to(tl.int64)
    for j in range(K):
        row = tl.load(inverse_ptr + token * K + j).to(tl.int64)
        weight = tl.load(weights_ptr + token * K + j).to(ACC)
        products = tl.zeros([BLOCK_N], dtype=ACC)
        for start in range(0, n_cols, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            dy = tl.load(dy_ptr + token * dy_stride + cols, mask=cols < n_cols, other=0.0).to(ACC)
            x = tl.load(rows_ptr + row * rows_stride + cols, mask=cols < n_cols, other=0.0)
            products += dy * x.to(ACC)
            tl.store(drows_ptr + row * n_cols + cols, dy * weight, mask=cols < n_cols)
        tl.store(dweights_ptr + token * K + j, tl.sum(products))


def _tile(width: int) -> dict[str, int]:
    block = min(BLOCK_N, next_power_of_2(max(width, 1)))
    return {"BLOCK_N": block, "num_warps": max(1, min(4, block // 256))}


def launch_permute(operator: Operator, x: Tensor, inverse: Tensor, k: int) -> Tensor:
    """rows [T·k, N] of x [T, N], for an operator of any name."""
    width = x.shape[1]
    rows, x = x.new_empty(len(inverse), width), as_rows(x, width)
    if rows.numel():
        operator.launch(
            _permute_kernel, (len(x),), x, inverse, rows, x.stride(0), width, K=k, **_tile(width)
        )
    return rows


def launch_combine(
    operator: Operator, rows: Tensor, weights: Tensor | None, inverse: Tensor, k: int,
    y: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y [T, N] of rows [T·k, N], for an operator of any name; y contiguous, where it is given."""
    width = rows.shape[1]
    rows = as_rows(rows, width)
    if y is None:
        y = rows.new_empty(len(inverse) // k, width)
    if y.numel():
        operator.launch(
            _combine_kernel, (len(y),), rows, None if weights is None else weights.contiguous(),
            inverse, y, rows.stride(0), width, K=k, ACC=accumulator(rows.dtype), **_tile(width),
        )  # fmt: skip
    return y


def _permute_fake(x: Tensor, inverse: Tensor, k: int) -> Tensor:
    return x.new_empty(inverse.shape[0], x.shape[1])


@PERMUTE.function(fake=lambda drows, inverse, k: _combine_fake(drows, None, inverse, k))
def moe_permute_backward(drows: Tensor, inverse: Tensor, k: int) -> Tensor:
    """Launch the backward: dx [T, N]."""
    return launch_combine(PERMUTE, drows, None, inverse, k)


def _save_permute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, inverse, ctx.k = inputs
    ctx.save_for_backward(inverse)


def _permute_grads(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
    return moe_permute_backward(drows, *ctx.saved_tensors, ctx.k), None, None


@PERMUTE.function(fake=_permute_fake, setup_context=_save_permute, backward=_permute_grads)
def moe_permute_forward(x: Tensor, inverse: Tensor, k: int) -> Tensor:
    """Launch the forward: rows [T·k, N] from x [T, N]."""
    return launch_permute(PERMUTE, x, inverse, k)


def _combine_fake(rows: Tensor, weights: Tensor | None, inverse: Tensor, k: int) -> Tensor:
    return rows.new_empty(inverse.shape[0] // k, rows.shape[1])


def _combine_backward_fake(
    dy: Tensor, rows: Tensor | None, weights: Tensor | None, inverse: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    drows = dy.new_empty(inverse.shape[0], dy.shape[1])
    return drows, dy.new_empty(0) if weights is None else torch.empty_like(weights).contiguous()


@COMBINE.function(fake=_combine_backward_fake)
def moe_combine_backward(
    dy: Tensor, rows: Tensor | None, weights: Tensor | None, inverse: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Launch the backward: drows [T·k, N] and dweights [T, k], empty where there are no weights."""
    drows, dweights = _combine_backward_fake(dy, rows, weights, inverse, k)
    if weights is None or rows is None:
        return launch_permute(COMBINE, dy, inverse, k), dweights
    width = dy.shape[1]
    if drows.numel() == 0:
        return drows, dweights.zero_()
    dy, rows = as_rows(dy, width), as_rows(rows, width)
    COMBINE.launch(
        _combine_bwd_kernel, (len(dy),), dy, rows, weights.contiguous(), inverse, drows, dweights,
        dy.stride(0), rows.stride(0), width, K=k, ACC=accumulator(dy.dtype), **_tile(width),
    )  # fmt: skip
    return drows, dweights


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, inverse, ctx.k = inputs
    ctx.save_for_backward(None if weights is None else rows, weights, inverse)


def _combine_grads(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    drows, dweights = moe_combine_backward(dy, *ctx.saved_tensors, ctx.k)
    return drows, dweights if ctx.needs_input_grad[1] else None, None, None


@COMBINE.function(fake=_combine_fake, setup_context=_save_combine, backward=_combine_grads)
def moe_combine_forward(rows: Tensor, weights: Tensor | None, inverse: Tensor, k: int) -> Tensor:
    """Launch the forward: y [T, N] from rows [T·k, N] and weights [T, k]."""
    return launch_combine(COMBINE, rows, weights, inverse, k)
