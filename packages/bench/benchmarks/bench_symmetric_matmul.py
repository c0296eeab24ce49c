"""symmetric_matmul beside torch's product; shapes are batch x M x K, of the polynomial batch x M.

Forward moves X in and the result out, backward dY and X in and dX out. The least work of the
forward is half a product's, M²·K floating-point operations a matrix, since a symmetric matrix is
known by its lower half; torch does twice that. Backward has nothing to halve.
"""

import pytest
import torch
from torch import Tensor

from tilewright_bench import (
    Case,
    Variant,
    Work,
    by_device,
    normal_inputs,
    run,
    usual_providers,
    variants,
)
from tilewright_kernels import symmetric_matmul

SHAPES = by_device(
    gpu=[(16, 1536, 4096), (4, 4096, 4096), (16, 1536, 1536), (1, 1536, 4096)], cpu=[(2, 24, 16)]
)
POLYNOMIALS = by_device(gpu=[(16, 1536), (4, 4096)], cpu=[(2, 24)])
B, C = -4.775, 2.0315
"""Coefficients of a Newton–Schulz step, b·A + c·A²."""


def product(x: Tensor) -> Tensor:
    return torch.bmm(x, x.mT)


def polynomial(a: Tensor) -> Tensor:
    return symmetric_matmul(a, alpha=C, beta=B, c=a)


def torch_polynomial(a: Tensor) -> Tensor:
    return torch.baddbmm(a, a, a, beta=B, alpha=C)


def case(batch: int, M: int, K: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    work = Work(bytes=batch * M * (M + K) * dtype.itemsize, flops=batch * M * M * K)
    return Case(
        operator="symmetric_matmul",
        shape=(batch, M, K),
        dtype=dtype,
        make_inputs=normal_inputs((batch, M, K), dtype=dtype),
        reference=product,
        forward=work,
        # dY + dYᵀ, and its product with X.
        backward=Work(
            bytes=batch * M * (M + 2 * K) * dtype.itemsize,
            flops=batch * M * M * (2 * K + 1),
        ),
    )


def polynomial_case(batch: int, M: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    def make_inputs(device, generator):
        x = torch.randn(batch, M, M, device=device, dtype=dtype, generator=generator)
        # A norm of about 1, as in Newton–Schulz: else A² is all that counts.
        return ((x + x.mT) / (2 * M**0.5),)

    work = Work(bytes=2 * batch * M * M * dtype.itemsize, flops=batch * M * M * (M + 3))
    return Case(
        operator="symmetric_polynomial",
        shape=(batch, M),
        dtype=dtype,
        make_inputs=make_inputs,
        reference=torch_polynomial,
        forward=work,
        backward=work,
    )


@pytest.mark.parametrize("variant", variants(usual_providers(symmetric_matmul, product)), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_symmetric_matmul(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)


@pytest.mark.parametrize(
    "variant", variants(usual_providers(polynomial, torch_polynomial), ("fwd",)), ids=str
)
@pytest.mark.parametrize("case", [polynomial_case(*shape) for shape in POLYNOMIALS], ids=str)
def bench_symmetric_polynomial(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)
