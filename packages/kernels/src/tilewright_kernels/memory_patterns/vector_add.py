"""The first kernels: x + y, alpha · x and alpha · x + y.

Start reading here. A kernel is a function that runs many times at once; each run is a program and
knows its number. Here program p takes elements p · BLOCK to (p + 1) · BLOCK: it loads, computes and
stores them. Nothing depends on anything else, so the order of the programs does not matter and the
time is that of the traffic: 3, 2 and 3 times the bytes of a vector. (These are three of the four
loops of the STREAM benchmark; the fourth is a copy.)

Tensors may have any shape: kernels see them as vectors. What is not contiguous is copied first.
"""

from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv
from tilewright_kernels._operator import Operator, accumulator, check_floating, check_same_device
from tilewright_kernels._triton import tl, triton

BLOCK, NUM_WARPS = 1024, 4
"""Elements of a program, and the warps that share them: 8 a thread, which are 16 bytes in half
precision, as many as one instruction can load."""

_VECTOR_ADD = Operator("vector_add")
_SCALE = Operator("scale")
_MULTIPLY_ADD = Operator("multiply_add")


def vector_add_reference(x: Tensor, y: Tensor) -> Tensor:
    """The definition in plain torch."""
    return x + y


def scale_reference(x: Tensor, alpha: float) -> Tensor:
    """The definition in plain torch."""
    return alpha * x


def multiply_add_reference(x: Tensor, alpha: float, y: Tensor) -> Tensor:
    """The definition in plain torch."""
    return torch.add(y, x, alpha=alpha)


@triton.jit
def _vector_add_kernel(x_ptr, y_ptr, out_ptr, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """out = x + y for one block: two elements in, one out, one addition."""
    # All programs run this code, and program_id is all that tells one from another. It is made
    # int64 because in int32 the product overflows from 2³¹ elements on.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # The last block may reach past the end: there it neither loads nor stores.
    mask = offsets < n
    # A pointer plus a vector of offsets is a vector of pointers, so this is BLOCK loads at once.
    # Which thread does which is up to the compiler, and it gives neighbours to neighbours.
    x = tl.load(x_ptr + offsets, mask=mask).to(ACC)
    y = tl.load(y_ptr + offsets, mask=mask).to(ACC)
    # Added in float32 (float64 for float64); the store rounds to the type that out_ptr points to.
    tl.store(out_ptr + offsets, x + y, mask=mask)


@triton.jit
def _scale_kernel(
    x_ptr, out_ptr, n,
    alpha: tl.float64,  # pyrefly: ignore[not-a-type]
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = alpha · x for one block."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask).to(ACC)
    # alpha comes in float64, for the sake of float64 tensors. Cast before it meets x: one wide
    # operand makes a product wide, and GPUs multiply float64 slowly.
    tl.store(out_ptr + offsets, tl.full([], alpha, ACC) * x, mask=mask)


@triton.jit
def _multiply_add_kernel(
    x_ptr, y_ptr, out_ptr, n,
    alpha: tl.float64,  # pyrefly: ignore[not-a-type]
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = alpha · x + y for one block, in one fused multiply-add an element."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask).to(ACC)
    y = tl.load(y_ptr + offsets, mask=mask).to(ACC)
    tl.store(out_ptr + offsets, tl.full([], alpha, ACC) * x + y, mask=mask)


def _launch(operator: Operator, kernel: Any, *tensors: Tensor, numbers: Any = ()) -> Tensor:
    """As many programs as there are blocks, the last one perhaps not full."""
    x, *rest = (t.contiguous() for t in tensors)
    out = torch.empty_like(x)
    operator.launch(
        kernel, (cdiv(x.numel(), BLOCK),), x, *rest, out, x.numel(), *numbers,
        ACC=accumulator(x.dtype), BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Of all inputs, gradients depend on alpha alone: no tensor is kept."""
    ctx.alpha = inputs[1]


def _vector_add_grads(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
    return dout, dout


@_VECTOR_ADD.function(fake=_fake, setup_context=_save, backward=_vector_add_grads)
def vector_add_forward(x: Tensor, y: Tensor) -> Tensor:
    """Launch x + y."""
    return _launch(_VECTOR_ADD, _vector_add_kernel, x, y)


def _scale_grads(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
    return scale_forward(dout, ctx.alpha), None


@_SCALE.function(fake=_fake, setup_context=_save, backward=_scale_grads)
def scale_forward(x: Tensor, alpha: float) -> Tensor:
    """Launch alpha · x."""
    return _launch(_SCALE, _scale_kernel, x, numbers=(alpha,))


def _multiply_add_grads(ctx: Any, dout: Tensor) -> tuple[Tensor | None, None, Tensor]:
    return scale_forward(dout, ctx.alpha) if ctx.needs_input_grad[0] else None, None, dout


@_MULTIPLY_ADD.function(fake=_fake, setup_context=_save, backward=_multiply_add_grads)
def multiply_add_forward(x: Tensor, alpha: float, y: Tensor) -> Tensor:
    """Launch alpha · x + y."""
    return _launch(_MULTIPLY_ADD, _multiply_add_kernel, x, y, numbers=(alpha,))


def vector_add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, element by element.

    Args:
        x: of any shape, in float16, bfloat16, float32 or float64.
        y: like x in shape and dtype.

    Returns:
        Like x, contiguous. Differentiable once.

    Raises:
        ValueError: shapes that differ (nothing is broadcast), tensors on different devices.
        TypeError: dtypes that differ or are not floating point.
    """
    _check(x, y)
    return vector_add_forward(x, y) if _VECTOR_ADD.uses_triton(x) else vector_add_reference(x, y)


def scale(x: Tensor, alpha: float) -> Tensor:
    """alpha · x; x as for `vector_add`, alpha a number."""
    _check(x, x)
    _check_number(alpha)
    return scale_forward(x, alpha) if _SCALE.uses_triton(x) else scale_reference(x, alpha)


def multiply_add(x: Tensor, alpha: float, y: Tensor) -> Tensor:
    """alpha · x + y, the axpy of BLAS; x and y as for `vector_add`, alpha a number."""
    _check(x, y)
    _check_number(alpha)
    if not _MULTIPLY_ADD.uses_triton(x):
        return multiply_add_reference(x, alpha, y)
    return multiply_add_forward(x, alpha, y)


def _check_number(alpha: float) -> None:
    if not isinstance(alpha, int | float):
        raise TypeError(
            f"alpha is a {type(alpha).__name__}; give a number, as in float(alpha): it has no "
            f"gradient here"
        )


def _check(x: Tensor, y: Tensor) -> None:
    check_floating("x", x)
    if x.shape != y.shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}; make them equal, as in "
            f"y.expand_as(x)"
        )
    if x.dtype != y.dtype:
        raise TypeError(f"x is {x.dtype} and y {y.dtype}; make them equal, as in y.to({x.dtype})")
    check_same_device(x=x, y=y)
