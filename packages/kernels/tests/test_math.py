"""Device functions that kernels share: relative errors against float64 torch."""

import pytest
import torch

from tilewright_kernels._launch import next_power_of_2
from tilewright_kernels._math import log1p, tanh, tanh_grad
from tilewright_kernels._triton import tl, triton

@triton.jit
def _apply_kernel(x_ptr, y_ptr, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    tl.store(y_ptr + offsets, FUNCTION(x), mask=offsets < n)


def apply(function, x):
    y = torch.empty_like(x)
    _OP.launch(_apply_kernel, (1,), x, y, len(x), FUNCTION=function, BLOCK=next_power_of_2(len(x)))
    return y


def sech_squared(x):
    return torch.cosh(x).reciprocal().square()


# Magnitudes from far below a float32 epsilon, where naive forms return 0, to saturation.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("function", "expected", "signs", "largest"),
    [(tanh, torch.tanh, (1, -1), 50.0), (tanh_grad, sech_squared, (1, -1), 40.0)]
    + [(log1p, torch.log1p, (1,), 1e30)],
    ids=["tanh", "tanh_grad", "log1p"],
)
def test_relative_error(function, expected, signs, largest, dtype, device):
    low, high = torch.log10(torch.tensor([1e-30, largest], dtype=torch.float64))
    magnitudes = torch.logspace(low, high, 500, dtype=torch.float64)
    near = torch.linspace(0.4, 0.6, 101, dtype=torch.float64)  # where the forms meet
    for sign in signs:
        x = (sign * torch.cat([magnitudes, near])).to(device, dtype)
        oracle = expected(x.double())
        error = ((apply(function, x).double() - oracle) / oracle).abs().max()
        # Arguments of exp() grow to 100, and with them its relative error.
        assert error < (120 if function is tanh_grad else 6) * torch.finfo(dtype).eps
