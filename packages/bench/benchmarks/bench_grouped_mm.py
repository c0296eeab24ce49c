"""grouped_mm beside torch's, over [groups, rows, K, N]: rows of a go to random groups.

One product of rows x K x N forward, two backward: the second is the sum over each group's rows.
The bound is arithmetic.
"""

import pytest
import torch
import torch.nn.functional as F

from tilewright_bench import Case, Variant, Work, by_device, run, usual_providers, variants
from tilewright_kernels import grouped_mm, grouped_mm_reference

SHAPES = by_device(
    gpu=[
        (64, 131072, 2048, 2048),
        (64, 131072, 1024, 2048),
        (8, 32768, 4096, 28672),
        (8, 32768, 14336, 4096),
    ],
    cpu=[(3, 40, 16, 32)],
)
CHECKED_ROWS = 4096
"""Float64 products of all rows take seconds a provider."""


def ours(a, weight, offs):
    return grouped_mm(a, weight.mT, offs=offs)


def torchs(a, weight, offs):
    return F.grouped_mm(a, weight.mT, offs=offs)


def definition(a, weight, offs):
    return grouped_mm_reference(a, weight.mT, offs=offs)


def case(groups: int, rows: int, K: int, N: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    def inputs_of(rows, device, generator):
        options = {"device": device, "dtype": dtype, "generator": generator}
        a = torch.randn(rows, K, **options).requires_grad_()
        weight = torch.randn(groups, N, K, **options) / K**0.5
        of_row = torch.randint(groups, (rows,), device=device, generator=generator)
        offs = torch.bincount(of_row, minlength=groups).cumsum(0).int()
        return a, weight.requires_grad_(), offs

    product = 2 * rows * K * N
    activations, weights = rows * (K + N) * dtype.itemsize, groups * K * N * dtype.itemsize
    return Case(
        operator="grouped_mm",
        shape=(groups, rows, K, N),
        dtype=dtype,
        make_inputs=lambda device, generator: inputs_of(rows, device, generator),
        check_inputs=lambda device, generator: inputs_of(
            min(rows, CHECKED_ROWS), device, generator
        ),
        reference=definition,
        forward=Work(bytes=activations + weights, flops=product),
        backward=Work(
            bytes=activations + rows * K * dtype.itemsize + 2 * weights, flops=2 * product
        ),
    )


@pytest.mark.parametrize("variant", variants(usual_providers(ours, torchs)), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_grouped_mm(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)
