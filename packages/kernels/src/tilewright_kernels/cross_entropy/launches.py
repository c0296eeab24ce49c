"""How cross_entropy's kernels are launched: tiles, registration with torch.library, the gradient.

A loss is one launch, a mean or a sum two (the second adds one number a program of the first), and
a backward one, which reads the mean's scale and the gradient of the loss from the device.
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

LANES, COLUMNS = 128, 128
"""Forward gives a row to as many lanes as take 128 columns each, but to no more than 128.

Shares of copy_'s bandwidth on an H200, bfloat16: 1.05 at V = 32768 (256 lanes 1.03, 16 elements a
thread 1.05 and 32 1.03), 1.04 at 131072 (1.07 with 256), 0.93 at 8192, 0.91 at 4096 (0.54 with 128
lanes), 0.83 at 1024. Pipelined through shared memory, in two or three stages: 0.35 to 0.53.
"""

THREADS = 2**16
"""Where that would leave the device idle, a row gets more lanes, of fewer columns.

256 rows of 32768 take 8.6 µs with 256 lanes and 13.9 with 1024, 32 of 131072 11.0 with 512 and 18.6
with 128 (H200, bfloat16).
"""

BACKWARD_TILE = 2048
"""Columns of a program of backward; twice as many elements where rows are no wider than that.

16 elements a thread, 32 registers. On an H200, bfloat16, shares of copy_'s bandwidth: 0.99 at
V = 32768 and 131072 (0.98 with tiles of 4096, 0.86 with 8 elements a thread), 1.0 at 4096 and 1024.
"""

REDUCE_BLOCK = 4096
"""Sums that its one program takes at a time, 4 a thread: 16384 in 2.7 µs on an H200."""

OP = Operator("cross_entropy")


class ForwardTile(NamedTuple):
    """A tile of forward: ROWS x LANES x UNROLL x VEC elements, all powers of two."""

    ROWS: int
    LANES: int
    UNROLL: int
    VEC: int
    num_warps: int


@cache
def forward_tile(num_rows: int, width: int, vector: int, even: bool) -> ForwardTile:
    """Tile over [num_rows, width].

    Args:
        num_rows: how many there are.
        width: columns.
        vector: elements of a load of 16 bytes, or 1 if the first row is not aligned to them.
        even: whether every row is, and ends so; else only one row a program has loads so wide.
    """
    block = next_power_of_2(width)
    vector = min(vector, block)
    lanes = max(1, min(LANES, block // COLUMNS))
    while num_rows * lanes < THREADS and lanes < 512:
        lanes *= 2
    lanes = min(lanes, block // vector)
    if lanes < 32 and not even:
        vector = 1
    # Neighbours load at least 16 columns side by side.
    lanes = max(lanes, min(16, block) // vector)
    unroll = min(16 if lanes == LANES else 32, block // lanes) // vector
    return ForwardTile(max(1, 32 // lanes), lanes, unroll, vector, max(1, lanes // 32))


def _alignment(rows: Tensor) -> tuple[int, bool]:
    """What `forward_tile` asks for: elements of a load of 16 bytes, and whether rows are even."""
    size = rows.element_size()
    if rows.data_ptr() % 16 != 0:
        return 1, False
    return 16 // size, rows.stride(0) * size % 16 == 0 and rows.shape[1] * size % 16 == 0


def _launch_backward(
    dx_rows: Tensor, dloss: Tensor | None, dlse: Tensor | None, x: Tensor, target: Tensor,
    weight: Tensor | None, stats: Tensor, scale: Tensor, reduction: str,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
) -> None:  # fmt: skip
    """Write the gradient of x into dx_rows [N, V], which may be x's own memory."""
    width = x.shape[-1]
    x_rows, targets = as_rows(x, width), target.reshape(-1)
    if dloss is None:
        dloss = stats.new_zeros(())
    dlosses = dloss.expand(target.shape).reshape(-1)
    dlses = None if dlse is None else dlse.reshape(-1)
    elements = BACKWARD_TILE if width > 2 * BACKWARD_TILE else 2 * BACKWARD_TILE
    tile = row_tile(min(width, elements), elements=elements, elements_per_thread=16)
    OP.launch(
        cross_entropy_bwd_kernel, (cdiv(len(x_rows), tile.ROWS) * cdiv(width, tile.BLOCK_N),),
        dlosses, dlses, scale, x_rows, targets, weight, stats, dx_rows,
        dlosses.stride(0), 0 if dlses is None else dlses.stride(0), x_rows.stride(0),
        dx_rows.stride(0), targets.stride(0), len(x_rows), width, ignore_index,
        SMOOTHING=label_smoothing, SOFTCAP=softcap, HAS_WEIGHT=weight is not None,
        HAS_SLOPE=label_smoothing != 0 or z_loss != 0, HAS_DLSE=dlses is not None,
        MEAN=reduction == "mean", ACC=accumulator(x.dtype), ROWS=tile.ROWS, BLOCK_N=tile.BLOCK_N,
        num_warps=tile.num_warps,
    )  # fmt: skip


def _backward_fake(
    dloss: Tensor | None, dlse: Tensor | None, x: Tensor, target: Tensor,
    weight: Tensor | None, stats: Tensor, scale: Tensor, reduction: str,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@OP.function(fake=_backward_fake)
def cross_entropy_backward(
    dloss: Tensor | None, dlse: Tensor | None, x: Tensor, target: Tensor,
    weight: Tensor | None, stats: Tensor, scale: Tensor, reduction: str,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    """Launch the backward: dx [..., V] like x from the gradients of the loss and of each lse."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    options = (reduction, ignore_index, label_smoothing, z_loss, softcap)
    rows = as_rows(dx, x.shape[-1])
    _launch_backward(rows, dloss, dlse, x, target, weight, stats, scale, *options)
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
    stats, scale = output[2:]
    ctx.mark_non_differentiable(stats, scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, target, weight, stats, scale)


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
    """Launch the forward: loss [...] or 0-d, lse [...], and for backward stats and scale.

    lse is empty where it is not asked for, and so is the scale where there is no mean.
    """
    options = (reduction, ignore_index, label_smoothing, z_loss, softcap)
    loss, lse, stats, scale = _forward_fake(x, target, weight, return_lse, *options)
    width = x.shape[-1]
    x_rows, targets = as_rows(x, width), target.reshape(-1)
    tile = forward_tile(len(x_rows), width, *_alignment(x_rows))
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
        VEC=tile.VEC, num_warps=tile.num_warps,
    )  # fmt: skip
    if reduced:
        block = min(REDUCE_BLOCK, next_power_of_2(max(programs, 1)))
        OP.launch(
            cross_entropy_reduce_kernel, (1,), losses, loss, scale, programs,
            MEAN=reduction == "mean", ACC=accumulator(x.dtype), BLOCK=block,
            num_warps=max(1, min(32, block // 128)),
        )  # fmt: skip
    return loss, lse, stats, scale


cross_entropy_in_place = _autograd_function(
    OP.name, inspect.unwrap(cross_entropy_forward), _save, _grads_in_place
)
"""The forward whose backward writes over the logits."""
