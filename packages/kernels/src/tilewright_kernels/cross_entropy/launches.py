"""How cross_entropy's kernels are launched: tiles, registration with torch.library, the gradient.

A loss is one launch, a mean or a sum two (the second adds one number a program of the first), and
a backward one, which reads the mean's divisor and the gradient of the loss from the device.
"""

import inspect
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv, next_power_of_2, row_tile
from tilewright_kernels._operator import Operator, _autograd_function, accumulator, as_rows
from tilewright_kernels.cross_entropy.kernels import (
    cross_entropy_bwd_kernel,
    cross_entropy_fwd_kernel,
    cross_entropy_reduce_kernel,
)

FORWARD_TILE, FORWARD_STAGES = 4096, 1
"""Forward walks a row by TILE columns, 32 a thread, with STAGES tiles of loads in flight."""

BACKWARD_TILE = 4096
"""Columns of a program of backward; programs are independent, as in an element-wise kernel.

16 elements a thread, 28 registers, 8 programs a multiprocessor. Measured on an H200: 97 % of copy_.
"""

REDUCE_BLOCK = 4096
"""Sums that the one program of the reduction takes at a time, 4 a thread."""

OP = Operator("cross_entropy")


class ForwardTile(NamedTuple):
    """A tile of forward: ROWS x LANES x UNROLL x VEC elements, all powers of two."""

    ROWS: int
    LANES: int
    UNROLL: int
    VEC: int
    num_warps: int


@cache
def forward_tile(num_rows: int, width: int, vector: int) -> ForwardTile:
    """Tile over [num_rows, width] whose rows may be loaded by `vector` elements at once."""
    block = min(FORWARD_TILE, next_power_of_2(width))
    vector = min(vector, block)
    unroll = min(32 // vector, block // vector)
    rows = FORWARD_TILE // block
    lanes = block // (unroll * vector)
    return ForwardTile(rows, lanes, unroll, vector, max(1, min(4, rows * lanes // 32)))


def _vector(x_rows: Tensor) -> int:
    """Elements that one load takes: 16 bytes of them where Triton sees that rows are aligned."""
    aligned = x_rows.data_ptr() % 16 == 0 and x_rows.stride(0) % 16 == 0
    return 16 // x_rows.element_size() if aligned else 1


def _launch_backward(
    dx_rows: Tensor, dloss: Tensor | None, dlse: Tensor | None, x: Tensor, target: Tensor,
    weight: Tensor | None, stats: Tensor, divisor: Tensor, reduction: str,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
) -> None:  # fmt: skip
    """Write the gradient of x into dx_rows [N, V], which may be x's own memory."""
    width = x.shape[-1]
    x_rows, targets = as_rows(x, width), target.reshape(-1)
    if dloss is None:
        dloss = stats.new_zeros(())
    dlosses = dloss.expand(target.shape).reshape(-1)
    dlses = None if dlse is None else dlse.reshape(-1)
    tile = row_tile(min(width, BACKWARD_TILE), elements=BACKWARD_TILE, elements_per_thread=16)
    OP.launch(
        cross_entropy_bwd_kernel, (cdiv(len(x_rows), tile.ROWS) * cdiv(width, tile.BLOCK_N),),
        dlosses, dlses, divisor, x_rows, targets, weight, stats, dx_rows,
        dlosses.stride(0), 0 if dlses is None else dlses.stride(0), x_rows.stride(0),
        dx_rows.stride(0), targets.stride(0), len(x_rows), width, ignore_index,
        SMOOTHING=label_smoothing, SOFTCAP=softcap, HAS_WEIGHT=weight is not None,
        HAS_SLOPE=label_smoothing != 0 or z_loss != 0, HAS_DLSE=dlses is not None,
        MEAN=reduction == "mean", ACC=accumulator(x.dtype), ROWS=tile.ROWS, BLOCK_N=tile.BLOCK_N,
        num_warps=tile.num_warps,
    )  # fmt: skip


def _backward_fake(
    dloss: Tensor | None, dlse: Tensor | None, x: Tensor, target: Tensor,
    weight: Tensor | None, stats: Tensor, divisor: Tensor, reduction: str,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@OP.function(fake=_backward_fake)
def cross_entropy_backward(
    dloss: Tensor | None, dlse: Tensor | None, x: Tensor, target: Tensor,
    weight: Tensor | None, stats: Tensor, divisor: Tensor, reduction: str,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    """Launch the backward: dx [..., V] like x from the gradients of the loss and of each lse."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    options = (reduction, ignore_index, label_smoothing, z_loss, softcap)
    rows = as_rows(dx, x.shape[-1])
    _launch_backward(rows, dloss, dlse, x, target, weight, stats, divisor, *options)
    return dx


def _forward_fake(
    x: Tensor, target: Tensor, weight: Tensor | None, return_lse: bool, reduction: str,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    stats = torch.empty(target.numel(), 4, dtype=dtype, device=x.device)
    loss = stats.new_empty(target.shape if reduction == "none" else ())
    lse = stats.new_empty(target.shape if return_lse else (0,))
    return loss, lse, stats, stats.new_empty(() if reduction == "mean" else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, target, weight, ctx.return_lse, *ctx.options = inputs
    stats, divisor = output[2:]
    ctx.mark_non_differentiable(stats, divisor)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, target, weight, stats, divisor)


def _grads(ctx: Any, dloss: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Any, ...]:
    dlse = dlse if ctx.return_lse else None
    dx = None
    if dloss is not None or dlse is not None:
        dx = cross_entropy_backward(dloss, dlse, *ctx.saved_tensors, *ctx.options)
    return dx, *[None] * 8


def _grads_in_place(
    ctx: Any, dloss: Tensor | None, dlse: Tensor | None, *_: None
) -> tuple[Any, ...]:
    """The same into the logits, whose version counter says so to whoever else saved them."""
    dlse = dlse if ctx.return_lse else None
    dx = None
    if dloss is not None or dlse is not None:
        x, *others = ctx.saved_tensors
        dx = x.detach()
        _launch_backward(as_rows(dx, x.shape[-1]), dloss, dlse, x, *others, *ctx.options)
        torch.autograd.graph.increment_version(dx)
    return dx, *[None] * 8


@OP.function(fake=_forward_fake, setup_context=_save, backward=_grads)
def cross_entropy_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, return_lse: bool, reduction: str,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the forward: loss [...] or 0-d, lse [...], and for backward stats and divisor.

    lse is empty where it is not asked for, and so is the divisor where there is no mean.
    """
    options = (reduction, ignore_index, label_smoothing, z_loss, softcap)
    loss, lse, stats, divisor = _forward_fake(x, target, weight, return_lse, *options)
    width = x.shape[-1]
    x_rows, targets = as_rows(x, width), target.reshape(-1)
    tile = forward_tile(len(x_rows), width, _vector(x_rows))
    programs = cdiv(len(x_rows), tile.ROWS)
    reduced = reduction != "none"
    losses = stats.new_empty(2, programs) if reduced else loss
    smoothed = weight is not None and label_smoothing != 0
    weight_sum = weight.sum(dtype=stats.dtype) if smoothed else None
    OP.launch(
        cross_entropy_fwd_kernel, (programs,),
        x_rows, targets, weight, weight_sum, losses, lse, stats,
        x_rows.stride(0), targets.stride(0), len(x_rows), width, ignore_index,
        SMOOTHING=label_smoothing, Z_LOSS=z_loss, SOFTCAP=softcap, HAS_WEIGHT=weight is not None,
        HAS_LSE=return_lse, REDUCED=reduced, ACC=accumulator(x.dtype),
        LOWEST=torch.finfo(stats.dtype).min, ROWS=tile.ROWS, LANES=tile.LANES, UNROLL=tile.UNROLL,
        VEC=tile.VEC, STAGES=FORWARD_STAGES, num_warps=tile.num_warps,
    )  # fmt: skip
    if reduced:
        block = min(REDUCE_BLOCK, next_power_of_2(max(programs, 1)))
        OP.launch(
            cross_entropy_reduce_kernel, (1,), losses, loss, divisor, programs,
            MEAN=reduction == "mean", ACC=accumulator(x.dtype), BLOCK=block,
            num_warps=max(1, min(32, block // 128)),
        )  # fmt: skip
    return loss, lse, stats, divisor


cross_entropy_in_place = _autograd_function(
    OP.name, inspect.unwrap(cross_entropy_forward), _save, _grads_in_place
)
"""The forward whose backward writes over the logits."""
