"""skinny_linear beside plain torch: products of a 0.5 B decoder's step, over [rows, in, out].

The weights are read once; x, the norm's weight and y are thousandths of them. Each case is a
product with what surrounds it in a block: q, k and v after a norm, the output's with the residual,
gate and up after a norm with SwiGLU, the MLP's last with the residual, and the head after a norm.
"""

import pytest
import torch

from tilewright_bench import Case, Variant, Work, by_device, run, usual_providers, variants
from tilewright_kernels import skinny_linear, skinny_linear_reference

# In, out, what surrounds it.
PRODUCTS = by_device(
    gpu=[
        (1536, 4608, "norm"),
        (1536, 1536, "residual"),
        (1536, 4096, "gated"),
        (4096, 1536, "residual"),
        (1536, 32768, "norm"),
    ],
    cpu=[(32, 48, "norm"), (32, 24, "gated")],
)
ROWS = by_device(gpu=(1, 32), cpu=(1, 2))


def of(function):
    def call(x, weight, norm_weight, residual, gated):
        return function(
            x, weight, norm_weight=norm_weight, eps=1e-6, residual=residual, gated=gated
        )

    return call


def case(rows: int, k: int, n: int, form: str, dtype: torch.dtype = torch.bfloat16) -> Case:
    gated = form == "gated"

    def make_inputs(device, generator):
        options = {"device": device, "dtype": dtype, "generator": generator}
        x = torch.randn(rows, k, **options)
        weight = torch.randn(n * (2 if gated else 1), k, **options) / k**0.5
        adds = form == "residual"
        norm_weight = None if adds else torch.randn(k, **options) / 10 + 1
        return x, weight, norm_weight, torch.randn(rows, n, **options) if adds else None, gated

    weights = n * k * (2 if gated else 1)
    beside = rows * n * 2 + rows * k if form == "residual" else rows * n + rows * k + k
    work = Work(bytes=(weights + beside) * dtype.itemsize, flops=2 * rows * weights)
    return Case(
        operator="skinny_linear",
        shape=(rows, k, n),
        dtype=dtype,
        make_inputs=make_inputs,
        reference=of(skinny_linear_reference),
        forward=work,
        backward=work,  # there is none
    )


PROVIDERS = usual_providers(of(skinny_linear), of(skinny_linear_reference))
CASES = [case(rows, *product) for rows in ROWS for product in PRODUCTS]


@pytest.mark.parametrize("variant", variants(PROVIDERS, ("fwd",)), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_skinny_linear(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)
