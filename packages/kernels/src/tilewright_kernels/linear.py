"""A linear layer whose products are made by whoever makes them faster, and whose weight's gradient
can be summed in float32.

    y = x · Wᵀ + b          dx = dy · W          dW = dyᵀ · x          db = Σ dy

Under backend auto a table of measured speeds (`_linear_products`) decides for each of the three
products between `launch_matmul` and cuBLAS; where cuBLAS has all three, torch's own function runs.

Gradients of several backward passes are usually added up in the weight's dtype, and in bfloat16
every addition rounds. A `weight_grad_buffer` in float32 takes them as they leave the accumulators:
dW is added to it by the product itself, in one pass, and no gradient in bfloat16 exists.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright_kernels._linear_losses import autocast
from tilewright_kernels._linear_products import (
    as_matrix,
    check_operands,
    choose,
    dgrad_product,
    forward_product,
    wgrad_product,
)
from tilewright_kernels._operator import Operator, check_same_device, is_batch

_OP = Operator("linear")


def linear_reference(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition in plain torch; arguments as `linear`, without a buffer."""
    return F.linear(input, weight, bias)


def _accumulate_fake(dy: Tensor, x: Tensor, buffer: Tensor, ours: bool) -> None:
    return None


@_OP.function(fake=_accumulate_fake, mutates=("buffer",))
def linear_accumulate(dy: Tensor, x: Tensor, buffer: Tensor, ours: bool) -> None:
    """buffer += dyᵀ · x."""
    wgrad_product(_OP, dy, x, ours=ours, buffer=buffer)
    torch.autograd.graph.increment_version(buffer)


def _backward_fake(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, ours: list[bool], need_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    width = dy.shape[-1]
    return (
        dy.new_empty(0) if weight is None else dy.new_empty(*dy.shape[:-1], weight.shape[1]),
        dy.new_empty(0) if x is None else dy.new_empty(width, x.shape[-1]),
        dy.new_empty(width if need_dbias else 0),
    )


@_OP.function(fake=_backward_fake)
def linear_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, ours: list[bool], need_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty without weight), of weight (empty without x) and of bias."""
    return (
        dy.new_empty(0) if weight is None else dgrad_product(_OP, dy, weight, ours=ours[1]),
        dy.new_empty(0) if x is None else wgrad_product(_OP, dy, x, ours=ours[2]),
        as_matrix(dy).sum(0) if need_dbias else dy.new_empty(0),
    )


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor | None, ours: list[bool]
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.buffer, ctx.ours = inputs
    # The buffer is not among the saved tensors: that others add to it before this backward does is
    # what it is for, and torch would refuse it.
    need_dx, need_dweight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_dweight else None, weight if need_dx else None)


def _grads(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:3])
    if needed[1] and ctx.buffer is not None:
        if is_batch(dy):
            raise RuntimeError(
                "linear adds one gradient at a time to weight_grad_buffer; "
                "a batch of output gradients needs weight_grad_buffer=None"
            )
        linear_accumulate(dy, x, ctx.buffer, ctx.ours[2])
        x, needed[1] = None, False
    grads = linear_backward(dy, x, weight, ctx.ours, needed[2])
    return *[g if need else None for g, need in zip(grads, needed, strict=True)], None, None


@_OP.function(fake=_forward_fake, setup_context=_save, backward=_grads)
def linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor | None, ours: list[bool]
) -> Tensor:
    """x · Wᵀ + b; backward adds to the buffer. `ours` are forward, dgrad and wgrad."""
    return forward_product(_OP, x, weight, bias, ours=ours[0])


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_grad_buffer: Tensor | None = None,
) -> Tensor:
    """torch.nn.functional.linear: input · weightᵀ + bias.

    Args:
        input: [..., in_features] in float16, bfloat16, float32 or float64; any strides.
        weight: [out_features, in_features], of the same dtype; any strides. Under autocast input,
            weight and bias are cast first, as torch does it.
        bias: [out_features] or None.
        weight_grad_buffer: contiguous float32 (float64 for float64) of weight's shape. Backward
            adds the weight's gradient to it and gives the weight none: weight.grad stays as it is.
            Every backward through the layer adds, one that asks for the input's gradient alone too.
            Hooks of the weight are called, with None for a gradient, after the buffer is written.
            Where the weight needs no gradient, nothing is added.

    Returns:
        [..., out_features], contiguous. Differentiable once where a product is ours or there is a
        buffer.

    Raises:
        ValueError: shapes that do not fit, tensors on different devices.
        TypeError: dtypes that differ or are not floating point.
    """
    input, weight, bias = autocast(input, weight, bias)
    _check(input, weight, bias, weight_grad_buffer)
    out_features, in_features = weight.shape
    ours = choose(_OP, input, in_features, out_features)
    better = None if any(ours) else f"cuBLAS is faster for {in_features} to {out_features} features"
    uses_triton = _OP.uses_triton(input, torch_is_better=better)
    if not uses_triton and weight_grad_buffer is None:
        return linear_reference(input, weight, bias)
    if not uses_triton:
        ours = [False] * len(ours)
    return linear_forward(input, weight, bias, weight_grad_buffer, ours)


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor | None) -> None:
    if weight.dim() != 2:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; it must be [out_features, in_features]"
        )
    if input.dim() == 0:
        raise ValueError("input is a scalar; it must have a last dimension, as in input[None]")
    out_features = weight.shape[0]
    check_operands(
        input, "input", weight=(weight, (out_features, input.shape[-1])),
        bias=(bias, (out_features,)),
    )  # fmt: skip
    if buffer is None:
        return
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if buffer.dtype != dtype:
        raise TypeError(f"weight_grad_buffer is {buffer.dtype}; it must be {dtype}")
    if buffer.shape != weight.shape or not buffer.is_contiguous():
        raise ValueError(
            f"weight_grad_buffer has shape {tuple(buffer.shape)} and strides {buffer.stride()}; it "
            f"must be contiguous, of weight's shape {tuple(weight.shape)}"
        )
    if buffer.requires_grad:
        raise ValueError("weight_grad_buffer requires a gradient; give weight_grad_buffer.detach()")
    check_same_device(input=input, weight_grad_buffer=buffer)


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` with `linear` inside: same arguments, same state_dict.

    Attributes:
        weight_grad_buffer: as in `linear`; None until somebody sets it. It is no parameter and no
            buffer of the module: `to`, `half` and state_dict leave it alone.
    """

    weight_grad_buffer: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return linear(input, self.weight, self.bias, weight_grad_buffer=self.weight_grad_buffer)
