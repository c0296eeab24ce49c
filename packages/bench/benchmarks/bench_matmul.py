"""matmul beside torch's product, and its rungs beside each other; shapes are M x N x K.

The three products of a linear layer, of 16384 tokens: nt, A·Bᵀ, is its forward, nn the gradient of
its input, tn, Aᵀ·B, the gradient of its weight. What is transposed is only read so.

Forward only: the gradient of a product is two products. The rungs stand in a table of their own,
since a device at its power limit runs faster right after a slow kernel.
"""

from functools import partial
from typing import Any

import pytest
import torch

from tilewright_bench import Case, Variant, Work, by_device, run, variants
from tilewright_kernels import matmul

TOKENS, LAYERS = by_device(
    gpu=(
        16384,
        ((1536, 1536), (1536, 8192), (4096, 1536), (4096, 4096), (4096, 22016), (11008, 4096)),
    ),
    cpu=(32, ((16, 48),)),
)
"""Inputs and outputs of a layer."""

LADDER = by_device(gpu=(16384, 4096, 4096), cpu=(32, 48, 16))
RUNGS: tuple[Any, ...] = ("naive", "grouped", "pipelined", "persistent", "stream_k")


def case(operator: str, M: int, N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    first, second = "nt" if operator == "matmul_ladder" else operator[-2:]

    def make_inputs(device, generator):
        options = {"device": device, "dtype": dtype, "generator": generator}
        a = torch.randn(*((K, M) if first == "t" else (M, K)), **options)
        b = torch.randn(*((N, K) if second == "t" else (K, N)), **options)
        return a.T if first == "t" else a, b.T if second == "t" else b

    work = Work(bytes=(M * K + K * N + M * N) * dtype.itemsize, flops=2 * M * N * K)
    return Case(
        operator=operator,
        shape=(M, N, K),
        dtype=dtype,
        make_inputs=make_inputs,
        reference=torch.matmul,
        forward=work,
        backward=work,
    )


PRODUCTS = [
    case(operator, *sizes)
    for inputs, outputs in LAYERS
    for operator, sizes in (
        ("matmul_nt", (TOKENS, outputs, inputs)),
        ("matmul_nn", (TOKENS, inputs, outputs)),
        ("matmul_tn", (outputs, inputs, TOKENS)),
    )
]
PROVIDERS = {"tilewright": lambda: matmul, "torch": lambda: torch.matmul}
LADDER_PROVIDERS = PROVIDERS | {
    rung: lambda rung=rung: partial(matmul, algorithm=rung) for rung in RUNGS
}


@pytest.mark.parametrize("variant", variants(PROVIDERS, ("fwd",)), ids=str)
@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: f"{case.operator}-{case}")
def bench_matmul(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)


@pytest.mark.parametrize("variant", variants(LADDER_PROVIDERS, ("fwd",)), ids=str)
@pytest.mark.parametrize("case", [case("matmul_ladder", *LADDER)], ids=str)
def bench_matmul_ladder(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)
