"""Device functions that kernels share: relative errors against float64 torch."""

from typing import Any

import pytest
import torch

from tilewright_kernels._launch import next_power_of_2
from tilewright_kernels._math import (
    exp,
    log1p,
    sigmoid,
    sigmoid_grad,
    silu,
    silu_grad,
    tanh,
    tanh_grad,
)
from tilewright_kernels._triton import tl, triton


@triton.jit
def _apply_kernel(x_ptr, y_ptr, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    tl.store(y_ptr + offsets, FUNCTION(x), mask=offsets < n)


def apply(function, x):
    kernel: Any = _apply_kernel
    y = torch.empty_like(x)
    kernel[(1,)](x, y, len(x), FUNCTION=function, BLOCK=next_power_of_2(len(x)))
    return y


def sech_squared(x):
    return torch.cosh(x).reciprocal().square()


# Magnitudes from far below a float32 epsilon, where naive forms return 0, to saturation.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("function", "expected", "signs", "largest"),
    [
        (tanh, torch.tanh, (1, -1), 50.0),
        (tanh_grad, sech_squared, (1, -1), 40.0),
        (log1p, torch.log1p, (1,), 1e30),
        (log1p, torch.log1p, (-1,), 0.999),
        (exp, torch.exp, (1, -1), 80.0),
    ],
    ids=["tanh", "tanh_grad", "log1p", "log1p-", "exp"],
)
def test_relative_error(function, expected, signs, largest, dtype, device):
    low, high = torch.log10(torch.tensor([1e-30, largest], dtype=torch.float64))
    magnitudes = torch.logspace(low, high, 500, dtype=torch.float64)
    near = torch.linspace(0.4, 1.1, 701, dtype=torch.float64)  # where the forms meet
    for sign in signs:
        x = (sign * torch.cat([magnitudes, near[near <= largest]])).to(device, dtype)
        oracle = expected(x.double())
        error = ((apply(function, x).double() - oracle) / oracle).abs().max()
        # The relative error of an exponential grows with its argument.
        allowed = largest + 6 if function in (exp, tanh_grad) else 6
        assert error < allowed * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("function", "derivative", "expected"),
    [(sigmoid, sigmoid_grad, torch.sigmoid), (silu, silu_grad, torch.nn.functional.silu)],
    ids=["sigmoid", "silu"],
)
def test_value_and_derivative(function, derivative, expected, dtype, device):
    # Both saturated ends, the middle and zero; derivatives by torch's autograd.
    x = torch.cat([torch.linspace(-90, 90, 31), torch.linspace(-2, 2, 31)]).to(device, dtype)
    wide = x.double().requires_grad_()
    value = expected(wide)
    (slope,) = torch.autograd.grad(value.sum(), wide)
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (0.0, 1e-13)
    torch.testing.assert_close(apply(function, x).double(), value.detach(), rtol=rtol, atol=atol)
    torch.testing.assert_close(apply(derivative, x).double(), slope, rtol=rtol, atol=atol)


def test_ends(device):
    x = torch.tensor([-torch.inf, torch.inf, torch.nan, 0.0, -1.0], device=device)
    torch.testing.assert_close(apply(tanh, x), torch.tanh(x), equal_nan=True)
    torch.testing.assert_close(apply(tanh_grad, x), sech_squared(x), equal_nan=True)
    torch.testing.assert_close(apply(exp, x), torch.exp(x), equal_nan=True)
    torch.testing.assert_close(apply(log1p, x), torch.log1p(x), equal_nan=True)
