"""The public function and what it refuses."""

from typing import Literal, overload

import torch
from torch import Tensor

from tilewright_kernels._operator import as_rows, check_floating, check_same_device
from tilewright_kernels.cross_entropy.launches import (
    OP,
    cross_entropy_forward,
    cross_entropy_in_place,
)
from tilewright_kernels.cross_entropy.reference import Reduction, cross_entropy_reference


@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int = -100,
    reduction: Reduction = "mean", label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float | None = None, return_lse: Literal[False] = False,
    inplace_backward: bool = False,
) -> Tensor: ...  # fmt: skip
@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int = -100,
    reduction: Reduction = "mean", label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float | None = None, return_lse: Literal[True],
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
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
    return_lse: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
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
        return_lse: also return lse = log Σ exp(logits) of each row, ignored or not: it depends on
            the logits alone, and its gradient is added in the same backward.
        inplace_backward: backward writes the gradient over the logits and so needs no memory of
            its own. Afterwards they hold the gradient: they must not be a leaf or a view of one,
            backward runs once, and autograd raises where another operation saved them. The
            reference and torch.compile (which plans memory by itself) take no notice.

    Returns:
        A float32 (float64) scalar, or [...] for "none"; with return_lse a pair of it and lse [...]
        of the same dtype. Differentiable once, by input.

    Raises:
        ValueError: shapes, devices or options that do not fit.
        TypeError: input or weight is not floating point, target is not int64 or int32.
    """
    _check(input, target, weight, reduction, label_smoothing, z_loss, softcap)
    if not OP.uses_triton(input):
        return cross_entropy_reference(
            input, target, weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
            return_lse=return_lse,
        )  # fmt: skip
    forward = cross_entropy_forward
    eager = not torch.compiler.is_compiling() and type(input) is Tensor
    if inplace_backward and eager and torch.is_grad_enabled() and input.requires_grad:
        _check_in_place(input)
        forward = cross_entropy_in_place.apply
    weight = None if weight is None else weight.contiguous()
    options = (reduction, ignore_index, float(label_smoothing), float(z_loss), softcap)
    loss, lse, *_ = forward(input, target, weight, return_lse, *options)
    return (loss, lse) if return_lse else loss


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
    base = input._base  # None but for a view, whose memory is the base's
    if input.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "inplace_backward would overwrite a leaf that requires grad, or a view of one, with "
            "its own gradient; use it on logits that were computed"
        )
    rows = as_rows(input.detach(), input.shape[-1])
    overlap = len(rows) > 1 and rows.stride(0) < rows.shape[1]
    if overlap or (rows.numel() and rows.data_ptr() != input.data_ptr()):
        raise ValueError(
            f"inplace_backward needs evenly spaced rows of adjacent logits, and input has shape "
            f"{tuple(input.shape)} with strides {input.stride()}; leave inplace_backward out"
        )
