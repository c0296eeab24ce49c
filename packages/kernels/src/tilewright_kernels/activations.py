"""Element-wise activations: relu, gelu (exact and tanh), silu and relu_squared.

    y = f(x)          dx = dy · f'(x)

One pair of kernels for all, with f and f' from `_math` as constants of the compiler. Forward reads
x and writes y; backward reads dy and one saved tensor and writes dx.

What is saved costs memory only if nobody else holds it. Between two projections, x is the output of
the first, which it does not keep; y is the input of the second, which it does. So relu and
relu_squared, whose slope follows from y, save y. gelu and silu fall and rise: two x can give one
y, and x is what they save; as does relu_squared in float16, which cannot hold 256².
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright_kernels import _math
from tilewright_kernels._elementwise import as_walked, load, store, tile_of_program, tiles
from tilewright_kernels._operator import Operator, accumulator, check_floating
from tilewright_kernels._triton import tl, triton

Approximation = Literal["none", "tanh"]


def relu_reference(input: Tensor) -> Tensor:
    """The definition in plain torch."""
    return F.relu(input).contiguous()


def gelu_reference(input: Tensor, approximate: Approximation = "none") -> Tensor:
    """The definition in plain torch; arguments as `gelu`."""
    return F.gelu(input, approximate=approximate).contiguous()


def silu_reference(input: Tensor) -> Tensor:
    """The definition in plain torch."""
    return F.silu(input).contiguous()


def relu_squared_reference(input: Tensor) -> Tensor:
    """The definition in plain torch."""
    return F.relu(input).square().contiguous()


@triton.jit
def _activation_fwd_kernel(
    x_ptr, y_ptr,
    x_row_stride, num_rows, n_cols,
    FUNCTION: tl.constexpr, ACC: tl.constexpr,
    FLAT: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = f(x) for a tile of ROWS x BLOCK_N; one read, one write an element."""
    rows, cols, mask, full = tile_of_program(num_rows, n_cols, FLAT, ROWS, BLOCK_N)
    x = load(x_ptr + rows * x_row_stride + cols, mask, full)
    store(y_ptr + rows * n_cols + cols, FUNCTION(x.to(ACC)), mask, full)


@triton.jit
def _activation_bwd_kernel(
    dy_ptr, saved_ptr, dx_ptr,
    dy_row_stride, saved_row_stride, num_rows, n_cols,
    SLOPE: tl.constexpr, ACC: tl.constexpr,
    FLAT: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx = dy · f' for a tile of ROWS x BLOCK_N; two reads, one write an element."""
    rows, cols, mask, full = tile_of_program(num_rows, n_cols, FLAT, ROWS, BLOCK_N)
    dy = load(dy_ptr + rows * dy_row_stride + cols, mask, full)
    saved = load(saved_ptr + rows * saved_row_stride + cols, mask, full)
    store(dx_ptr + rows * n_cols + cols, dy.to(ACC) * SLOPE(saved.to(ACC)), mask, full)


@triton.jit
def _relu_squared_grad_of_output(y):
    """d relu² / dx = 2 · √y."""
    return 2.0 * tl.sqrt(y)


def _register(
    operator: Operator, name: str, function: Any, slope: Any, *, saves_output: bool = False
) -> Callable[[Tensor], Tensor]:
    """Register `name`_forward and `name`_backward as launches of `operator`; return the forward.

    Args:
        operator: whose launches they are.
        name: what torch.ops.tilewright calls them.
        function: f, a device function.
        slope: f', a device function of x, or of y where saves_output.
        saves_output: keep y for backward instead of x.
    """

    def fake(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def backward_fake(dy: Tensor, saved: Tensor) -> Tensor:
        return fake(saved)

    def backward(dy: Tensor, saved: Tensor) -> Tensor:
        dx = fake(saved)
        if saved.numel() > 0:
            dy, saved = as_walked(dy, saved)
            grid, tile = tiles(*saved.shape)
            operator.launch(
                _activation_bwd_kernel, grid, dy, saved, dx,
                dy.stride(0), saved.stride(0), *saved.shape,
                SLOPE=slope, ACC=accumulator(saved.dtype), **tile._asdict(),
            )  # fmt: skip
        return dx

    def forward(x: Tensor) -> Tensor:
        y = fake(x)
        if x.numel() > 0:
            (x,) = as_walked(x)
            grid, tile = tiles(*x.shape)
            operator.launch(
                _activation_fwd_kernel, grid, x, y, x.stride(0), *x.shape,
                FUNCTION=function, ACC=accumulator(x.dtype), **tile._asdict(),
            )  # fmt: skip
        return y

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output if saves_output else inputs[0])

    def grads(ctx: Any, dy: Tensor) -> Tensor:
        return registered_backward(dy, *ctx.saved_tensors)

    backward.__name__, forward.__name__ = f"{name}_backward", f"{name}_forward"
    registered_backward = operator.function(fake=backward_fake)(backward)
    return operator.function(fake=fake, setup_context=save, backward=grads)(forward)


_RELU, _GELU, _SILU = Operator("relu"), Operator("gelu"), Operator("silu")
_RELU_SQUARED = Operator("relu_squared")

_relu = _register(_RELU, "relu", _math.relu, _math.relu_grad, saves_output=True)
_silu = _register(_SILU, "silu", _math.silu, _math.silu_grad)
_gelu = {
    "none": _register(_GELU, "gelu", _math.gelu, _math.gelu_grad),
    "tanh": _register(_GELU, "gelu_tanh", _math.gelu_tanh, _math.gelu_tanh_grad),
}
_relu_squared = _register(
    _RELU_SQUARED, "relu_squared", _math.relu_squared, _relu_squared_grad_of_output,
    saves_output=True,
)  # fmt: skip
_relu_squared_float16 = _register(
    _RELU_SQUARED, "relu_squared_float16", _math.relu_squared, _math.relu_squared_grad
)


def relu(input: Tensor) -> Tensor:
    """Rectified linear unit: max(input, 0).

    Args:
        input: any shape, in float16, bfloat16, float32 or float64.

    Returns:
        Like input, contiguous. Differentiable once; the output is what is kept for backward.

    Raises:
        TypeError: input is not floating point.
    """
    check_floating("input", input)
    return _relu(input) if _RELU.uses_triton(input) else relu_reference(input)


def gelu(input: Tensor, approximate: Approximation = "none") -> Tensor:
    """Gaussian error linear unit (Hendrycks & Gimpel 2016, arXiv:1606.08415).

    y = x · Φ(x), Φ(x) = (1 + erf(x / √2)) / 2; with approximate="tanh"
    y = x · (1 + tanh(√(2/π) · (x + 0.044715·x³))) / 2, as GPT-2 has it.

    Args:
        input: any shape, in float16, bfloat16, float32 or float64.
        approximate: "none" or "tanh".

    Returns:
        Like input, contiguous. Differentiable once.

    Raises:
        ValueError: approximate is neither.
        TypeError: input is not floating point.
    """
    check_floating("input", input)
    check_approximate(approximate)
    if not _GELU.uses_triton(input):
        return gelu_reference(input, approximate)
    return _gelu[approximate](input)


def silu(input: Tensor) -> Tensor:
    """Sigmoid linear unit, also called swish: x · sigmoid(x).

    Args:
        input: any shape, in float16, bfloat16, float32 or float64.

    Returns:
        Like input, contiguous. Differentiable once.

    Raises:
        TypeError: input is not floating point.
    """
    check_floating("input", input)
    return _silu(input) if _SILU.uses_triton(input) else silu_reference(input)


def relu_squared(input: Tensor) -> Tensor:
    """max(input, 0)², the activation of Primer (So et al. 2021, arXiv:2109.08668).

    Args:
        input: any shape, in float16, bfloat16, float32 or float64.

    Returns:
        Like input, contiguous. Differentiable once; the output is what is kept for backward, and
        of float16 the input: the squares of the other types leave their range only far out, where
        input is not between 10⁻¹⁹ and 10¹⁹ and the gradient becomes 0 or infinite with them.

    Raises:
        TypeError: input is not floating point.
    """
    check_floating("input", input)
    if not _RELU_SQUARED.uses_triton(input):
        return relu_squared_reference(input)
    return (_relu_squared_float16 if input.dtype == torch.float16 else _relu_squared)(input)


def check_approximate(approximate: str) -> None:
    """Raise unless gelu knows the approximation."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate is {approximate!r}; it must be 'none' or 'tanh'")


def check_not_inplace(inplace: bool) -> None:
    """Raise where torch's module would overwrite its input: these kernels write a new tensor."""
    if inplace:
        raise ValueError("inplace is True; the kernels always write a new tensor, so leave it out")


class ReLU(torch.nn.ReLU):
    """`torch.nn.ReLU` with `relu` inside: same arguments, but never in place."""

    def __init__(self, inplace: bool = False) -> None:
        check_not_inplace(inplace)
        super().__init__()

    def forward(self, input: Tensor) -> Tensor:
        """Any shape to the same."""
        return relu(input)


class GELU(torch.nn.GELU):
    """`torch.nn.GELU` with `gelu` inside: same arguments."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape to the same."""
        return gelu(input, self.approximate)  # pyrefly: ignore[bad-argument-type]


class SiLU(torch.nn.SiLU):
    """`torch.nn.SiLU` with `silu` inside: same arguments, but never in place."""

    def __init__(self, inplace: bool = False) -> None:
        check_not_inplace(inplace)
        super().__init__()

    def forward(self, input: Tensor) -> Tensor:
        """Any shape to the same."""
        return silu(input)


class ReLUSquared(torch.nn.Module):
    """`relu_squared` as a module, without parameters."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape to the same."""
        return relu_squared(input)
