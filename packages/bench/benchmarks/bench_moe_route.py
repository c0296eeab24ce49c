"""moe_route over [T, E, k], the way of its rows [T, k, N], and what its losses need [T, E].

Routing reads T·E logits and writes four numbers a choice: a few megabytes, so what is timed is how
many launches there are and how long each waits. torch's way is softmax, topk and a stable sort of
the chosen experts. The way of the rows is bound by the memory: a copy is its ceiling.
"""

import pytest
import torch
from torch import Tensor

from tilewright_bench import Case, Variant, Work, by_device, normal_inputs, run, variants
from tilewright_bench import usual_providers as usual
from tilewright_kernels import (
    Permutation,
    moe_permutation,
    moe_route,
    moe_route_reference,
    router_statistics,
    router_statistics_reference,
)

ROUTES = by_device(
    gpu=[(16384, 128, 8), (16384, 64, 8), (16384, 256, 8), (16384, 8, 2)], cpu=[(40, 8, 2)]
)
ROWS = by_device(gpu=[(16384, 8, 2048), (16384, 2, 4096)], cpu=[(12, 2, 64)])
STATISTICS = by_device(gpu=[(16384, 128), (16384, 8)], cpu=[(40, 8)])
EXPERTS = 64


def ours(logits: Tensor, k: int) -> tuple[Tensor, ...]:
    return tuple(moe_route(logits, k))


def definition(logits: Tensor, k: int) -> tuple[Tensor, ...]:
    return tuple(moe_route_reference(logits, k))


def topk_and_sort(logits: Tensor, k: int) -> tuple[Tensor, ...]:
    probabilities, ids = logits.float().softmax(-1).topk(k)
    experts = ids.flatten()
    ones = torch.ones_like(experts, dtype=torch.int32)
    counts = ones.new_zeros(logits.shape[1]).scatter_add(0, experts, ones)
    indices = experts.argsort(stable=True)
    rows = torch.arange(len(experts), dtype=torch.int32, device=logits.device)
    inverse = torch.empty_like(rows).scatter(0, indices, rows)
    weights = probabilities / probabilities.sum(-1, keepdim=True)
    offs = counts.cumsum(0, dtype=torch.int32)
    return weights, ids.int(), counts, offs, indices.int(), inverse


def route_case(tokens: int, experts: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    def make_inputs(device, generator):
        # Ranks: no two logits of a token are equal, where topk's choice would not be unique.
        ranks = torch.rand(tokens, experts, device=device, generator=generator).argsort(-1)
        return ((ranks / 32).to(dtype).requires_grad_(), k)

    size, choices = tokens * experts, tokens * k
    return Case(
        operator="moe_route",
        shape=(tokens, experts, k),
        dtype=dtype,
        make_inputs=make_inputs,
        reference=definition,
        # Scores, their sum and k rounds of choosing; weights, ids, and two numbers a row.
        forward=Work(bytes=size * dtype.itemsize + choices * 16, flops=(3 + k) * size),
        backward=Work(bytes=2 * size * dtype.itemsize + choices * 8, flops=8 * size),
    )


def random_order(tokens: int, k: int, device: torch.device, generator) -> Permutation:
    scores = torch.rand(tokens, EXPERTS, device=device, generator=generator)
    return moe_permutation(scores.topk(k).indices, EXPERTS)


def apply(x: Tensor, order: Permutation) -> Tensor:
    return order.apply(x)


def apply_by_index(x: Tensor, order: Permutation) -> Tensor:
    return x[order.indices // order.k]


def combine(rows: Tensor, weights: Tensor, order: Permutation) -> Tensor:
    return order.combine(rows, weights)


def combine_by_index(rows: Tensor, weights: Tensor, order: Permutation) -> Tensor:
    chosen = rows[order.inverse].unflatten(0, (-1, order.k))
    return (chosen * weights[..., None]).sum(1).to(rows.dtype)


def apply_case(tokens: int, k: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    def make_inputs(device, generator):
        (x,) = normal_inputs((tokens, width), dtype=dtype)(device, generator)
        return x, random_order(tokens, k, device, generator)

    work = Work(bytes=(k + 1) * tokens * width * dtype.itemsize, flops=k * tokens * width)
    return Case(
        operator="moe_permute",
        shape=(tokens, k, width),
        dtype=dtype,
        make_inputs=make_inputs,
        reference=apply_by_index,
        forward=work,
        backward=work,
    )


def combine_case(tokens: int, k: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    def make_inputs(device, generator):
        (rows,) = normal_inputs((tokens * k, width), dtype=dtype)(device, generator)
        (weights,) = normal_inputs((tokens, k), dtype=torch.float32)(device, generator)
        return rows, weights, random_order(tokens, k, device, generator)

    size = tokens * width
    return Case(
        operator="moe_combine",
        shape=(tokens, k, width),
        dtype=dtype,
        make_inputs=make_inputs,
        reference=combine_by_index,
        forward=Work(bytes=(k + 1) * size * dtype.itemsize, flops=2 * k * size),
        backward=Work(bytes=(2 * k + 1) * size * dtype.itemsize, flops=3 * k * size),
    )


def statistics(logits: Tensor) -> tuple[Tensor, ...]:
    return tuple(router_statistics(logits))


def torch_statistics(logits: Tensor) -> tuple[Tensor, ...]:
    return tuple(router_statistics_reference(logits))


def statistics_case(tokens: int, experts: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    size = tokens * experts
    sums = 4 * (experts + 1)
    return Case(
        operator="router_statistics",
        shape=(tokens, experts),
        dtype=dtype,
        make_inputs=normal_inputs((tokens, experts), dtype=dtype),
        reference=torch_statistics,
        forward=Work(bytes=size * dtype.itemsize + sums, flops=5 * size),
        backward=Work(bytes=2 * size * dtype.itemsize + sums, flops=9 * size),
    )


BOTH = ("fwd", "bwd")


@pytest.mark.parametrize(
    "variant", variants(usual(ours, topk_and_sort), (*BOTH, "fwd+bwd")), ids=str
)
@pytest.mark.parametrize("case", [route_case(*shape) for shape in ROUTES], ids=str)
def bench_moe_route(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)


@pytest.mark.parametrize("variant", variants(usual(apply, apply_by_index)), ids=str)
@pytest.mark.parametrize("case", [apply_case(*shape) for shape in ROWS], ids=str)
def bench_moe_permute(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)


@pytest.mark.parametrize("variant", variants(usual(combine, combine_by_index)), ids=str)
@pytest.mark.parametrize("case", [combine_case(*shape) for shape in ROWS], ids=str)
def bench_moe_combine(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)


@pytest.mark.parametrize("variant", variants(usual(statistics, torch_statistics)), ids=str)
@pytest.mark.parametrize("case", [statistics_case(*shape) for shape in STATISTICS], ids=str)
def bench_router_statistics(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)
