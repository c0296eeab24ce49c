"""Layer normalization (Ba, Kiros & Hinton 2016, arXiv:1607.06450).

    y = x̂ · w + b          x̂ = (x - mean(x)) · r,  r = 1 / sqrt(var(x) + eps)

mean and var (divided by N, not N - 1) run over a row. With g = dy · w the gradient is

    dx = r · (g - mean(g) - x̂ · mean(g · x̂))          dw = Σ_rows dy · x̂          db = Σ_rows dy

Forward reads x and writes y; backward reads dy and x and writes dx: all else is small. The
variance is the mean of squared deviations, summed after the mean is known: mean(x²) - mean(x)²
would lose every digit where the mean is large. The kernels are those of `_norm_kernels`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._norm import check_arguments, norm_backward, norm_forward
from tilewright_kernels._operator import Operator

_OP = Operator("layer_norm")


def layer_norm_reference(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The definition in plain torch; arguments as `layer_norm`."""
    dims = tuple(range(-len(normalized_shape), 0))
    x = input if input.dtype == torch.float64 else input.float()
    centered = x - x.mean(dims, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(input.dtype)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    width: int,
    need_sums: bool,
) -> tuple[Tensor, Tensor]:
    like = weight if weight is not None else bias if bias is not None else x
    num_sums = 0 if not need_sums else 1 if bias is None else 2
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, like.new_empty(num_sums, width)


@_OP.function(fake=_backward_fake)
def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    width: int,
    need_sums: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the backward: dx like x; dw, and db where there is a bias, as [0, 1 or 2, width]."""
    dx, sums = _backward_fake(dy, x, weight, bias, mean, rstd, width, need_sums)
    norm_backward(_OP, dy, x, weight, mean, rstd, dx, sums if need_sums else None, width)
    return dx, sums


def _forward_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, width: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = torch.empty(x.numel() // max(width, 1), dtype=dtype, device=x.device)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, mean, torch.empty_like(mean)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, ctx.width, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _grads(ctx: Any, dy: Tensor | None, _mean: None, _rstd: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None, None
    x, weight, bias, mean, rstd = ctx.saved_tensors
    _, need_dweight, need_dbias, _, _ = ctx.needs_input_grad
    need_sums = need_dweight or need_dbias
    dx, sums = layer_norm_backward(dy, x, weight, bias, mean, rstd, ctx.width, need_sums)
    dweight = sums[0].view(weight.shape) if need_dweight else None
    dbias = sums[1].view(bias.shape) if need_dbias else None
    return dx, dweight, dbias, None, None


@_OP.function(fake=_forward_fake, setup_context=_save, backward=_grads)
def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, width: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward over rows of `width` elements: y like x, mean and r [rows]."""
    y, mean, rstd = _forward_fake(x, weight, bias, width, eps)
    norm_forward(_OP, x, weight, bias, y, mean, rstd, width, eps)
    return y, mean, rstd


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalization over the trailing dimensions, as torch.nn.functional.layer_norm.

    y = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias     (Ba et al. 2016, arXiv:1607.06450)

    Args:
        input: [..., *normalized_shape] in float16, bfloat16, float32 or float64; any strides.
        normalized_shape: the trailing dimensions that mean and variance run over.
        weight: of shape normalized_shape, any of these dtypes, or None.
        bias: likewise, of weight's dtype where both are given.
        eps: added to the variance.

    Returns:
        Like input, contiguous. Differentiable once, with respect to input, weight and bias.

    Raises:
        ValueError: shapes that do not fit, tensors on different devices.
        TypeError: a tensor is not floating point, or weight and bias differ in dtype.
    """
    shape = tuple(normalized_shape)
    check_arguments(input, shape, weight=weight, bias=bias)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise TypeError(
            f"weight is {weight.dtype} and bias {bias.dtype}; they must be equal, for example "
            f"bias.to({weight.dtype})"
        )
    if not _OP.uses_triton(input):
        return layer_norm_reference(input, shape, weight, bias, eps)
    if weight is not None:
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    return layer_norm_forward(input, weight, bias, math.prod(shape), eps)[0]


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` with `layer_norm` inside: same arguments, same state_dict."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize input [..., *normalized_shape]."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
