"""truncation_threshold beside plain torch: logits in, the smallest that may be drawn out, a row.

Logits are read once, which is what is counted; ours walks them again for every bit, in cache.
torch's functions sort, or select where no row's top_k is larger than 64.
Ours is the bisection, also where backend auto would have torch select.
"""

import pytest
import torch

from tilewright_bench import Case, Variant, Work, by_device, run, usual_providers, variants
from tilewright_kernels import (
    truncation_threshold,
    truncation_threshold_reference,
    use_backend,
)

# Rows, vocabulary, top_k (all of it: none), at temperature 0.8 and top_p 0.95.
SHAPES = by_device(
    gpu=[
        (1, 32768, 50),
        (32, 32768, 50),
        (32, 32768, 32768),
        (32, 151936, 50),
        (32, 151936, 151936),
    ],
    cpu=[(2, 64, 5)],
)


def of(function):
    def call(logits, temperature, top_k, top_p, min_p, candidates):
        return function(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            candidates=candidates,
        )  # fmt: skip

    return call


def bisection(logits, **options):
    with use_backend(truncation_threshold="triton"):
        return truncation_threshold(logits, **options)


def case(rows: int, size: int, top_k: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    def make_inputs(device, generator):
        logits = torch.randn(rows, size, device=device, dtype=dtype, generator=generator) * 3
        one = torch.ones(rows, device=device)
        most = torch.full((rows,), top_k, device=device)
        return logits, 0.8 * one, most, 0.95 * one, 0 * one, 64 if top_k < size else size

    # A comparison and a sum a logit, were each looked at once.
    work = Work(bytes=rows * (size * dtype.itemsize + 24), flops=4 * rows * size)
    return Case(
        operator="truncation_threshold",
        shape=(rows, size, top_k),
        dtype=dtype,
        make_inputs=make_inputs,
        reference=of(truncation_threshold_reference),
        forward=work,
        backward=work,  # there is none
    )


PROVIDERS = usual_providers(of(bisection), of(truncation_threshold_reference))


@pytest.mark.parametrize("variant", variants(PROVIDERS, ("fwd",)), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_truncation_threshold(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)
