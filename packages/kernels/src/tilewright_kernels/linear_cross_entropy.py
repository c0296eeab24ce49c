"""Cross-entropy of input · weightᵀ that never holds all logits (Hsu et al. 2024, arXiv:2410.10989).

    logits = input · weightᵀ + bias         loss = cross_entropy(logits, target)

Logits come and go a chunk of tokens at a time (`_logit_chunks`), and while they are there, their
gradient costs no more than a write: a mean or a sum computes the gradients of input, weight and
bias in its forward, with the three matrix products that training takes anyway. Backward multiplies
them by the gradient of the loss. As a rule that is 1, and nothing is read.

Where each token's loss has a gradient of its own (reduction="none") only backward knows it, and
makes the logits again: four products. So does float16, whose gradients would be rounded before the
loss scale is known.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright_kernels._launch import cdiv, num_programs
from tilewright_kernels._linear_losses import autocast, check_linear, register_losses
from tilewright_kernels._logit_chunks import Head, empty_gradients, linear_gradients, sum_dtype
from tilewright_kernels._operator import Operator, accumulator
from tilewright_kernels._softmax_gradient import Loss
from tilewright_kernels._triton import tl, triton
from tilewright_kernels.cross_entropy import cross_entropy_reference
from tilewright_kernels.cross_entropy.reference import Reduction

SCALE_BLOCK = 4096
"""Elements that a program multiplies at a time, 16 a thread."""

_OP = Operator("linear_cross_entropy")

_losses = register_losses(_OP)


def linear_cross_entropy_reference(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The definition in plain torch, with all logits; arguments as `linear_cross_entropy`."""
    return cross_entropy_reference(
        F.linear(input, weight, bias), target, ignore_index=ignore_index, reduction=reduction,
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
    )  # fmt: skip


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """x *= factor in place, without a look at x where the factor is 1."""
    factor = tl.load(factor_ptr).to(ACC)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64)
        for tile in tl.range(first, tl.cdiv(size, BLOCK), tl.num_programs(0)):
            i = tile * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + i, mask=i < size).to(ACC)
            tl.store(x_ptr + i, x * factor, mask=i < size)


def _scale_in_place(x: Tensor, factor: Tensor) -> None:
    """Multiply x, whose elements fill its memory without gaps, by a number on the device."""
    programs = min(cdiv(x.numel(), SCALE_BLOCK), num_programs(x.device, per_sm=8))
    _OP.launch(
        _scale_kernel, (programs,), x, factor, x.numel(),
        ACC=accumulator(x.dtype), BLOCK=SCALE_BLOCK, num_warps=8,
    )  # fmt: skip


def _reduced_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mean: bool,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
    chunk_bytes: int | None, need_dx: bool, need_dweight: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dweight, dbias = empty_gradients(x, weight, bias, need_dx, need_dweight, need_dbias)
    return x.new_empty((), dtype=sum_dtype(x)), dx, dweight, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _grads(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 13
    computed = zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
    return *[_scaled(grad, dloss) if need else None for grad, need in computed], *[None] * 10


def _scaled(grad: Tensor, dloss: Tensor) -> Tensor:
    """grad · dloss, in grad's own memory where no second backward can ask for grad again.

    A graph that is traced gets the product: where to write it is its compiler's decision.
    """
    if type(grad) is not Tensor or torch._C._autograd._get_current_graph_task_keep_graph():
        return grad * dloss
    _scale_in_place(grad, dloss)
    torch.autograd.graph.increment_version(grad)
    return grad


@_OP.function(fake=_reduced_fake, setup_context=_save, backward=_grads)
def linear_cross_entropy_reduced(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mean: bool,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
    chunk_bytes: int | None, need_dx: bool, need_dweight: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Mean or sum of the losses, and its gradients by x, weight and bias where needed."""
    factor = torch.ones((), dtype=sum_dtype(x), device=x.device)
    if mean:
        # 1/0 without targets: no row takes it then, and the loss is 0 · ∞ = NaN, as torch's.
        factor /= (target != ignore_index).sum()
    losses, dx, dweight, dbias = linear_gradients(
        _OP, x, Head(weight, bias), target, factor.expand(target.shape),
        Loss(ignore_index, label_smoothing, z_loss, softcap), chunk_bytes,
        (need_dx, need_dweight, need_dbias),
    )  # fmt: skip
    return losses.sum() * factor, dx, dweight, dbias


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Cross-entropy of the logits input · weightᵀ + bias, of which few are held at a time.

    As `cross_entropy(torch.nn.functional.linear(input, weight, bias), target)`: logits are rounded
    to the dtype of input, and what follows is computed in float32 (float64 for float64). A mean or
    a sum whose gradient is wanted computes it in forward; evaluate under torch.no_grad().

    Args:
        input: [..., H] hidden states in float16, bfloat16, float32 or float64.
        weight: [V, H], of the same dtype. Under autocast input, weight and bias are cast first, as
            torch.nn.functional.linear does: weight may then be float32, and so is its gradient.
        target: [...] class indices in int64 or int32. An index outside [0, V) that is not
            ignore_index makes that token's loss and gradient NaN (the reference raises).
        bias: [V] or None.
        ignore_index: targets of this value give loss 0 and gradient 0 and count nowhere.
        reduction: "mean" over the targets that are not ignored, "sum", or "none" for a loss a
            token. The gradient of "none", and any in float16, takes a fourth matrix product.
        label_smoothing: ε in [0, 1], the share of the target that is spread evenly over V classes.
        z_loss: adds z_loss · lse² to each token's loss, lse = log Σ exp(logits).
        softcap: logits become softcap · tanh(logits / softcap) first.
        chunk_bytes: memory for logits, one token's at least. None takes a fifth of what all of them
            would, or 64 MiB. With an eighth or less the gradient of a half-precision weight is
            summed in float32, in 4 bytes a weight more.

    Returns:
        A float32 (float64) scalar, or [...] for "none". Differentiable once, by input, weight and
        bias.

    Raises:
        ValueError: shapes, devices or options that do not fit.
        TypeError: dtypes that do not.
    """
    input, weight, bias = autocast(input, weight, bias)
    check_linear(input, weight, bias, target, "target", softcap, chunk_bytes)
    _check(reduction, label_smoothing, z_loss)
    if not _OP.uses_triton(input):
        return linear_cross_entropy_reference(
            input, weight, target, bias, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        )  # fmt: skip
    tensors = (input, weight, bias, target)
    options = (ignore_index, float(label_smoothing), float(z_loss), softcap, chunk_bytes)
    needed = [t is not None and t.requires_grad for t in (input, weight, bias)]
    reduced = reduction != "none"
    if reduced and torch.is_grad_enabled() and any(needed) and input.dtype != torch.float16:
        return linear_cross_entropy_reduced(*tensors, reduction == "mean", *options, *needed)[0]
    losses, _ = _losses(*tensors, *options, False)
    if reduction == "mean":
        return losses.sum() / (target != ignore_index).sum()
    return losses.sum() if reduced else losses


def _check(reduction: str, label_smoothing: float, z_loss: float) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; choose from mean, sum, none")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must lie between 0 and 1")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss is {z_loss}; it must be 0 or a positive number")


class LinearCrossEntropyLoss(torch.nn.Module):
    """`linear_cross_entropy` with its options, as `torch.nn.CrossEntropyLoss` is for logits.

    The weight is an argument of forward and no parameter: in most models it is the output layer's
    or the embedding's.

    Args:
        ignore_index: targets that count nowhere.
        reduction: "mean", "sum" or "none".
        label_smoothing: share of the target that is spread over all classes.
        z_loss: as in `linear_cross_entropy`.
        softcap: as in `linear_cross_entropy`.
        chunk_bytes: as in `linear_cross_entropy`.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__()
        _check(reduction, label_smoothing, z_loss)
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.softcap, self.chunk_bytes = softcap, chunk_bytes

    def forward(
        self, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """The loss of hidden states [..., H], weight [V, H], class indices [...] and bias [V]."""
        return linear_cross_entropy(
            input, weight, target, bias,
            ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing, z_loss=self.z_loss, softcap=self.softcap,
            chunk_bytes=self.chunk_bytes,
        )  # fmt: skip
