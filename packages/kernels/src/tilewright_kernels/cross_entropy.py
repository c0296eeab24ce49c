"""Cross-entropy of logits and class indices, with label smoothing, z-loss and logit softcap.

For a row s of V logits (after the softcap), target y, class weights w and W = Σ_v w_v:

    lse  = log Σ_v exp(s_v)             p_v = exp(s_v - lse)
    loss = w_y · [(1 - ε) · (lse - s_y) + z · lse²] + ε/V · Σ_v w_v · (lse - s_v)
    ds_v = p_v · (a + b) - [v = y] · a - ε/V · w_v
           a = w_y · (1 - ε)            b = 2z · w_y · lse + ε/V · W

One pass over the row keeps a running maximum and sum (Milakov & Gimelshein 2018, arXiv:1805.02867)
of every class but the target. With r = Σ_{v≠y} exp(s_v - s_y) a sure prediction then has the loss
log1p(r) and the gradient -r / (1 + r) at its target, both to full precision where p_y rounds to 1.

Bytes: forward reads the logits (L bytes) and keeps three numbers a row; backward reads them again
and writes their gradient: 3L. A gradient written in forward already would move 2L, but 4L wherever
the loss is scaled afterwards (accumulation, division by a token count, GradScaler); it would round
twice, lose in float16 what the scaling is to save, and hold L more bytes from forward on. Rows
whose target is ignored are not read at all.
"""

import inspect
from typing import Any, Literal, cast

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv, next_power_of_2, row_tile
from tilewright_kernels._math import exp, log1p, tanh, tanh_grad
from tilewright_kernels._operator import (
    Operator,
    _autograd_function,
    accumulator,
    as_rows,
    check_floating,
    check_same_device,
)
from tilewright_kernels._triton import tl, triton

FORWARD_LANES, FORWARD_UNROLL, FORWARD_STAGES = 2048, 4, 2
"""Forward walks a row by UNROLL · LANES columns, STAGES tiles of loads in flight.

A lane is a column with a running maximum and sum of its own. 8 warps load 8 bfloat16 a thread over
2048 lanes, so the UNROLL columns of a lane lie in one thread and are reduced there. For sm_90 that
is 75 registers, 3 programs and 48 KiB in flight a multiprocessor; one stage takes 64 registers,
three take 195. Measured on an H200: 94 % of copy_'s bandwidth at V = 131072, and 79 % at V = 32768,
where 90 % were predicted: there a program has four tiles, two of them without a load in flight.
"""

BACKWARD_TILE = 4096
"""Columns of a program of backward; programs are independent, as in an element-wise kernel.

16 elements a thread, 28 registers, 8 programs a multiprocessor. Measured on an H200: 97 % of copy_.
"""

Reduction = Literal["mean", "sum", "none"]

_OP = Operator("cross_entropy")


def cross_entropy_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The definition in plain torch; arguments as `cross_entropy`."""
    s = input if input.dtype == torch.float64 else input.float()
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    w = s.new_ones(s.shape[-1]) if weight is None else weight.to(s.dtype)
    ignored = target == ignore_index
    y = target.masked_fill(ignored, 0).long().unsqueeze(-1)
    s_y, w_y = s.gather(-1, y).squeeze(-1), w[y].squeeze(-1)

    largest = s.detach().amax(-1, keepdim=True)
    lse = (largest + (s - largest).exp().sum(-1, keepdim=True).log()).squeeze(-1)
    loss = w_y * (1 - label_smoothing) * (lse - s_y)
    if z_loss != 0:
        loss = loss + w_y * z_loss * lse.square()
    if label_smoothing != 0:
        loss = loss + label_smoothing / s.shape[-1] * (w * (lse.unsqueeze(-1) - s)).sum(-1)
    return _reduce(loss.masked_fill(ignored, 0), w_y.masked_fill(ignored, 0), reduction)


def _reduce(losses: Tensor, row_weights: Tensor, reduction: str) -> Tensor:
    """Torch's sums: they add in a fixed order, and the divisor never leaves the device."""
    if reduction == "none":
        return losses
    return losses.sum() / row_weights.sum() if reduction == "mean" else losses.sum()


@triton.jit
def _cross_entropy_fwd_kernel(
    x_ptr, target_ptr, weight_ptr, weight_sum_ptr, loss_ptr, row_weight_ptr, stats_ptr,
    x_row_stride, target_stride, num_rows, n_cols, ignore_index,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr, LOWEST: tl.constexpr,
    ROWS: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of ROWS rows: loss, w_y, and for backward (max s, 1 / Σ exp(s - max s), 1 - p_y)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    given = tl.load(target_ptr + rows * target_stride, mask=row_mask, other=-1)
    ignored = given == ignore_index
    known = (given >= 0) & (given < n_cols) & (given != ignore_index)
    target = tl.where(known, given, -1).to(tl.int32)
    s_target = tl.load(x_ptr + rows * x_row_stride + target, mask=known, other=0.0).to(ACC)
    if SOFTCAP is not None:
        s_target = SOFTCAP * tanh(s_target * (1.0 / SOFTCAP))
    if HAS_WEIGHT:
        row_weight = tl.load(weight_ptr + target, mask=known, other=0.0).to(ACC)
    else:
        row_weight = known.to(ACC)

    # Maxima start at the lowest finite number: -inf - LOWEST is -inf, but -inf - -inf is NaN.
    peak = tl.full([ROWS, LANES], LOWEST, dtype=ACC)
    total = tl.zeros([ROWS, LANES], dtype=ACC)
    weighted = tl.zeros([ROWS, LANES], dtype=ACC)
    offsets = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    x_rows = x_ptr + rows[:, None, None] * x_row_stride
    end = tl.max(tl.where(known, n_cols, 0), axis=0)
    for start in tl.range(0, end, UNROLL * LANES, num_stages=STAGES):
        cols = start + offsets
        mask = known[:, None, None] & (cols < n_cols)[None, :, :]
        s = tl.load(x_rows + cols[None, :, :], mask=mask, other=float("-inf")).to(ACC)
        if SOFTCAP is not None:
            s = tl.where(mask, SOFTCAP * tanh(s * (1.0 / SOFTCAP)), float("-inf"))
        if SMOOTHING != 0:
            term = tl.where(mask, s, 0.0)
            if HAS_WEIGHT:
                w = tl.load(weight_ptr + cols, mask=cols < n_cols, other=0.0).to(ACC)
                term *= w[None, :, :]
            weighted += tl.sum(term, axis=1)
        here = (target >= start) & (target < start + UNROLL * LANES)
        if tl.max(here.to(tl.int32), axis=0) > 0:
            s = tl.where(cols[None, :, :] == target[:, None, None], float("-inf"), s)
        new_peak = tl.maximum(peak, tl.max(s, axis=1))
        total = total * exp(peak - new_peak) + tl.sum(exp(s - new_peak[:, None, :]), axis=1)
        peak = new_peak

    others_max = tl.max(peak, axis=1)
    s_max = tl.maximum(others_max, s_target)
    others = tl.sum(total * exp(peak - s_max[:, None]), axis=1)
    everything = others + exp(s_target - s_max)
    # everything - 1, where the 1 is the largest term: the target's own, or one of the others.
    excess = tl.where(s_target >= others_max, others, everything - 1.0)
    loss = row_weight * (1.0 - SMOOTHING) * ((s_max - s_target) + log1p(excess))
    lse = s_max + tl.log(everything)
    if Z_LOSS != 0:
        loss += row_weight * Z_LOSS * lse * lse
    if SMOOTHING != 0:
        if HAS_WEIGHT:
            spread = tl.load(weight_sum_ptr) * lse - tl.sum(weighted, axis=1)
        else:
            spread = n_cols * lse - tl.sum(weighted, axis=1)
        loss += SMOOTHING * spread / n_cols
    unknown = tl.where(ignored, 0.0, float("nan"))
    tl.store(loss_ptr + rows, tl.where(known, loss, unknown), mask=row_mask)
    tl.store(row_weight_ptr + rows, row_weight, mask=row_mask)
    inverse = tl.where(known, 1.0 / everything, unknown)
    tl.store(stats_ptr + 3 * rows, s_max, mask=row_mask)
    tl.store(stats_ptr + 3 * rows + 1, inverse, mask=row_mask)
    tl.store(stats_ptr + 3 * rows + 2, others * inverse, mask=row_mask)


@triton.jit
def _cross_entropy_bwd_kernel(
    dloss_ptr, x_ptr, target_ptr, weight_ptr, weight_sum_ptr, stats_ptr, dx_ptr,
    dloss_stride, x_row_stride, dx_row_stride, target_stride, num_rows, n_cols, ignore_index,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx of one tile; dx may be x."""
    column_tiles = tl.cdiv(n_cols, BLOCK_N)
    rows = (tl.program_id(0) // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < num_rows, cols < n_cols
    given = tl.load(target_ptr + rows * target_stride, mask=row_mask, other=-1)
    # An ignored row gets g = 0 whatever dloss is: 0/0 where the mean runs over no target at all.
    live = row_mask & (given != ignore_index)
    known = live & (given >= 0) & (given < n_cols)
    target = tl.where(known, given, -1).to(tl.int32)
    g = tl.load(dloss_ptr + rows * dloss_stride, mask=live, other=0.0)
    s_max = tl.load(stats_ptr + 3 * rows, mask=live, other=0.0)
    inverse = tl.load(stats_ptr + 3 * rows + 1, mask=live, other=1.0)
    complement = tl.load(stats_ptr + 3 * rows + 2, mask=live, other=0.0)
    row_weight = known.to(ACC)
    if HAS_WEIGHT:
        row_weight = tl.load(weight_ptr + target, mask=known, other=0.0).to(ACC)

    mask = live[:, None] & col_mask[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0).to(ACC)
    s = x
    if SOFTCAP is not None:
        s = SOFTCAP * tanh(x * (1.0 / SOFTCAP))
    p = exp(s - s_max[:, None]) * inverse[:, None]
    p_or_less_one = tl.where(cols[None, :] == target[:, None], -complement[:, None], p)
    dx = p_or_less_one * (row_weight * (1.0 - SMOOTHING) * g)[:, None]
    if Z_LOSS != 0:
        lse = s_max - tl.log(inverse)
        dx += p * (2.0 * Z_LOSS * row_weight * lse * g)[:, None]
    if SMOOTHING != 0:
        share = SMOOTHING * g / n_cols
        if HAS_WEIGHT:
            w = tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(ACC)
            dx += (p * tl.load(weight_sum_ptr) - w[None, :]) * share[:, None]
        else:
            dx += (p * n_cols - 1.0) * share[:, None]
    if SOFTCAP is not None:
        dx *= tanh_grad(x * (1.0 / SOFTCAP))
    out = dx_ptr + rows[:, None] * dx_row_stride + cols[None, :]
    tl.store(out, dx, mask=row_mask[:, None] & col_mask[None, :])


def _launch_backward(
    dx_rows: Tensor, dloss: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
) -> None:  # fmt: skip
    """Write the gradient of x into dx_rows [N, V], which may be x's own memory."""
    width = x.shape[-1]
    x_rows, targets, dlosses = as_rows(x, width), target.reshape(-1), dloss.reshape(-1)
    tile = row_tile(min(width, BACKWARD_TILE), elements=BACKWARD_TILE, elements_per_thread=16)
    _OP.launch(
        _cross_entropy_bwd_kernel, (cdiv(len(x_rows), tile.ROWS) * cdiv(width, tile.BLOCK_N),),
        dlosses, x_rows, targets, weight, _weight_sum(weight, label_smoothing, stats), stats,
        dx_rows, dlosses.stride(0), x_rows.stride(0), dx_rows.stride(0), targets.stride(0),
        len(x_rows), width, ignore_index, SMOOTHING=label_smoothing, Z_LOSS=z_loss,
        SOFTCAP=softcap, HAS_WEIGHT=weight is not None, ACC=accumulator(x.dtype), ROWS=tile.ROWS,
        BLOCK_N=tile.BLOCK_N, num_warps=tile.num_warps,
    )  # fmt: skip


def _weight_sum(weight: Tensor | None, label_smoothing: float, like: Tensor) -> Tensor | None:
    return weight.sum(dtype=like.dtype) if weight is not None and label_smoothing != 0 else None


def _backward_fake(
    dloss: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_OP.function(fake=_backward_fake)
def cross_entropy_backward(
    dloss: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    """Launch the backward: dx [..., V] like x from the gradient of each loss [...]."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    options = (ignore_index, label_smoothing, z_loss, softcap)
    _launch_backward(as_rows(dx, x.shape[-1]), dloss, x, target, weight, stats, *options)
    return dx


def _forward_fake(
    x: Tensor, target: Tensor, weight: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    losses = torch.empty(target.shape, dtype=dtype, device=x.device)
    return losses, torch.empty_like(losses), losses.new_empty(*target.shape, 3)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, target, weight, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, target, weight, output[2])


def _grads(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    dx = None
    if dloss is not None:
        dx = cross_entropy_backward(dloss, *ctx.saved_tensors, *ctx.options)
    return dx, *[None] * 6


def _grads_in_place(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """The same into the logits, whose version counter says so to whoever else saved them."""
    dx = None
    if dloss is not None:
        x, target, weight, stats = ctx.saved_tensors
        dx = x.detach()
        rows = as_rows(dx, x.shape[-1])
        _launch_backward(rows, dloss, x, target, weight, stats, *ctx.options)
        torch.autograd.graph.increment_version(dx)
    return dx, *[None] * 6


@_OP.function(fake=_forward_fake, setup_context=_save, backward=_grads)
def cross_entropy_forward(
    x: Tensor, target: Tensor, weight: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the forward: losses [...], weights of the targets [...] and backward's stats."""
    width = x.shape[-1]
    losses, row_weights, stats = _forward_fake(
        x, target, weight, ignore_index, label_smoothing, z_loss, softcap
    )
    x_rows, targets = as_rows(x, width), target.reshape(-1)
    tile = row_tile(min(width, FORWARD_LANES), elements=FORWARD_LANES, elements_per_thread=8)
    unroll = min(FORWARD_UNROLL, next_power_of_2(cdiv(width, tile.BLOCK_N)))
    _OP.launch(
        _cross_entropy_fwd_kernel, (cdiv(len(x_rows), tile.ROWS),),
        x_rows, targets, weight, _weight_sum(weight, label_smoothing, stats), losses, row_weights,
        stats, x_rows.stride(0), targets.stride(0), len(x_rows), width, ignore_index,
        SMOOTHING=label_smoothing, Z_LOSS=z_loss, SOFTCAP=softcap, HAS_WEIGHT=weight is not None,
        ACC=accumulator(x.dtype), LOWEST=torch.finfo(losses.dtype).min, ROWS=tile.ROWS,
        UNROLL=unroll, LANES=tile.BLOCK_N, STAGES=FORWARD_STAGES, num_warps=tile.num_warps,
    )  # fmt: skip
    return losses, row_weights, stats


_cross_entropy_in_place = _autograd_function(
    _OP.name, inspect.unwrap(cross_entropy_forward), _save, _grads_in_place
)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Cross-entropy between logits and class indices, computed in float32 (float64 for float64).

    As `torch.nn.functional.cross_entropy`, but the classes are the last dimension (torch takes the
    second: for more than two dimensions give `input.movedim(1, -1)`), and the loss of float16 and
    bfloat16 logits is float32. Nothing waits for the device: the mean is divided there, and is NaN
    where every target is ignored, as torch's.

    Args:
        input: [..., V] logits in float16, bfloat16, float32 or float64. Rows are read in place if
            they are evenly spaced, as in any slice `logits[:, a:b]` of two dimensions.
        target: [...] class indices in int64 or int32, any strides. An index outside [0, V) that is
            not ignore_index makes that row's loss and gradient NaN (the reference raises).
        weight: [V] weight of each class, floating point; it gets no gradient.
        ignore_index: targets of this value give loss 0 and gradient 0 and count nowhere.
        reduction: "mean" divides the sum of the losses by the sum of weight[target], or by the
            number of targets that are not ignored; "sum"; or "none" for a loss a token.
        label_smoothing: ε in [0, 1], the share of the target that is spread evenly over V classes.
        z_loss: adds z_loss · lse² · weight[target] to each token's loss, lse = log Σ exp(logits).
        softcap: logits become softcap · tanh(logits / softcap) first.
        inplace_backward: backward writes the gradient over the logits and so needs no memory of
            its own. Afterwards they hold the gradient: they must not be a leaf, backward runs once,
            and autograd raises where another operation saved them. The reference and torch.compile
            (which plans memory by itself) take no notice.

    Returns:
        A float32 (float64) scalar, or [...] for "none". Differentiable once, by input.

    Raises:
        ValueError: shapes, devices or options that do not fit.
        TypeError: input or weight is not floating point, target is not int64 or int32.
    """
    _check(input, target, weight, reduction, label_smoothing, z_loss, softcap)
    if not _OP.uses_triton(input):
        return cross_entropy_reference(
            input, target, weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        )  # fmt: skip
    forward = cross_entropy_forward
    eager = not torch.compiler.is_compiling() and type(input) is Tensor
    if inplace_backward and eager and torch.is_grad_enabled() and input.requires_grad:
        _check_in_place(input)
        forward = _cross_entropy_in_place.apply
    weight = None if weight is None else weight.contiguous()
    losses, row_weights, _ = forward(
        input, target, weight, ignore_index, float(label_smoothing), float(z_loss), softcap
    )
    return _reduce(losses, row_weights, reduction)


def _check(
    input: Tensor, target: Tensor, weight: Tensor | None,
    reduction: str, label_smoothing: float, z_loss: float, softcap: float | None,
) -> None:  # fmt: skip
    check_floating("input", input)
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"target is {target.dtype}; give class indices in int64 or int32, for example "
            f"target.long() (probabilities of classes are not supported)"
        )
    if input.dim() == 0 or input.shape[-1] == 0:
        raise ValueError(f"input has shape {tuple(input.shape)}; it needs [..., V] with V > 0")
    if target.shape != input.shape[:-1]:
        hint = ""
        if input.dim() > 2 and target.shape == input.shape[:1] + input.shape[2:]:
            hint = "; the classes are the last dimension here: give input.movedim(1, -1)"
        raise ValueError(
            f"target has shape {tuple(target.shape)}; it must be input's {tuple(input.shape)} "
            f"without the last dimension{hint}"
        )
    if weight is not None:
        check_floating("weight", weight)
        if weight.shape != input.shape[-1:]:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}; it must be ({input.shape[-1]},), one a "
                f"class"
            )
        if weight.requires_grad:
            raise ValueError("weight requires grad but gets none; give weight.detach()")
    check_same_device(input=input, target=target, weight=weight)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; choose from mean, sum, none")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must lie between 0 and 1")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss is {z_loss}; it must be 0 or a positive number")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap is {softcap}; it must be a positive number, or None for no cap")


def _check_in_place(input: Tensor) -> None:
    if input.is_leaf:
        raise ValueError(
            "inplace_backward would overwrite a leaf that requires grad with its own gradient; "
            "use it on logits that were computed"
        )
    rows = as_rows(input.detach(), input.shape[-1])
    overlap = len(rows) > 1 and rows.stride(0) < rows.shape[1]
    if overlap or (rows.numel() and rows.data_ptr() != input.data_ptr()):
        raise ValueError(
            f"inplace_backward needs evenly spaced rows of adjacent logits, and input has shape "
            f"{tuple(input.shape)} with strides {input.stride()}; leave inplace_backward out"
        )


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` with `cross_entropy` inside: same arguments, and three more.

    For [N, V] the two are the same; in more dimensions torch's classes come second, ours last.

    Args:
        weight: [V] weight of each class; a buffer, as in torch.
        size_average: deprecated by torch in favour of reduction.
        ignore_index: targets that count nowhere.
        reduce: deprecated by torch in favour of reduction.
        reduction: "mean", "sum" or "none".
        label_smoothing: share of the target that is spread over all classes.
        z_loss: as in `cross_entropy`.
        softcap: as in `cross_entropy`.
        inplace_backward: as in `cross_entropy`.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap, self.inplace_backward = z_loss, softcap, inplace_backward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits [..., V] and class indices [...]."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=cast(Reduction, self.reduction),
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            inplace_backward=self.inplace_backward,
        )
