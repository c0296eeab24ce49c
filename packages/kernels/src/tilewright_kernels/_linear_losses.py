"""What `linear_cross_entropy` and `linear_log_prob` share: a loss a token, and their arguments."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._logit_chunks import (
    Head,
    empty_gradients,
    linear_gradients,
    linear_losses,
    sum_dtype,
)
from tilewright_kernels._operator import Operator, check_floating, check_same_device
from tilewright_kernels._softmax_gradient import Loss


def register_losses(operator: Operator) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register `<operator>_losses` and its backward as launches of `operator`; return the former.

    Each loss has a gradient of its own, which only backward knows: it makes the logits again.
    """

    def fake(
        x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
        ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
        chunk_bytes: int | None, return_means: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        losses = x.new_empty(target.shape, dtype=sum_dtype(x))
        return losses, losses.new_empty(target.shape if return_means else 0)

    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
        ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
        chunk_bytes: int | None, return_means: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The loss of each token, and the mean of its logits (empty where it is not asked for)."""
        loss = Loss(ignore_index, label_smoothing, z_loss, softcap)
        means = x.new_empty(target.shape if return_means else 0, dtype=sum_dtype(x))
        head = Head(weight, bias)
        asked = means if return_means else None
        return linear_losses(operator, x, head, target, loss, chunk_bytes, asked), means

    def backward_fake(
        dlosses: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
        ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
        chunk_bytes: int | None, need_dx: bool, need_dweight: bool, need_dbias: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return empty_gradients(x, weight, bias, need_dx, need_dweight, need_dbias)

    def backward(
        dlosses: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
        ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
        chunk_bytes: int | None, need_dx: bool, need_dweight: bool, need_dbias: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of Σ dlosses · losses by x, weight and bias, empty where not needed."""
        loss = Loss(ignore_index, label_smoothing, z_loss, softcap)
        needed = (need_dx, need_dweight, need_dbias)
        return linear_gradients(
            operator, x, Head(weight, bias), target, dlosses, loss, chunk_bytes, needed
        )[1:]

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.options = *inputs[:4], inputs[4:9]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    def grads(ctx: Any, dlosses: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dlosses is None:
            return (None,) * 10
        needed = ctx.needs_input_grad[:3]
        computed = registered_backward(dlosses, *ctx.saved_tensors, *ctx.options, *needed)
        return *[g if need else None for g, need in zip(computed, needed, strict=True)], *[None] * 7

    forward.__name__ = f"{operator.name}_losses"
    backward.__name__ = f"{operator.name}_losses_backward"
    registered_backward = operator.function(fake=backward_fake)(backward)
    return operator.function(fake=fake, setup_context=save, backward=grads)(forward)


def autocast(*tensors: Tensor | None) -> list[Any]:
    """What torch.nn.functional.linear makes of its arguments: autocast's dtype, where it is on."""
    device = next(t.device.type for t in tensors if t is not None)
    # Nobody casts meta tensors, and to be asked about them is an error to torch.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)
        for t in tensors
    ]


def check_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, target_name: str,
    softcap: float | None, chunk_bytes: int | None,
) -> None:  # fmt: skip
    """Raise where a loss of input · weightᵀ + bias and target cannot be computed."""
    check_floating("input", input)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype} and input {input.dtype}; give {name}.to(input.dtype), "
                f"or call it under torch.autocast"
            )
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{target_name} is {target.dtype}; give class indices in int64 or int32, for example "
            f"{target_name}.long()"
        )
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [V, H], V and H > 0")
    classes, width = weight.shape
    if input.dim() == 0 or input.shape[-1] != width:
        raise ValueError(
            f"input has shape {tuple(input.shape)}; its last dimension must be the {width} of "
            f"weight's {tuple(weight.shape)}"
        )
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"{target_name} has shape {tuple(target.shape)}; it must be input's "
            f"{tuple(input.shape)} without the last dimension"
        )
    if bias is not None and bias.shape != (classes,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({classes},)")
    check_same_device(**{"input": input, "weight": weight, target_name: target, "bias": bias})
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap is {softcap}; it must be a positive number, or None for no cap")
    if chunk_bytes is not None and not isinstance(chunk_bytes, int):
        raise TypeError(f"chunk_bytes is {chunk_bytes!r}; it must be whole: give int(chunk_bytes)")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}; it must be 1 or more, or None")
