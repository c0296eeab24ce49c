"""Kernels of rms_norm, add_rms_norm and layer_norm: one formula, from which each leaves terms out.

    h = x + residual                        add_rms_norm alone; otherwise h = x
    ĥ = (h - mean(h)) · r                   layer_norm alone; otherwise ĥ = h · r
    r = 1 / sqrt(mean((h - mean(h))²) + eps)
    y = ĥ · (w + offset) + b

Means run over a row. With g = dy · (w + offset) and dh' for what reaches h from elsewhere

    dh = dh' + r · (g - mean(g) - ĥ · mean(g · ĥ))
    dw = Σ_rows dy · ĥ          db = Σ_rows dy

A pointer that is None leaves its term out of the compiled kernel. Rows that fit in registers are
read once; wider ones twice, in blocks.
"""

from functools import cache
from typing import NamedTuple

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
"""Widest row held in registers; backward also holds dy and the sums of dw and db."""

WIDE_BLOCK_N = 8192
"""Elements that a program takes at a time of a row wider than that."""

FEW_TILES = 4
"""So many tiles of rows are walked by one program in the backward."""


@triton.jit
def _load_weight(weight_ptr, cols, mask, OFFSET: tl.constexpr, ACC: tl.constexpr):
    """w + offset, or 1 without a weight."""
    if weight_ptr is None:
        return tl.full(cols.shape, 1.0, dtype=ACC)
    return tl.load(weight_ptr + cols, mask=mask, other=0.0).to(ACC) + OFFSET


@triton.jit
def _convert_again(x, ACC: tl.constexpr):
    """x.to(ACC), in a way that the compiler does not see to be the value of an earlier x.to(ACC).

    What is needed before and after a sum over the row then waits in between as bfloat16, in half
    the registers. A bfloat16 is the upper half of a float32.
    """
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(ACC)


@triton.jit
def _norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    x_row_stride, residual_row_stride, num_rows, n_cols,
    EPS: tl.constexpr, OFFSET: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y (and h) of a tile of ROWS whole rows: each input once in, each output once out."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < num_rows, cols < n_cols
    mask = row_mask[:, None] & col_mask[None, :]
    out = rows[:, None] * n_cols + cols[None, :]
    h = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0)
    if residual_ptr is not None:
        residual = residual_ptr + rows[:, None] * residual_row_stride + cols[None, :]
        total = h.to(ACC) + tl.load(residual, mask=mask, other=0.0).to(ACC)
        h = total.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + out, h, mask=mask)
    centered = h.to(ACC)
    if mean_ptr is not None:
        mean = tl.sum(centered, axis=1) / n_cols
        tl.store(mean_ptr + rows, mean, mask=row_mask)
        centered = tl.where(mask, centered - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, axis=1) / n_cols + EPS)
    tl.store(rstd_ptr + rows, rstd, mask=row_mask)
    if mean_ptr is None:
        centered = _convert_again(h, ACC)
    y = centered * rstd[:, None] * _load_weight(weight_ptr, cols, col_mask, OFFSET, ACC)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(ACC)[None, :]
    tl.store(y_ptr + out, y, mask=mask)


@triton.jit
def _norm_fwd_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    x_row_stride, residual_row_stride, n_cols,
    EPS: tl.constexpr, OFFSET: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same for one row wider than a tile: once over x for mean and r, once over h for y.

    The first walk keeps the row in L2 for the second; y goes past the cache. Each lane has a mean
    and a sum of squares about it of its own (Welford 1962), put together after the walk.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_N)
    h_row = x_ptr + row * x_row_stride
    mean = tl.zeros([BLOCK_N], dtype=ACC)
    squares = tl.zeros([BLOCK_N], dtype=ACC)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + lanes
        mask = cols < n_cols
        h = tl.load(
            x_ptr + row * x_row_stride + cols, mask=mask, other=0.0, eviction_policy="evict_last"
        ).to(ACC)
        if residual_ptr is not None:
            residual = residual_ptr + row * residual_row_stride + cols
            h += tl.load(residual, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
            h = h.to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + row * n_cols + cols, h, mask=mask, eviction_policy="evict_last")
            h = h.to(ACC)
        deviation = tl.where(mask, h - mean, 0.0)
        if mean_ptr is not None:
            mean += deviation / (start // BLOCK_N + 1)
        squares += deviation * tl.where(mask, h - mean, 0.0)
    if residual_ptr is not None:
        h_row = h_ptr + row * n_cols
        tl.debug_barrier()  # h is read by other threads than wrote it
    row_mean = 0.0
    if mean_ptr is not None:
        counts = tl.cdiv(n_cols - lanes, BLOCK_N).to(ACC)
        row_mean = tl.sum(mean * counts, axis=0) / n_cols
        squares += counts * (mean - row_mean) * (mean - row_mean)
        tl.store(mean_ptr + row, row_mean)
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / n_cols + EPS)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + lanes
        mask = cols < n_cols
        h = tl.load(h_row + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        y = (h - row_mean) * rstd * _load_weight(weight_ptr, cols, mask, OFFSET, ACC)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(ACC)
        tl.store(y_ptr + row * n_cols + cols, y, mask=mask, eviction_policy="evict_first")


@triton.jit
def _normalized(h, mean_ptr, rstd, rows, mask, ACC: tl.constexpr):
    """ĥ of a tile of rows, from h in ACC."""
    if mean_ptr is not None:
        h -= tl.load(mean_ptr + rows, mask=mask, other=0.0).to(ACC)[:, None]
    return h * rstd[:, None]


@triton.jit
def _norm_bwd_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, mean_gh_ptr, mean_g_ptr,
    dx_ptr, partial_ptr,
    dy_row_stride, dh_row_stride, h_row_stride, num_rows, n_cols,
    OFFSET: tl.constexpr, SUMS: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """dx of every num_programs-th tile of rows; this program's share of dw, db stays in registers.

    Persistent: a few programs an SM walk all rows, so that the weight is read once a program, the
    partial sums are few, and the loads of the next tile are in flight during this one. A tile is
    as wide as the row, except where mean(g · ĥ) and mean(g) are given.
    """
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < n_cols
    weight = _load_weight(weight_ptr, cols, col_mask, OFFSET, ACC)[None, :]
    dweight = tl.zeros([ROWS, BLOCK_N], dtype=ACC)
    dbias = tl.zeros([ROWS, BLOCK_N], dtype=ACC)
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=NUM_STAGES
    ):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        row_mask = rows < num_rows
        mask = row_mask[:, None] & col_mask[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * dy_row_stride + cols[None, :], mask=mask, other=0.0)
        h = tl.load(h_ptr + rows[:, None] * h_row_stride + cols[None, :], mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0).to(ACC)
        if mean_gh_ptr is None:
            g = dy.to(ACC) * weight
            h_hat = _normalized(h.to(ACC), mean_ptr, rstd, rows, row_mask, ACC)
            mean_gh = tl.sum(g * h_hat, axis=1) / n_cols
            mean_g = tl.sum(g, axis=1) / n_cols
        else:
            mean_gh = tl.load(mean_gh_ptr + rows, mask=row_mask, other=0.0)
            mean_g = tl.load(mean_g_ptr + rows, mask=row_mask, other=0.0)
        dy = _convert_again(dy, ACC)
        h_hat = _normalized(_convert_again(h, ACC), mean_ptr, rstd, rows, row_mask, ACC)
        dweight += dy * h_hat
        dbias += dy
        dx = dy * weight - h_hat * mean_gh[:, None]
        if mean_ptr is not None:
            dx -= mean_g[:, None]
        dx *= rstd[:, None]
        if dh_ptr is not None:
            dh = dh_ptr + rows[:, None] * dh_row_stride + cols[None, :]
            dx += tl.load(dh, mask=mask, other=0.0).to(ACC)
        tl.store(dx_ptr + rows[:, None] * n_cols + cols[None, :], dx, mask=mask)
    if SUMS > 0:
        partial = partial_ptr + tl.program_id(0).to(tl.int64) * SUMS * n_cols + cols
        tl.store(partial, tl.sum(dweight, axis=0), mask=col_mask)
        if SUMS > 1:
            tl.store(partial + n_cols, tl.sum(dbias, axis=0), mask=col_mask)


@triton.jit
def _norm_bwd_means_kernel(
    dy_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, mean_gh_ptr, mean_g_ptr,
    dy_row_stride, h_row_stride, n_cols,
    OFFSET: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """mean(g · ĥ) and mean(g) of one row wider than a tile: what dx needs to know of its row."""
    row = tl.program_id(0).to(tl.int64)
    mean = 0.0
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row)
    sum_gh = tl.zeros([BLOCK_N], dtype=ACC)
    sum_g = tl.zeros([BLOCK_N], dtype=ACC)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < n_cols
        g = tl.load(dy_ptr + row * dy_row_stride + cols, mask=mask, other=0.0).to(ACC)
        g *= _load_weight(weight_ptr, cols, mask, OFFSET, ACC)
        h = tl.load(h_ptr + row * h_row_stride + cols, mask=mask, other=0.0).to(ACC)
        sum_gh += g * (h - mean)
        sum_g += g
    tl.store(mean_gh_ptr + row, tl.sum(sum_gh, axis=0) * tl.load(rstd_ptr + row) / n_cols)
    tl.store(mean_g_ptr + row, tl.sum(sum_g, axis=0) / n_cols)


class _BackwardTile(NamedTuple):
    """How the backward walks rows that fit in registers."""

    ROWS: int
    BLOCK_N: int
    NUM_STAGES: int
    num_warps: int
    per_sm: int


@cache
def _backward_tile(width: int, bytes_per_column: int) -> _BackwardTile:
    """Tile, pipeline stages and programs an SM.

    Args:
        width: elements in a row.
        bytes_per_column: that one element of each tensor read takes, dy, h and perhaps dh.
    """
    tile = row_tile(width, elements=2048, elements_per_thread=16)
    buffers = 2 * tile.ROWS * tile.BLOCK_N * bytes_per_column
    stages = 3 if buffers <= 200 * 1024 else 1
    per_sm = max(1, min(4, 100 * 1024 // buffers))
    return _BackwardTile(tile.ROWS, tile.BLOCK_N, stages, min(tile.num_warps, 16), per_sm)


def norm_forward(
    operator: Operator,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    width: int,
    eps: float,
    *,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
    h: Tensor | None = None,
) -> None:
    """Launch the forward: y, rstd [rows], and mean [rows] and h where they are given."""
    if x.numel() == 0:
        return
    x = as_rows(x, width)
    residual_stride = 0
    if residual is not None:
        residual = as_rows(residual, width)
        residual_stride = residual.stride(0)
    num_rows = x.shape[0]
    tensors = (x, residual, weight, bias, y, h, mean, rstd, x.stride(0), residual_stride)
    flags = {"EPS": eps, "OFFSET": weight_offset, "ACC": accumulator(x.dtype)}
    if width <= MAX_TILE_FORWARD:
        tile = row_tile(width, elements=2048, elements_per_thread=16)
        grid = (cdiv(num_rows, tile.ROWS),)
        operator.launch(
            _norm_fwd_kernel, grid, *tensors, num_rows, width, **flags, **tile._asdict()
        )
    else:
        operator.launch(
            _norm_fwd_wide_kernel, (num_rows,), *tensors, width,
            BLOCK_N=WIDE_BLOCK_N, num_warps=16, **flags,
        )  # fmt: skip


def norm_backward(
    operator: Operator,
    dy: Tensor,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dx: Tensor,
    sums: Tensor | None,
    width: int,
    *,
    weight_offset: float = 0.0,
    dh: Tensor | None = None,
) -> None:
    """Launch the backward: dx, and sums where given: [1, N] for dw, [2, N] for dw and db."""
    if h.numel() == 0:
        if sums is not None:
            sums.zero_()
        return
    h, dy = as_rows(h, width), as_rows(dy, width)
    dh_stride, bytes_per_column = 0, h.element_size() + dy.element_size()
    if dh is not None:
        dh = as_rows(dh, width)
        dh_stride, bytes_per_column = dh.stride(0), bytes_per_column + dh.element_size()
    num_rows, mean_gh, mean_g = h.shape[0], None, None
    flags = {"OFFSET": weight_offset, "ACC": accumulator(h.dtype)}
    if width <= MAX_TILE_BACKWARD:
        *tile, num_warps, per_sm = _backward_tile(width, bytes_per_column)
        programs, col_tiles = num_programs(h.device, per_sm=per_sm), 1
    else:
        mean_gh, mean_g = rstd.new_empty(num_rows), rstd.new_empty(num_rows)
        operator.launch(
            _norm_bwd_means_kernel, (num_rows,), dy, h, weight, mean, rstd, mean_gh, mean_g,
            dy.stride(0), h.stride(0), width, BLOCK_N=WIDE_BLOCK_N, num_warps=16, **flags,
        )  # fmt: skip
        tile, num_warps = (8, 512, 1), 8
        programs, col_tiles = 64, cdiv(width, 512)
    tiles = cdiv(num_rows, tile[0])
    # Few rows are walked by one program, which needs nobody to add up what it has summed.
    programs = 1 if tiles <= FEW_TILES else min(programs, tiles)
    num_sums = 0 if sums is None else sums.shape[0]
    partial = sums
    if sums is not None and programs > 1:
        partial = rstd.new_empty(programs, num_sums * width)
    operator.launch(
        _norm_bwd_kernel, (programs, col_tiles), dy, dh, h, weight, mean, rstd, mean_gh, mean_g,
        dx, partial, dy.stride(0), dh_stride, h.stride(0), num_rows, width,
        SUMS=num_sums, ROWS=tile[0], BLOCK_N=tile[1], NUM_STAGES=tile[2],
        num_warps=num_warps, **flags,
    )  # fmt: skip
    if sums is not None and partial is not None and partial is not sums:
        column_sum(operator, partial, sums.view(-1))


def check_arguments(input: Tensor, shape: tuple[int, ...], **parameters: Tensor | None) -> None:
    """Raise unless input ends in shape and each parameter has it, floating, on one device."""
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"input has shape {tuple(input.shape)}, which does not end in normalized_shape {shape}"
        )
    check_floating("input", input)
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        check_floating(name, parameter)
        if tuple(parameter.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}; it must be normalized_shape {shape}"
            )
    check_same_device(input=input, **parameters)


def default_eps(eps: float | None, dtype: torch.dtype) -> float:
    """eps, or the machine epsilon of dtype where it is None, as torch.nn.functional.rms_norm."""
    return torch.finfo(dtype).eps if eps is None else eps
