"""A·B of two symmetric matrices that commute, at half the work: their product is symmetric too.

    Y = α · A·B + β · C          C symmetric, as Y is
    dA = α · dY·B          dB = α · dYᵀ·A          dC = β · dY

All polynomials of one symmetric matrix commute. So the products of a Newton–Schulz iteration on the
small side (the Gram form) are of this kind, and those of a matrix with itself are
`symmetric_matmul`'s. Work, bytes, tiles and kernels are those of `symmetric_matmul`: blocks below
the diagonal are written twice, so that Y is symmetric to the bit. With rounded matrices, which
commute nearly, this keeps iterations from drifting off symmetry.
"""

from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._autocast import without_autocast
from tilewright_kernels._linear_losses import autocast
from tilewright_kernels._operator import Operator, check_floating, check_same_device
from tilewright_kernels._tf32 import rounded_to_tf32, tf32_is_allowed
from tilewright_kernels.symmetric_matmul import launch_triangle

_OP = Operator("commuting_matmul")


def commuting_matmul_reference(
    a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 0.0, c: Tensor | None = None
) -> Tensor:
    """The definition in plain torch, of the whole matrix; arguments as `commuting_matmul`."""
    dtype = a.dtype if a.dtype == torch.float64 else torch.float32
    y = alpha * (a.to(dtype) @ b.to(dtype).mT)
    if c is not None and beta != 0:
        y = y + beta * c.to(dtype)
    return y.to(a.dtype)


def _fake(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    return a.new_empty(a.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, _, ctx.alpha, ctx.beta = inputs
    need_a, need_b = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a if need_b else None, b if need_a else None)


def _grads(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    need_a, need_b, need_c = ctx.needs_input_grad[:3]
    with without_autocast(dy):
        da = ctx.alpha * (dy @ b) if need_a else None
        db = ctx.alpha * (dy.mT @ a) if need_b else None
    return da, db, ctx.beta * dy if need_c else None, None, None


@_OP.function(fake=_fake, setup_context=_save, backward=_grads)
def commuting_matmul_forward(
    a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float
) -> Tensor:
    """α · A·Bᵀ + β · C as a new tensor [*, M, M]."""
    y = _fake(a, b, c, alpha, beta)
    precision = "ieee"
    if a.dtype == torch.float32 and tf32_is_allowed():
        a, b, precision = rounded_to_tf32(_OP, a), rounded_to_tf32(_OP, b), "tf32"
    if y.numel() > 0:
        launch_triangle(_OP, a, b, None if beta == 0 else c, y, alpha, beta, precision)
    return y


def commuting_matmul(
    a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 0.0, c: Tensor | None = None
) -> Tensor:
    """alpha · A·B + beta · C for symmetric A and B with A·B = B·A; the lower triangle is computed.

    That A and B are symmetric and commute is not checked. Where they do not, the result is still
    symmetric, with the lower triangle of A·Bᵀ.

    Args:
        a: [*, M, M] in float16, bfloat16, float32 or float64, any strides. float32 is multiplied
            as tf32 where torch.backends.cuda.matmul.fp32_precision says so.
        b: of a's shape and dtype.
        alpha: scales the product; a Python number.
        beta: scales c, which is not read where beta is 0.
        c: of a's shape and dtype, symmetric: only its lower triangle counts.

    Returns:
        [*, M, M], contiguous, and symmetric to the bit. Differentiable once, with respect to a, b
        and c, each element on its own: dA = alpha · dY·B, dB = alpha · dYᵀ·A, dC = beta · dY.

    Raises:
        ValueError: a is not square, shapes differ, beta without c, tensors on different devices.
        TypeError: dtypes that are not floating point or differ, alpha or beta is a tensor.
    """
    a, b, c = autocast(a, b, c)
    _check(a, b, alpha, beta, c)
    if not _OP.uses_triton(a):
        with without_autocast(a):
            return commuting_matmul_reference(a, b, alpha=alpha, beta=beta, c=c)
    return commuting_matmul_forward(a, b, c, float(alpha), float(beta))


def _check(a: Tensor, b: Tensor, alpha: float, beta: float, c: Tensor | None) -> None:
    check_floating("a", a)
    if a.dim() < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"a has shape {tuple(a.shape)}; it must be square, [*, M, M]")
    for name, value in (("alpha", alpha), ("beta", beta)):
        if isinstance(value, Tensor):
            raise TypeError(f"{name} is a tensor; give a Python number, as {name}.item()")
    if c is None and beta != 0:
        raise ValueError(f"beta is {beta} and there is no c to scale; give c, or beta=0")
    for name, tensor in (("b", b), ("c", c)):
        if tensor is not None and tensor.shape != a.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and a {tuple(a.shape)}; they must be equal"
            )
        if tensor is not None and tensor.dtype != a.dtype:
            raise TypeError(
                f"a is {a.dtype} and {name} {tensor.dtype}; they must be equal, for example "
                f"{name}.to({a.dtype})"
            )
    check_same_device(a=a, b=b, c=c)
