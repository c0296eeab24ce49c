"""Residual addition and root-mean-square normalization in one pass: a transformer's block boundary.

    h = x + residual          y = h · r · (w + offset),  r = 1 / sqrt(mean(h²) + eps)

h is both the next residual and what is normalized. Its gradient arrives on both ways; with
ĥ = h · r and g = dy · (w + offset), one pass adds them to the gradient of x and of residual alike:

    dx = dresidual = dh + r · (g - ĥ · mean(g · ĥ))          dw = Σ_rows dy · ĥ

Forward reads x and residual and writes h and y, where two operators would read h once more;
backward reads dy, dh and h and writes dx. h is rounded to its dtype before it is normalized, as
the two operators would: backward then sees the h that forward used.
"""

import math
from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._norm import check_arguments, default_eps, norm_backward, norm_forward
from tilewright_kernels._operator import Operator, check_same_device
from tilewright_kernels.rms_norm import RMSNorm, rms_norm_reference

_OP = Operator("add_rms_norm")


def add_rms_norm_reference(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The definition in plain torch; arguments as `add_rms_norm`."""
    shape = tuple(input.shape[-1:] if weight is None else weight.shape)
    return _reference(input, residual, shape, weight, eps, weight_offset)


def _reference(
    input: Tensor,
    residual: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    eps: float | None,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    h = input + residual
    eps = default_eps(eps, input.dtype)
    return rms_norm_reference(h, shape, weight, eps, weight_offset=weight_offset).to(input.dtype), h


def _backward_fake(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    width: int,
    weight_offset: float,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    dweight = h.new_empty(0) if weight is None or not need_dweight else torch.empty_like(weight)
    return torch.empty_like(h), dweight


@_OP.function(fake=_backward_fake)
def add_rms_norm_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    width: int,
    weight_offset: float,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the backward: dx like h, and dweight like weight (empty where it is not needed)."""
    dx, dweight = _backward_fake(dy, dh, h, weight, rstd, width, weight_offset, need_dweight)
    sums = dweight.view(-1, width) if need_dweight else None
    norm_backward(
        _OP, dy, h, weight, None, rstd, dx, sums, width, weight_offset=weight_offset, dh=dh
    )
    return dx, dweight


def _forward_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    width: int,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rstd = torch.empty(x.numel() // max(width, 1), dtype=dtype, device=x.device)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(residual, memory_format=torch.contiguous_format), rstd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, weight, ctx.width, _, ctx.weight_offset = inputs
    ctx.dtype = x.dtype
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight, output[2])


def _grads(ctx: Any, dy: Tensor | None, dh: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    h, weight, rstd = ctx.saved_tensors
    dx, dweight = dh, None
    if dy is not None:
        need_dweight = weight is not None and ctx.needs_input_grad[2]
        dx, sums = add_rms_norm_backward(
            dy, dh, h, weight, rstd, ctx.width, ctx.weight_offset, need_dweight
        )
        dweight = sums if need_dweight else None
    return None if dx is None else dx.to(ctx.dtype), dx, dweight, None, None, None


@_OP.function(fake=_forward_fake, setup_context=_save, backward=_grads)
def add_rms_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    width: int,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward over rows of `width` elements: y like x, h like residual, r [rows]."""
    y, h, rstd = _forward_fake(x, residual, weight, width, eps, weight_offset)
    norm_forward(
        _OP, x, weight, None, y, None, rstd, width, eps,
        weight_offset=weight_offset, residual=residual, h=h,
    )  # fmt: skip
    return y, h, rstd


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Add a residual and normalize the sum: `rms_norm` of h = input + residual, and h.

    y = h / sqrt(mean(h²) + eps) · (weight + offset)

    Args:
        input: [..., N] in float16, bfloat16, float32 or float64; any strides.
        residual: like input, or float32 beside an input of half precision: a residual stream
            that is kept in float32.
        weight: of the shape that is normalized: [N], or more of the trailing dimensions; any
            dtype. None normalizes over the last dimension.
        eps: added to the mean square; None takes the machine epsilon of input's dtype.
        weight_offset: added to weight in float32, as in `rms_norm`.

    Returns:
        The normalized sum in input's dtype, and the sum itself in residual's dtype, to which it
        is rounded before it is normalized; both contiguous. Differentiable once, with respect to
        input, residual and weight.

    Raises:
        ValueError: shapes that do not fit, tensors on different devices.
        TypeError: input or weight is not floating point, or residual is of another dtype.
    """
    shape = tuple(input.shape[-1:] if weight is None else weight.shape)
    return _add_rms_norm(input, residual, shape, weight, eps, weight_offset)


class AddRMSNorm(RMSNorm):
    """`add_rms_norm` as a module: `RMSNorm` that takes the residual too, and returns the sum."""

    # pyrefly: ignore[bad-override]
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize x + residual [..., *normalized_shape]; return the result and the sum."""
        shape = self.normalized_shape
        return _add_rms_norm(x, residual, shape, self.weight, self.eps, self.weight_offset)


def _add_rms_norm(
    input: Tensor,
    residual: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    eps: float | None,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    check_arguments(input, shape, weight=weight)
    _check_residual(input, residual)
    if not _OP.uses_triton(input):
        return _reference(input, residual, shape, weight, eps, weight_offset)
    if weight is not None:
        weight = weight.contiguous()
    eps = default_eps(eps, input.dtype)
    y, h, _ = add_rms_norm_forward(input, residual, weight, math.prod(shape), eps, weight_offset)
    return y, h


def _check_residual(input: Tensor, residual: Tensor) -> None:
    if residual.shape != input.shape:
        raise ValueError(
            f"input has shape {tuple(input.shape)} and residual {tuple(residual.shape)}; they "
            f"must be equal, for example residual.expand_as(input)"
        )
    half = input.dtype in (torch.float16, torch.bfloat16)
    if residual.dtype != input.dtype and not (half and residual.dtype == torch.float32):
        raise TypeError(
            f"input is {input.dtype} and residual {residual.dtype}; residual must be "
            f"{input.dtype}{' or float32' if half else ''}, for example "
            f"residual.to({input.dtype})"
        )
    check_same_device(input=input, residual=residual)
