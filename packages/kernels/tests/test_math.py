"""Device functions that kernels share: relative errors against float64 torch."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tilewright_kernels._launch import next_power_of_2
from tilewright_kernels._math import (
    exp,
    gelu,
    gelu_grad,
    gelu_tanh,
    gelu_tanh_grad,
    log1p,
    logistic,
    normal,
    relu,
    relu_grad,
    relu_squared,
    relu_squared_grad,
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
    [
        (silu, silu_grad, F.silu),
        (gelu, gelu_grad, F.gelu),
        (gelu_tanh, gelu_tanh_grad, partial(F.gelu, approximate="tanh")),
        (relu, relu_grad, F.relu),
        (relu_squared, relu_squared_grad, lambda x: F.relu(x).square()),
    ],
    ids=["silu", "gelu", "gelu_tanh", "relu", "relu_squared"],
)
def test_value_and_derivative(function, derivative, expected, dtype, device):
    # Both saturated ends, the middle and zero; derivatives by torch's autograd.
    x = torch.cat([torch.linspace(-90, 90, 31), torch.linspace(-6, 6, 301)]).to(device, dtype)
    wide = x.double().requires_grad_()
    value = expected(wide)
    (slope,) = torch.autograd.grad(value.sum(), wide)
    rtol, atol = (1e-6, 1e-6) if dtype == torch.float32 else (0.0, 1e-13)
    torch.testing.assert_close(apply(function, x).double(), value.detach(), rtol=rtol, atol=atol)
    torch.testing.assert_close(apply(derivative, x).double(), slope, rtol=rtol, atol=atol)


@triton.jit
def _normal_distribution(x):
    return normal(x)[0]


@triton.jit
def _normal_density(x):
    return normal(x)[1]


@triton.jit
def _logistic_distribution(x):
    return logistic(x)[0]


@triton.jit
def _logistic_density(x):
    return logistic(x)[1]


# Both tails: what is small keeps its digits, which 1 + erf, 1 - Λ and Λ · (1 - Λ) would not. The
# fit to Φ in float32 gives up some of them, on purpose.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("function", "expected", "largest", "rtol"),
    [
        (_normal_distribution, lambda x: torch.special.erfc(-x / 2**0.5) / 2, 9.0, 1e-3),
        (_normal_density, lambda x: torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5, 9.0, 1e-5),
        (_logistic_distribution, torch.sigmoid, 80.0, 1e-5),
        (_logistic_density, lambda x: torch.cosh(x / 2).square().reciprocal() / 4, 80.0, 1e-5),
    ],
    ids=["normal distribution", "normal density", "logistic distribution", "logistic density"],
)
def test_distributions(function, expected, largest, rtol, dtype, device):
    if function is _normal_distribution and dtype == torch.float64:
        largest = 3.0  # 1 + erf: all there is in float64
    x = torch.linspace(-largest, largest, 1001).to(device, dtype)
    ours, oracle = apply(function, x).double(), expected(x.double())
    assert (ours - oracle).abs().max() < 2 * torch.finfo(dtype).eps
    rtol = rtol if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours, oracle, rtol=rtol, atol=0.0)


def test_ends(device):
    x = torch.tensor([-torch.inf, torch.inf, torch.nan, 0.0, -1.0], device=device)
    torch.testing.assert_close(apply(tanh, x), torch.tanh(x), equal_nan=True)
    torch.testing.assert_close(apply(tanh_grad, x), sech_squared(x), equal_nan=True)
    torch.testing.assert_close(apply(exp, x), torch.exp(x), equal_nan=True)
    torch.testing.assert_close(apply(log1p, x), torch.log1p(x), equal_nan=True)
    torch.testing.assert_close(apply(relu, x), torch.relu(x), equal_nan=True)
    for function, expected in ((silu, F.silu), (gelu, F.gelu)):
        torch.testing.assert_close(apply(function, x), expected(x.double()).float(), equal_nan=True)
