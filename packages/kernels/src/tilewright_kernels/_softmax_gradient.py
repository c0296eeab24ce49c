"""From a chunk of logits to its losses, and in the same launch to the gradient, in their place.

For a row s of V logits (after bias and softcap) with target y and upstream factor g:

    loss = (1 - ε) · (lse - s_y) + ε · (lse - mean s) + z · lse²          lse = log Σ_v exp(s_v)
    ds_v = g · [p_v · (1 + 2z · lse) - (1 - ε) · [v = y] - ε/V]           p_v = exp(s_v - lse)

A program walks its row twice: once for a running maximum and sum (Milakov & Gimelshein 2018,
arXiv:1805.02867), once to write ds over s. The second walk finds most of the row in L2, so device
memory sees little more than one read and one write. Sums leave the target out: 1 - p_y is then what
the others have, to full precision where p_y rounds to 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv, next_power_of_2
from tilewright_kernels._math import exp, log1p, tanh, tanh_grad
from tilewright_kernels._operator import Operator, accumulator
from tilewright_kernels._triton import tl, triton

UNROLL = 4
"""Loads of 16 bytes that a thread has under way."""

LEAST_THREADS, MOST_THREADS = 128, 1024
"""Threads of a program: for a row, or for several where they are narrow."""

COLUMNS_PER_THREAD = 128
"""Columns that a thread has of a wide row. More threads a row are fewer rows at a time, which fit
in L2 until their second walk: 3 programs a multiprocessor for 32768 classes, 1 for 131072.

Measured on an H200, in shares of copy_'s speed: 32768 classes with 256 threads and 4 loads 0.87,
512 and 2 0.74 to 0.83, 1024 and 2 0.58; 131072 with 1024 and 4 0.79, 1024 and 2 0.75, 512 and 4
0.74. Without hints of what to keep and what to let go, 0.76 for both.
"""


class Loss(NamedTuple):
    """What is asked of a row of logits and its target."""

    ignore_index: int
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None


class Tile(NamedTuple):
    """ROWS rows by LANES · UNROLL · VEC columns, all powers of two; a thread is a lane of a row."""

    ROWS: int
    LANES: int
    UNROLL: int
    VEC: int
    num_warps: int


def tile_for(width: int, itemsize: int, walks: int, *, capped: bool = False) -> Tile:
    """The tile in which rows of `width` logits are walked, once or twice.

    The registers of 1024 threads hold what one load needs of a softcap's arithmetic, not four.
    """
    block = next_power_of_2(width)
    vec = min(16 // itemsize, block)
    unroll = min(1 if capped else UNROLL, block // vec)
    most = MOST_THREADS if walks == 2 else 2 * LEAST_THREADS
    threads = min(most, max(LEAST_THREADS, block // COLUMNS_PER_THREAD))
    lanes = min(threads, block // (vec * unroll))
    rows = max(1, LEAST_THREADS // lanes)
    return Tile(rows, lanes, unroll, vec, max(1, rows * lanes // 32))


@triton.jit
def _columns(start, LANES: tl.constexpr, UNROLL: tl.constexpr, VEC: tl.constexpr):
    """Columns [1, LANES, UNROLL, VEC] of the tile from start on."""
    return (
        start
        + tl.arange(0, LANES)[None, :, None, None] * VEC
        + tl.arange(0, UNROLL)[None, None, :, None] * (LANES * VEC)
        + tl.arange(0, VEC)[None, None, None, :]
    )


@triton.jit
def _load(
    x_rows, cols, live, row_stride, MASKED: tl.constexpr, ACC: tl.constexpr, L2: tl.constexpr
):  # fmt: skip
    """A tile of whole loads: a masked one goes on into the padding, which the caller leaves out."""
    x_ptrs = x_rows[:, None, None, None] + cols
    if MASKED:
        mask = live[:, None, None, None] & (cols < row_stride)
        x = tl.load(x_ptrs, mask=mask, other=0.0, eviction_policy=L2)
    else:
        x = tl.load(x_ptrs, eviction_policy=L2)
    return x.to(ACC)


@triton.jit
def _capped(x, SOFTCAP: tl.constexpr):
    """c · tanh(x / c), or x where there is no cap."""
    if SOFTCAP is not None:
        x = SOFTCAP * tanh(x * (1.0 / SOFTCAP))
    return x


@triton.jit
def _sum_tile(
    x_rows, start, live, target, row_stride, n_cols, peak, total, plain,
    SOFTCAP: tl.constexpr, HAS_PLAIN: tl.constexpr, MASKED: tl.constexpr,
    UNROLL: tl.constexpr, VEC: tl.constexpr, L2: tl.constexpr,
):  # fmt: skip
    """Take a tile into each lane's maximum and sum, which leave the target out, and Σ s."""
    cols = _columns(start, peak.shape[1], UNROLL, VEC)
    s = _capped(_load(x_rows, cols, live, row_stride, MASKED, peak.dtype, L2), SOFTCAP)
    if HAS_PLAIN:
        term = s
        if MASKED:
            term = tl.where(live[:, None, None, None] & (cols < n_cols), s, 0.0)
        plain += tl.sum(tl.sum(term, axis=3), axis=2)
    if MASKED:
        s = tl.where(live[:, None, None, None] & (cols < n_cols), s, float("-inf"))
    here = (target >= start) & (target < start + peak.shape[1] * UNROLL * VEC)
    if tl.max(here.to(tl.int32), axis=0) > 0:
        s = tl.where(cols == target[:, None, None, None], float("-inf"), s)
    new_peak = tl.maximum(peak, tl.max(tl.max(s, axis=3), axis=2))
    terms = exp(s - new_peak[:, :, None, None])
    total = total * exp(peak - new_peak) + tl.sum(tl.sum(terms, axis=3), axis=2)
    return new_peak, total, plain


@triton.jit
def _write_tile(
    x_rows, start, live, inside, target, row_stride, s_max, scale, flat, ds_target,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """Write scale · exp(s - s_max) - flat over a tile's logits, and ds_target at the target."""
    cols = _columns(start, LANES, UNROLL, VEC)
    x = _load(x_rows, cols, live, row_stride, MASKED, s_max.dtype, "evict_first")
    s = _capped(x, SOFTCAP)
    ds = scale[:, None, None, None] * exp(s - s_max[:, None, None, None])
    ds -= flat[:, None, None, None]
    here = (target >= start) & (target < start + LANES * UNROLL * VEC)
    if tl.max(here.to(tl.int32), axis=0) > 0:
        ds = tl.where(cols == target[:, None, None, None], ds_target[:, None, None, None], ds)
    if SOFTCAP is not None:
        ds *= tanh_grad(x * (1.0 / SOFTCAP))
    out = x_rows[:, None, None, None] + cols
    if MASKED:
        mask = inside[:, None, None, None] & (cols < row_stride)
        tl.store(out, ds, mask=mask, eviction_policy="evict_first")
    else:
        tl.store(out, ds, eviction_policy="evict_first")


@triton.jit
def _softmax_gradient_kernel(
    logits_ptr, target_ptr, factor_ptr, loss_ptr, mean_ptr,
    row_stride, target_stride, factor_stride, num_rows, n_cols, ignore_index,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_GRADIENT: tl.constexpr, HAS_MEAN: tl.constexpr, ACC: tl.constexpr, LOWEST: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, VEC: tl.constexpr,
    FIRST_WALK: tl.constexpr,
):  # fmt: skip
    """Losses of ROWS rows, the mean of their logits, and the gradient written over the logits."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    given = tl.load(target_ptr + rows * target_stride, mask=inside, other=0)
    live = inside & (given != ignore_index)
    known = live & (given >= 0) & (given < n_cols)
    target = tl.where(known, given, -1).to(tl.int32)
    x_rows = logits_ptr + rows * row_stride
    s_target = _capped(tl.load(x_rows + target, mask=known, other=0.0).to(ACC), SOFTCAP)

    # Maxima start at the lowest finite number: -inf - LOWEST is -inf, but -inf - -inf is NaN.
    peak = tl.full([ROWS, LANES], LOWEST, dtype=ACC)
    total = tl.zeros([ROWS, LANES], dtype=ACC)
    plain = tl.zeros([ROWS, LANES], dtype=ACC)
    TILE: tl.constexpr = LANES * UNROLL * VEC
    HAS_PLAIN: tl.constexpr = SMOOTHING != 0 or HAS_MEAN
    # The logits of an ignored target are not read: no tile of them is whole.
    end = tl.max(tl.where(live, n_cols, 0), axis=0)
    whole = end // TILE * TILE if ROWS == 1 else 0
    for start in tl.range(0, whole, TILE):
        peak, total, plain = _sum_tile(
            x_rows, start, live, target, row_stride, n_cols, peak, total, plain,
            SOFTCAP, HAS_PLAIN, False, UNROLL, VEC, FIRST_WALK,
        )  # fmt: skip
    for start in tl.range(whole, end, TILE):
        peak, total, plain = _sum_tile(
            x_rows, start, live, target, row_stride, n_cols, peak, total, plain,
            SOFTCAP, HAS_PLAIN, True, UNROLL, VEC, FIRST_WALK,
        )  # fmt: skip

    others_max = tl.max(peak, axis=1)
    s_max = tl.maximum(others_max, s_target)
    others = tl.sum(total * exp(peak - s_max[:, None]), axis=1)
    own = exp(s_target - s_max)
    # Of a sure prediction, 1 + others loses what log1p keeps.
    log_total = tl.where(s_target >= others_max, log1p(others), tl.log(others + own))
    lse = s_max + log_total
    mean = tl.sum(plain, axis=1) / n_cols
    loss = (1.0 - SMOOTHING) * (s_max - s_target + log_total)
    if SMOOTHING != 0:
        loss += SMOOTHING * (lse - mean)
    if Z_LOSS != 0:
        loss += Z_LOSS * lse * lse
    # A target that is no class: its loss and gradient are NaN. An ignored one: both are 0.
    missing = tl.where(live, float("nan"), 0.0)
    tl.store(loss_ptr + rows, tl.where(known, loss, missing), mask=inside)
    if HAS_MEAN:
        tl.store(mean_ptr + rows, tl.where(known, mean, missing), mask=inside)

    if HAS_GRADIENT:
        g = tl.load(factor_ptr + rows * factor_stride, mask=known, other=0.0).to(ACC)
        g = tl.where(known, g, missing)
        inverse = 1.0 / (others + own)
        slope = 2.0 * Z_LOSS * lse
        scale = g * (1.0 + slope) * inverse
        flat = g * SMOOTHING / n_cols
        ds_target = own * (SMOOTHING + slope) - others * (1.0 - SMOOTHING)
        ds_target = g * ds_target * inverse - flat
        tl.debug_barrier()  # every thread has read s_target before one writes over it
        for start in tl.range(0, whole, TILE):
            _write_tile(
                x_rows, start, live, inside, target, row_stride, s_max, scale, flat, ds_target,
                SOFTCAP, False, LANES, UNROLL, VEC,
            )  # fmt: skip
        for start in tl.range(whole, n_cols, TILE):
            _write_tile(
                x_rows, start, live, inside, target, row_stride, s_max, scale, flat, ds_target,
                SOFTCAP, True, LANES, UNROLL, VEC,
            )  # fmt: skip


def softmax_gradient(
    op: Operator, logits: Tensor, targets: Tensor, factor: Tensor | None, losses: Tensor,
    means: Tensor | None, loss: Loss,
) -> None:  # fmt: skip
    """Write the losses [N] of logits [N, V], and with a factor the gradient over the logits.

    Args:
        op: for whom the launch counts.
        logits: rows of adjacent numbers; up to the next row's start, memory is written over.
        targets: [N] classes.
        factor: [N] gradient of each loss, or None to leave the logits as they are.
        losses: [N] in the accumulation type; contiguous.
        means: for the mean of each row's logits, as losses, or None.
        loss: which one.
    """
    num_rows, width = logits.shape
    walks, capped = 1 if factor is None else 2, loss.softcap is not None
    tile = tile_for(width, logits.element_size(), walks, capped=capped)
    op.launch(
        _softmax_gradient_kernel, (cdiv(num_rows, tile.ROWS),),
        logits, targets, factor, losses, means, logits.stride(0), targets.stride(0),
        0 if factor is None else factor.stride(0), num_rows, width, loss.ignore_index,
        SMOOTHING=loss.label_smoothing, Z_LOSS=loss.z_loss, SOFTCAP=loss.softcap,
        HAS_GRADIENT=factor is not None, HAS_MEAN=means is not None,
        ACC=accumulator(logits.dtype), LOWEST=torch.finfo(losses.dtype).min, **tile._asdict(),
        FIRST_WALK="" if factor is None else "evict_last",
    )  # fmt: skip
