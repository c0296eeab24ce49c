"""`matmul`: checks, registration with torch.library, the gradient, the public function.

With z = s · A·B + bias, y = f(z) + residual and the gradient dy:

    dz = dy · f'(z)      dA = s · dz·Bᵀ      dB = s · Aᵀ·dz      dbias = Σ dz      dresidual = dy

Three products, each read from A, B and dz as they lie: no transpose is ever written to memory.
Backward needs z only to take f' of it, so z is not kept: where there is an activation, one more
product makes it anew, and f'(z) · dy leaves that kernel instead of z. Of A and B only what the
gradients asked for need is kept.
"""

from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._autocast import without_autocast
from tilewright_kernels._linear_losses import autocast
from tilewright_kernels._operator import Operator, check_floating, check_same_device
from tilewright_kernels.matmul.launches import (
    ACTIVATIONS,
    ALGORITHMS,
    PRECISIONS,
    Activation,
    Algorithm,
    Precision,
    launch_matmul,
)
from tilewright_kernels.matmul.reference import matmul_reference

OP = Operator("matmul")

OUT_DTYPES = (None, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _backward_fake(
    dy: Tensor, a: Tensor | None, b: Tensor | None, bias: Tensor | None, activation: str | None,
    scale: float, algorithm: str | None, precision: str | None,
    a_shape: list[int] | None, b_shape: list[int] | None, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    operand = dy if a is None and b is None else b if a is None else a
    assert operand is not None
    return (
        operand.new_empty(0 if a_shape is None else a_shape),
        operand.new_empty(0 if b_shape is None else b_shape),
        dy.new_empty(0) if bias is None or not need_bias else bias.new_empty(bias.shape),
    )


@OP.function(fake=_backward_fake)
def matmul_backward(
    dy: Tensor, a: Tensor | None, b: Tensor | None, bias: Tensor | None, activation: str | None,
    scale: float, algorithm: str | None, precision: str | None,
    a_shape: list[int] | None, b_shape: list[int] | None, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward: gradients of a, b and bias, empty where they are not needed.

    a is needed for b's gradient, b for a's, both where there is an activation; else they may be
    None. A gradient's shape is None where it is not needed.
    """
    da, db, dbias = _backward_fake(
        dy, a, b, bias, activation, scale, algorithm, precision, a_shape, b_shape, need_bias
    )
    dz = dy
    if activation is not None:
        assert a is not None
        assert b is not None
        dz = dy.new_empty(dy.shape, dtype=torch.promote_types(dy.dtype, a.dtype))
        launch_matmul(
            OP, a, b, dz, bias=bias, activation=f"{activation}_grad", factor=dy, scale=scale,
            algorithm=algorithm, precision=precision,
        )  # fmt: skip
    if bias is not None and need_bias:
        dtype = torch.promote_types(dz.dtype, torch.float32)
        dbias = _as_matrix(dz).sum(0, dtype=dtype).to(bias.dtype)
    if a_shape is not None:
        assert b is not None
        _product_into(da, dz.to(b.dtype), b.mT, scale, algorithm, precision)
    if b_shape is not None:
        assert a is not None
        dz = dz.to(a.dtype)
        if db.dim() == 2:  # Σ over the batch is a longer shared dimension
            a, dz = _as_matrix(a), _as_matrix(dz)
        _product_into(db, a.mT, dz, scale, algorithm, precision)
    return da, db, dbias


def _as_matrix(x: Tensor) -> Tensor:
    """x [*, K] as [rows, K], also where there is nothing in it."""
    return x.flatten(0, -2)


def _product_into(
    out: Tensor, a: Tensor, b: Tensor, scale: float, algorithm: str | None, precision: str | None
) -> None:
    """out = scale · A·B, summed in the accumulator's type where out was broadcast over a batch."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    each = out
    if out.shape[:-2] != batch:
        dtype = torch.promote_types(out.dtype, torch.float32)
        each = out.new_empty((*batch, *out.shape[-2:]), dtype=dtype)
    launch_matmul(OP, a, b, each, scale=scale, algorithm=algorithm, precision=precision)
    if each is not out:
        out.copy_(each.sum_to_size(out.shape))


def _forward_fake(
    a: Tensor, b: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None,
    scale: float, algorithm: str | None, precision: str | None, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]), dtype=out_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, bias, residual, ctx.activation, ctx.scale, ctx.algorithm, ctx.precision, _ = inputs
    ctx.shapes = a.shape, b.shape
    ctx.residual = None if residual is None else (residual.shape, residual.dtype)
    need_a, need_b, need_bias = ctx.needs_input_grad[:3]
    again = ctx.activation is not None and (need_a or need_b or need_bias)
    ctx.save_for_backward(
        a if need_b or again else None,
        b if need_a or again else None,
        bias if need_bias or again else None,
    )


def _grads(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    a, b, bias = ctx.saved_tensors
    need_a, need_b, need_bias, need_residual = ctx.needs_input_grad[:4]
    da = db = dbias = dresidual = None
    if need_a or need_b or need_bias:
        a_shape, b_shape = ctx.shapes
        da, db, dbias = matmul_backward(
            dy, a, b, bias, ctx.activation, ctx.scale, ctx.algorithm, ctx.precision,
            list(a_shape) if need_a else None, list(b_shape) if need_b else None, need_bias,
        )  # fmt: skip
    if need_residual:
        shape, dtype = ctx.residual
        dresidual = dy.sum_to_size(shape).to(dtype)
    grads = (da, need_a), (db, need_b), (dbias, need_bias), (dresidual, need_residual)
    return *(grad if needed else None for grad, needed in grads), *[None] * 5


@OP.function(fake=_forward_fake, setup_context=_save, backward=_grads)
def matmul_forward(
    a: Tensor, b: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None,
    scale: float, algorithm: str | None, precision: str | None, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Launch the forward over a [*, M, K] and b [*, K, N], whose batches broadcast."""
    out = _forward_fake(a, b, bias, residual, activation, scale, algorithm, precision, out_dtype)
    launch_matmul(
        OP, a, b, out, bias=bias, activation=activation, residual=residual, scale=scale,
        algorithm=algorithm, precision=precision,
    )  # fmt: skip
    return out


def matmul(
    input: Tensor,
    other: Tensor,
    *,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
    algorithm: Algorithm | None = None,
    precision: Precision | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Matrix product with what often follows it: activation(scale · input·other + bias) + residual.

    Dimensions as torch.matmul: the last two are multiplied, those before them are a batch and
    broadcast; a vector is a row on the left and a column on the right, and its dimension of 1 is
    dropped. Operands are read where they lie, whatever their strides: a transposed one, a slice or
    an expanded batch is not copied. Sums are float32 (float64 for float64) and rounded once, after
    the epilogue.

    Args:
        input: [*, M, K] or [K] in float16, bfloat16, float32 or float64.
        other: [*, K, N] or [K] of input's dtype. Under autocast both are cast first, as
            torch.matmul does it.
        bias: [N], added to each row, or None.
        activation: "relu", "gelu" (exact), "silu", "relu_squared" or None.
        residual: added after the activation, or None; broadcasts to the result.
        scale: multiplies the product, before the bias; a Python number.
        algorithm: a rung of the ladder, "naive", "grouped", "pipelined", "persistent" or
            "stream_k"; None takes the fastest. Operands that tensor descriptors cannot describe
            (rows that are no multiple of 16 bytes, float64) are "pipelined" where one of the last
            two is asked for.
        precision: of float32 operands: "tf32" copies them, rounded to 10 bits of mantissa, for the
            tensor cores, "ieee" does not; None follows torch.backends.cuda.matmul.allow_tf32.
        out_dtype: of the result, one of the same four; None is input's.

    Returns:
        [*, M, N], contiguous. Differentiable once, with respect to input, other, bias and residual.

    Raises:
        ValueError: shapes that do not fit, tensors on different devices, an unknown algorithm,
            activation or precision.
        TypeError: dtypes that differ or are none of the four, a scale that is a tensor.
    """
    input, other = autocast(input, other)
    shape = _check(input, other, bias, activation, residual, scale, algorithm, precision, out_dtype)
    if not OP.uses_triton(input):
        with without_autocast(input):
            return matmul_reference(
                input, other, bias=bias, activation=activation, residual=residual, scale=scale,
                out_dtype=out_dtype,
            )  # fmt: skip
    row, column = input.dim() == 1, other.dim() == 1
    if residual is not None:
        residual = residual.expand(shape)
        residual = residual.unsqueeze(-1) if column else residual
        residual = residual.unsqueeze(-2) if row else residual
    out = matmul_forward(
        input.unsqueeze(0) if row else input, other.unsqueeze(1) if column else other,
        bias, residual, activation, float(scale), algorithm, precision, out_dtype or input.dtype,
    )  # fmt: skip
    out = out.squeeze(-2) if row else out
    return out.squeeze(-1) if column else out


def _check(
    input: Tensor, other: Tensor, bias: Tensor | None, activation: str | None,
    residual: Tensor | None, scale: float, algorithm: str | None, precision: str | None,
    out_dtype: torch.dtype | None,
) -> torch.Size:  # fmt: skip
    """Raise on what a caller can get wrong; the result's shape."""
    check_floating("input", input)
    if other.dtype != input.dtype:
        raise TypeError(
            f"input is {input.dtype} and other {other.dtype}; they must be equal, for example "
            f"other.to({input.dtype})"
        )
    for name, x in (("bias", bias), ("residual", residual)):
        if x is not None:
            check_floating(name, x)
    if out_dtype not in OUT_DTYPES:
        raise TypeError(
            f"out_dtype is {out_dtype}; give float16, bfloat16, float32, float64 or None"
        )
    if isinstance(scale, Tensor):
        raise TypeError("scale is a tensor; give a Python number, as scale.item()")
    shape = _result_shape(input, other)
    if bias is not None and (other.dim() == 1 or bias.shape != other.shape[-1:]):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)} and other {tuple(other.shape)}; bias must hold "
            f"one number a column of other"
        )
    if residual is not None and not _expands(residual.shape, shape):
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}, which does not broadcast to the result's "
            f"{tuple(shape)}"
        )
    for name, value, choices in (
        ("activation", activation, ACTIVATIONS),
        ("algorithm", algorithm, ALGORITHMS),
        ("precision", precision, PRECISIONS),
    ):
        if value is not None and value not in choices:
            raise ValueError(f"{name} is {value!r}; choose from {', '.join(choices)} or None")
    check_same_device(input=input, other=other, bias=bias, residual=residual)
    return shape


def _result_shape(input: Tensor, other: Tensor) -> torch.Size:
    shapes = f"input has shape {tuple(input.shape)} and other {tuple(other.shape)}"
    if input.dim() == 0 or other.dim() == 0:
        raise ValueError(f"{shapes}; both need a dimension to multiply along")
    if input.shape[-1] != other.shape[-2 if other.dim() > 1 else 0]:
        raise ValueError(f"{shapes}; input's last dimension must be other's last but one")
    try:
        batch = torch.broadcast_shapes(input.shape[:-2], other.shape[:-2])
    except RuntimeError:
        raise ValueError(f"{shapes}; the dimensions before the last two do not broadcast") from None
    rows = input.shape[-2:-1] if input.dim() > 1 else ()
    cols = other.shape[-1:] if other.dim() > 1 else ()
    return torch.Size((*batch, *rows, *cols))


def _expands(shape: torch.Size, target: torch.Size) -> bool:
    """Whether a tensor of this shape expands to the target."""
    offset = len(target) - len(shape)
    return offset >= 0 and all(n in (1, m) for n, m in zip(shape, target[offset:], strict=True))
