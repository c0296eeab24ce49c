"""What rms_norm, add_rms_norm and layer_norm share beside kernels: launches, sizes, checks."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._column_sum import column_sum
from tilewright_kernels._launch import cdiv, num_programs, row_tile
from tilewright_kernels._norm_kernels import (
    norm_bwd_kernel,
    norm_bwd_means_kernel,
    norm_fwd_kernel,
    norm_fwd_wide_kernel,
)
from tilewright_kernels._operator import (
    Operator,
    accumulator,
    as_rows,
    check_floating,
    check_same_device,
)

MAX_TILE_FORWARD = 32768
MAX_TILE_BACKWARD = 16384
"""Widest row held in registers; backward also holds dy and the sums of dw and db."""

WIDE_BLOCK_N = 8192
"""Elements that a program takes at a time of a row wider than that."""

WIDE_TILE = {"ROWS": 1, "BLOCK_N": 2048, "FULL": False, "NUM_STAGES": 3, "num_warps": 4}
"""Of the backward along columns, at 0.95 of the copy speed; with tiles of 4 x 512, at 0.83."""

FEW_TILES = 4
"""So many tiles of rows are walked by one program in the backward."""


@cache
def _forward_tile(width: int, bytes_per_element: int) -> dict[str, Any]:
    """Tile of the forward for rows that fit in registers; narrow rows share 2048 elements.

    At N = 16384 two programs of 16 warps an SM, if 64 registers a thread suffice them, take turns
    loading and adding. Share of the copy speed on an H200, bfloat16, rms_norm / add_rms_norm /
    layer_norm: 0.97 / 0.96 / 0.91 there, 0.97 / 0.96 / 0.95 at N = 4096 with 8 warps, and for
    layer_norm with 16 warps 0.80. What layer_norm lacks at 16384: of its two sums, two programs
    an SM hide one.
    """
    large = width > 4096 and bytes_per_element == 2
    tile = row_tile(width, elements=2048, elements_per_thread=32 if large else 16)
    return tile._asdict() | {
        "FULL": width == tile.BLOCK_N,
        "maxnreg": 64 if large else None,
    }


@cache
def _backward_tile(width: int, bytes_per_column: int) -> tuple[dict[str, Any], int]:
    """Tile and pipeline of the backward for rows that fit in registers, and its programs an SM.

    Three stages hold two tiles of each tensor in shared memory. Share of the copy speed on an
    H200, bfloat16, with 3 / 2 / 1 stages: 0.98 / 0.84 / 0.88 at N = 4096, 0.95 / 0.75 / 0.92 at
    16384. Four programs of 8 warps at N = 4096: 0.90, two: 0.98. Up to 1024 elements one warp
    needs no barrier for its sums: layer_norm at N = 768 runs at 0.99, with four warps at 0.84.

    Args:
        width: elements in a row.
        bytes_per_column: that one element of dy, h and perhaps dh takes.
    """
    small = width <= 1024
    elements = 1024 if small else 2048
    tile = row_tile(width, elements=elements, elements_per_thread=32 if small else 16)
    num_warps = min(16, tile.num_warps)
    buffers = 2 * tile.ROWS * tile.BLOCK_N * bytes_per_column
    config = tile._asdict() | {
        "FULL": width > 4096 and width == tile.BLOCK_N,
        "NUM_STAGES": 3 if buffers <= 200 * 1024 else 1,
        "num_warps": num_warps,
    }
    return config, min(6, 16 // num_warps)


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
    formula = {
        "EPS": eps,
        "OFFSET": 0.0 if weight is None else weight_offset,
        "ACC": accumulator(x.dtype),
    }
    if width <= MAX_TILE_FORWARD:
        tile = _forward_tile(width, x.element_size())
        grid = (cdiv(num_rows, tile["ROWS"]),)
        operator.launch(norm_fwd_kernel, grid, *tensors, num_rows, width, **formula, **tile)
    else:
        operator.launch(
            norm_fwd_wide_kernel, (num_rows,), *tensors, width,
            **formula, BLOCK_N=WIDE_BLOCK_N, num_warps=32,
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
    num_rows, mean_gh, mean_g, col_tiles = h.shape[0], None, None, 1
    formula = {"OFFSET": 0.0 if weight is None else weight_offset, "ACC": accumulator(h.dtype)}
    if width <= MAX_TILE_BACKWARD:
        tile, per_sm = _backward_tile(width, bytes_per_column)
    else:
        mean_gh, mean_g = torch.empty_like(rstd), None if mean is None else torch.empty_like(rstd)
        operator.launch(
            norm_bwd_means_kernel, (num_rows,), dy, h, weight, mean, rstd, mean_gh, mean_g,
            dy.stride(0), h.stride(0), width,
            **formula, BLOCK_N=WIDE_BLOCK_N // 2, num_warps=8,
        )  # fmt: skip
        tile, per_sm = WIDE_TILE, 4
        col_tiles = cdiv(width, tile["BLOCK_N"])
    row_tiles = cdiv(num_rows, tile["ROWS"])
    programs = 1
    if row_tiles > FEW_TILES:  # else one program's sums are the gradient, and one launch does it
        programs = min(row_tiles, cdiv(num_programs(h.device, per_sm=per_sm), col_tiles))
    num_sums = 0 if sums is None else sums.shape[0]
    partial = sums
    if sums is not None and programs > 1:
        partial = rstd.new_empty(programs, num_sums * width)
    operator.launch(
        norm_bwd_kernel, (programs, col_tiles), dy, dh, h, weight, mean, rstd, mean_gh, mean_g,
        dx, partial, dy.stride(0), dh_stride, h.stride(0), num_rows, width,
        **formula, SUMS=num_sums, **tile,
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
