"""linear beside torch's, over [tokens, in_features, out_features].

Forward is one product, backward two: dgrad and wgrad. The bound is arithmetic. Under backend auto
each product is made by whoever was faster when `_LINEAR_TABLE` was measured, so "tilewright" is
what a user gets and "triton" is ours in all three.
"""

import pytest
import torch
import torch.nn.functional as F

from tilewright_bench import Case, Variant, Work, by_device, run, variants
from tilewright_kernels import linear, use_backend

SHAPES = by_device(
    gpu=[
        *((16384, 1536, 1536), (16384, 1536, 8192), (16384, 4096, 1536)),
        *((16384, 4096, 4096), (16384, 4096, 22016), (16384, 11008, 4096)),
    ],
    cpu=[(16, 32, 48)],
)
CHECKED_TOKENS = 4096
"""Float64 products of all tokens take seconds a provider; of fewer, auto leaves them to torch."""


def ours(x, weight):
    with use_backend("triton"):
        return linear(x, weight)


def case(
    tokens: int, in_features: int, out_features: int, dtype: torch.dtype = torch.bfloat16
) -> Case:
    def inputs_of(tokens, device, generator):
        options = {"device": device, "dtype": dtype, "generator": generator}
        x = torch.randn(tokens, in_features, **options).requires_grad_()
        weight = torch.randn(out_features, in_features, **options) / in_features**0.5
        return x, weight.requires_grad_()

    read = (tokens + out_features) * in_features
    product = 2 * tokens * in_features * out_features
    written = tokens * out_features
    return Case(
        operator="linear",
        shape=(tokens, in_features, out_features),
        dtype=dtype,
        make_inputs=lambda device, generator: inputs_of(tokens, device, generator),
        check_inputs=lambda device, generator: inputs_of(
            min(tokens, CHECKED_TOKENS), device, generator
        ),
        reference=F.linear,
        forward=Work(bytes=(read + written) * dtype.itemsize, flops=product),
        backward=Work(bytes=(2 * read + written) * dtype.itemsize, flops=2 * product),
    )


PROVIDERS = {
    "tilewright": lambda: linear,
    "triton": lambda: ours,
    "torch": lambda: F.linear,
}


@pytest.mark.parametrize("variant", variants(PROVIDERS), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_linear(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)
