"""Root-mean-square normalization (Zhang & Sennrich 2019, arXiv:1910.07467).

    y = x · r · w          r = 1 / sqrt(mean(x²) + eps), one number a row

With x̂ = x · r and g = dy · w the gradient is

    dx = r · (g - x̂ · mean(g · x̂))          dw = Σ_rows dy · x̂

Forward reads x and writes y; backward reads dy and x and writes dx: all else (r, w, dw) is small.
Rows of up to MAX_TILE elements stay in registers between the two uses of x. Wider rows are read
twice, the second time mostly from L2. Everything is computed in float32 (float64 for float64)
and rounded once, weight included, as torch.nn.functional.rms_norm does.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._column_sum import column_sum
from tilewright_kernels._launch import cdiv, num_programs, row_tile
from tilewright_kernels._operator import (
    Operator,
    accumulator,
    as_rows,
    check_floating,
    check_same_device,
)
from tilewright_kernels._triton import tl, triton

MAX_TILE_FORWARD = 32768
MAX_TILE_BACKWARD = 16384
"""Widest row held in registers; backward holds four tiles (dy, x, w, dw), forward two."""

_OP = Operator("rms_norm")


def rms_norm_reference(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """The definition in plain torch; arguments as `rms_norm`."""
    dims = tuple(range(-len(normalized_shape), 0))
    x = input if input.dtype == torch.float64 else input.float()
    y = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + _eps(eps, input.dtype))
    if weight is not None:
        y = y * weight
    return y.to(input.dtype)


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr,
    x_row_stride, num_rows, n_cols,
    EPS: tl.constexpr, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = x · r · w for a tile of ROWS whole rows; x once in, y once out."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < num_rows, cols < n_cols
    mask = row_mask[:, None] & col_mask[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0).to(ACC)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / n_cols + EPS)
    tl.store(rstd_ptr + rows, rstd, mask=row_mask)
    y = x * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(ACC)[None, :]
    tl.store(y_ptr + rows[:, None] * n_cols + cols[None, :], y, mask=mask)


@triton.jit
def _rms_norm_fwd_wide_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr,
    x_row_stride, n_cols,
    EPS: tl.constexpr, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same for one row wider than a tile: once over x for r, once more for y."""
    row = tl.program_id(0).to(tl.int64)
    x_row, y_row = x_ptr + row * x_row_stride, y_ptr + row * n_cols
    squares = tl.zeros([BLOCK_N], dtype=ACC)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        # Kept in L2 for the second pass; the output goes past it.
        x = tl.load(x_row + cols, mask=cols < n_cols, other=0.0, eviction_policy="evict_last").to(
            ACC
        )
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / n_cols + EPS)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < n_cols
        y = (
            tl.load(x_row + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
            * rstd
        )
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(ACC)
        tl.store(y_row + cols, y, mask=mask, eviction_policy="evict_first")


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr,
    dy_row_stride, x_row_stride, num_rows, n_cols,
    HAS_WEIGHT: tl.constexpr, NEED_DWEIGHT: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """dx for every num_programs-th tile of rows; this program's share of dw stays in registers.

    Persistent: a few programs an SM walk all rows, so that the weight is read once a program, the
    partial sums of dw are few, and the loads of the next tile are in flight during this one.
    """
    cols = tl.arange(0, BLOCK_N)
    col_mask = cols < n_cols
    weight = tl.full([BLOCK_N], 1.0, dtype=ACC)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(ACC)
    dweight = tl.zeros([ROWS, BLOCK_N], dtype=ACC)
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=NUM_STAGES
    ):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        row_mask = rows < num_rows
        mask = row_mask[:, None] & col_mask[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * dy_row_stride + cols[None, :], mask=mask, other=0.0)
        x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0).to(ACC)
        dy = dy.to(ACC)
        x_hat = x.to(ACC) * rstd[:, None]
        if NEED_DWEIGHT:
            dweight += dy * x_hat
        g = dy * weight[None, :]
        mean = tl.sum(g * x_hat, axis=1) / n_cols
        dx = (g - x_hat * mean[:, None]) * rstd[:, None]
        tl.store(dx_ptr + rows[:, None] * n_cols + cols[None, :], dx, mask=mask)
    if NEED_DWEIGHT:
        row = tl.program_id(0).to(tl.int64) * n_cols
        tl.store(partial_ptr + row + cols, tl.sum(dweight, axis=0), mask=col_mask)


@triton.jit
def _rms_norm_bwd_wide_dx_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr,
    dy_row_stride, x_row_stride, n_cols,
    HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx of one row wider than a tile: once over dy and x for mean(g · x̂), once more for dx."""
    row = tl.program_id(0).to(tl.int64)
    dy_row, x_row = dy_ptr + row * dy_row_stride, x_ptr + row * x_row_stride
    rstd = tl.load(rstd_ptr + row).to(ACC)
    products = tl.zeros([BLOCK_N], dtype=ACC)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < n_cols
        g = tl.load(dy_row + cols, mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
        x = tl.load(x_row + cols, mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(ACC)
        products += g * x
    mean = tl.sum(products, axis=0) * rstd / n_cols
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < n_cols
        g = tl.load(dy_row + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        x = tl.load(x_row + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(ACC)
        dx = (g - x * rstd * mean) * rstd
        tl.store(dx_ptr + row * n_cols + cols, dx, mask=mask, eviction_policy="evict_first")


@triton.jit
def _rms_norm_bwd_wide_dweight_kernel(
    dy_ptr, x_ptr, rstd_ptr, partial_ptr,
    dy_row_stride, x_row_stride, num_rows, n_cols,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial[p, n] = Σ dy · x̂ over every P-th tile of rows, for one block of columns."""
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < n_cols
    dweight = tl.zeros([ROWS, BLOCK_N], dtype=ACC)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        row_mask = rows < num_rows
        mask = row_mask[:, None] & col_mask[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * dy_row_stride + cols[None, :], mask=mask, other=0.0)
        x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0).to(ACC)
        dweight += dy.to(ACC) * x.to(ACC) * rstd[:, None]
    row = tl.program_id(0).to(tl.int64) * n_cols
    tl.store(partial_ptr + row + cols, tl.sum(dweight, axis=0), mask=col_mask)


def _pipeline(tile_bytes: int) -> tuple[int, int]:
    """Programs an SM and pipeline stages of the backward, for a tile of so many bytes.

    Three stages buffer six tiles (dy and x) in shared memory. Share of the copy speed on an H200,
    bfloat16, with 3 / 2 / 1 stages: 0.956 / 0.842 / 0.884 at N = 4096 (two programs an SM),
    0.956 / 0.862 / 0.889 at N = 1024 (four). At N = 16384 the buffers leave room for one program
    and nothing to hide its reductions: 0.63 with three stages, 0.84 with none.
    """
    buffers = 6 * tile_bytes
    if buffers > 128 * 1024:
        return 1, 1
    return max(1, min(4, 100 * 1024 // buffers)), 3


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, width: int, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    dweight = x.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return torch.empty_like(x, memory_format=torch.contiguous_format), dweight


@_OP.function(fake=_backward_fake)
def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, width: int, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """Launch the backward: dx like x, dweight like weight (left unset where it is not needed)."""
    dx, dweight = _backward_fake(dy, x, weight, rstd, width, need_dweight)
    if x.numel() == 0:
        return dx, dweight.zero_()
    x_rows, dy_rows = as_rows(x, width), as_rows(dy, width)
    num_rows, acc = x_rows.shape[0], accumulator(x.dtype)
    flags = {"HAS_WEIGHT": weight is not None, "ACC": acc}
    if width <= MAX_TILE_BACKWARD:
        tile = row_tile(width, elements=2048, elements_per_thread=16)
        per_sm, stages = _pipeline(tile.ROWS * tile.BLOCK_N * x.element_size())
        programs = min(cdiv(num_rows, tile.ROWS), num_programs(x.device, per_sm=per_sm))
        partial = rstd.new_empty(programs if need_dweight else 0, width)
        _OP.launch(
            _rms_norm_bwd_kernel, (programs,), dy_rows, x_rows, weight, rstd, dx, partial,
            dy_rows.stride(0), x_rows.stride(0), num_rows, width,
            NEED_DWEIGHT=need_dweight, ROWS=tile.ROWS, BLOCK_N=tile.BLOCK_N, NUM_STAGES=stages,
            num_warps=tile.num_warps, **flags,
        )  # fmt: skip
    else:
        _OP.launch(
            _rms_norm_bwd_wide_dx_kernel, (num_rows,), dy_rows, x_rows, weight, rstd, dx,
            dy_rows.stride(0), x_rows.stride(0), width, BLOCK_N=8192, num_warps=16, **flags,
        )  # fmt: skip
        partial = rstd.new_empty(min(64, cdiv(num_rows, 8)) if need_dweight else 0, width)
        _OP.launch(
            _rms_norm_bwd_wide_dweight_kernel, (len(partial), cdiv(width, 512)),
            dy_rows, x_rows, rstd, partial, dy_rows.stride(0), x_rows.stride(0), num_rows, width,
            ACC=acc, ROWS=8, BLOCK_N=512, num_warps=8,
        )  # fmt: skip
    if need_dweight:
        assert weight is not None
        dweight = column_sum(_OP, partial, weight.dtype).view(weight.shape)
    return dx, dweight


def _forward_fake(
    x: Tensor, weight: Tensor | None, width: int, eps: float
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rstd = torch.empty(x.numel() // max(width, 1), dtype=dtype, device=x.device)
    return torch.empty_like(x, memory_format=torch.contiguous_format), rstd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.width, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _grads(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None, None]:
    if dy is None:
        return None, None, None, None
    x, weight, rstd = ctx.saved_tensors
    need_dweight = weight is not None and ctx.needs_input_grad[1]
    dx, dweight = rms_norm_backward(dy, x, weight, rstd, ctx.width, need_dweight)
    return dx, dweight if need_dweight else None, None, None


@_OP.function(fake=_forward_fake, setup_context=_save, backward=_grads)
def rms_norm_forward(
    x: Tensor, weight: Tensor | None, width: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Launch the forward over rows of `width` elements: y like x, and r [rows]."""
    y, rstd = _forward_fake(x, weight, width, eps)
    if x.numel() == 0:
        return y, rstd
    rows = as_rows(x, width)
    flags = {"EPS": eps, "HAS_WEIGHT": weight is not None, "ACC": accumulator(x.dtype)}
    if width <= MAX_TILE_FORWARD:
        tile = row_tile(width, elements=2048, elements_per_thread=16)
        _OP.launch(
            _rms_norm_fwd_kernel, (cdiv(rows.shape[0], tile.ROWS),),
            rows, weight, y, rstd, rows.stride(0), rows.shape[0], width,
            ROWS=tile.ROWS, BLOCK_N=tile.BLOCK_N, num_warps=tile.num_warps, **flags,
        )  # fmt: skip
    else:
        _OP.launch(
            _rms_norm_fwd_wide_kernel, (rows.shape[0],), rows, weight, y, rstd,
            rows.stride(0), width, BLOCK_N=8192, num_warps=16, **flags,
        )  # fmt: skip
    return y, rstd


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Root-mean-square normalization over the trailing dimensions.

    y = x / sqrt(mean(x²) + eps) · weight            (Zhang & Sennrich 2019, arXiv:1910.07467)

    Args:
        input: [..., *normalized_shape] in float16, bfloat16, float32 or float64; any strides.
        normalized_shape: the trailing dimensions that the mean runs over.
        weight: of shape normalized_shape, any of these dtypes, or None.
        eps: added to the mean square; None takes the machine epsilon of input's dtype, as torch.

    Returns:
        Like input, contiguous. Differentiable once, with respect to input and weight.

    Raises:
        ValueError: shapes that do not fit, tensors on different devices.
        TypeError: input or weight is not floating point.
    """
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"input has shape {tuple(input.shape)}, which does not end in normalized_shape {shape}"
        )
    check_floating("input", input)
    if weight is not None:
        check_floating("weight", weight)
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}; it must be normalized_shape {shape}"
            )
    check_same_device(input=input, weight=weight)
    if not _OP.uses_triton(input):
        return rms_norm_reference(input, shape, weight, eps)
    if weight is not None:
        weight = weight.contiguous()
    return rms_norm_forward(input, weight, math.prod(shape), _eps(eps, input.dtype))[0]


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` with `rms_norm` inside: same arguments, same state_dict."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., *normalized_shape]."""
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


def _eps(eps: float | None, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if eps is None else eps
