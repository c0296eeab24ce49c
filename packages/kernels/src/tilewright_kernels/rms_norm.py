"""Root-mean-square normalization (Zhang & Sennrich 2019, arXiv:1910.07467).

    y = x · r · (w + offset)          r = 1 / sqrt(mean(x²) + eps), one number a row

With x̂ = x · r and g = dy · (w + offset) the gradient is

    dx = r · (g - x̂ · mean(g · x̂))          dw = Σ_rows dy · x̂

Forward reads x and writes y; backward reads dy and x and writes dx: all else (r, w, dw) is small.
Everything is computed in float32 (float64 for float64) and rounded once, weight included, as
torch.nn.functional.rms_norm does. The kernels are those of `_norm_kernels`, less other terms.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._norm import check_arguments, default_eps, norm_backward, norm_forward
from tilewright_kernels._operator import Operator

_OP = Operator("rms_norm")


def rms_norm_reference(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> Tensor:
    """The definition in plain torch; arguments as `rms_norm`."""
    dims = tuple(range(-len(normalized_shape), 0))
    x = input if input.dtype == torch.float64 else input.float()
    y = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + default_eps(eps, input.dtype))
    if weight is not None:
        y = y * (weight.to(x.dtype) + weight_offset)
    return y.to(input.dtype)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    width: int,
    need_dweight: bool,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    dweight = x.new_empty(0) if weight is None or not need_dweight else torch.empty_like(weight)
    return torch.empty_like(x, memory_format=torch.contiguous_format), dweight


@_OP.function(fake=_backward_fake)
def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    width: int,
    need_dweight: bool,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Launch the backward: dx like x, and dweight like weight (empty where it is not needed)."""
    dx, dweight = _backward_fake(dy, x, weight, rstd, width, need_dweight)
    sums = dweight.view(-1, width) if need_dweight else None
    norm_backward(_OP, dy, x, weight, None, rstd, dx, sums, width, weight_offset=weight_offset)
    return dx, dweight


def _forward_fake(
    x: Tensor, weight: Tensor | None, width: int, eps: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rstd = torch.empty(x.numel() // max(width, 1), dtype=dtype, device=x.device)
    return torch.empty_like(x, memory_format=torch.contiguous_format), rstd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.width, _, ctx.weight_offset = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _grads(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None, None
    x, weight, rstd = ctx.saved_tensors
    need_dweight = weight is not None and ctx.needs_input_grad[1]
    dx, dweight = rms_norm_backward(dy, x, weight, rstd, ctx.width, need_dweight, ctx.weight_offset)
    return dx, dweight if need_dweight else None, None, None, None


@_OP.function(fake=_forward_fake, setup_context=_save, backward=_grads)
def rms_norm_forward(
    x: Tensor, weight: Tensor | None, width: int, eps: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Launch the forward over rows of `width` elements: y like x, and r [rows]."""
    y, rstd = _forward_fake(x, weight, width, eps)
    norm_forward(_OP, x, weight, None, y, None, rstd, width, eps, weight_offset=weight_offset)
    return y, rstd


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> Tensor:
    """Root-mean-square normalization over the trailing dimensions.

    y = x / sqrt(mean(x²) + eps) · (weight + offset)      (Zhang & Sennrich 2019, arXiv:1910.07467)

    Args:
        input: [..., *normalized_shape] in float16, bfloat16, float32 or float64; any strides.
        normalized_shape: the trailing dimensions that the mean runs over.
        weight: of shape normalized_shape, any of these dtypes, or None.
        eps: added to the mean square; None takes the machine epsilon of input's dtype, as torch.
        weight_offset: added to weight in float32. Gemma takes 1: its weights are near 0, where
            bfloat16 is finest. Without a weight it does nothing.

    Returns:
        Like input, contiguous. Differentiable once, with respect to input and weight.

    Raises:
        ValueError: shapes that do not fit, tensors on different devices.
        TypeError: input or weight is not floating point.
    """
    shape = tuple(normalized_shape)
    check_arguments(input, shape, weight=weight)
    if not _OP.uses_triton(input):
        return rms_norm_reference(input, shape, weight, eps, weight_offset=weight_offset)
    if weight is not None:
        weight = weight.contiguous()
    eps = default_eps(eps, input.dtype)
    return rms_norm_forward(input, weight, math.prod(shape), eps, weight_offset)[0]


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` with `rms_norm` inside: same arguments, same state_dict.

    Args:
        normalized_shape: the trailing dimensions that are normalized.
        eps: as in `rms_norm`.
        elementwise_affine: whether there is a weight.
        device: of the weight.
        dtype: of the weight.
        weight_offset: added to the weight, which starts at 1 - weight_offset.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_offset: float = 0.0,
    ) -> None:
        self.weight_offset = weight_offset  # before torch's own, which fills the weight
        shape = normalized_shape if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        """Fill the weight so that weight + weight_offset is 1."""
        if self.elementwise_affine:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def extra_repr(self) -> str:
        """Torch's, and the offset where there is one."""
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return super().extra_repr() + offset

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., *normalized_shape]."""
        return rms_norm(
            x, self.normalized_shape, self.weight, self.eps, weight_offset=self.weight_offset
        )
