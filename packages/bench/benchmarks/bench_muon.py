"""Muon's step on the matrices of a model's layers, beside torch's; shape: matrices x parameters.

Bytes are those of what is kept: p, g, the momentum buffer read, p and the buffer written. Their
operations are those of Newton–Schulz as `bench_newton_schulz` counts them.
"""

import math
from typing import Any

import pytest
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from tilewright_bench import Case, Work, by_device, run, variants
from tilewright_optim import Muon, muon_reference

LR = by_device(gpu=0.05, cpu=0.001)
"""So large that a step changes a parameter by several per cent, or an error would not be seen; so
small that torch's error, of bfloat16, is within what a benchmark lets pass for float32."""


def layers(count: int, hidden: int, intermediate: int) -> list[tuple[int, int]]:
    """Matrices of Llama-like blocks: q, k, v, o, gate, up and down."""
    block = [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    return block * count


MODELS = by_device(gpu=[layers(16, 1536, 4096)], cpu=[layers(1, 16, 24)])


def stepping(optimizer_class: Any):
    """A function of (*params, *grads) that makes a step; each set of inputs has an optimizer."""

    optimizers: Any = WeakTensorKeyDictionary()

    def step(*inputs):
        if inputs[0] not in optimizers:
            half = len(inputs) // 2
            params = [torch.nn.Parameter(p, requires_grad=False) for p in inputs[:half]]
            for p, g in zip(params, inputs[half:], strict=True):
                p.grad = g
            optimizers[inputs[0]] = optimizer_class(params, LR), tuple(params)
        optimizer, params = optimizers[inputs[0]]
        optimizer.step()
        return params

    return step


def reference(*inputs):
    """The first step, from a buffer of zeros."""
    half = len(inputs) // 2
    params = [p.clone() for p in inputs[:half]]
    muon_reference(
        params, inputs[half:], [torch.zeros_like(p) for p in params],
        lr=LR, weight_decay=0.1, momentum=0.95, nesterov=True,
    )  # fmt: skip
    return tuple(params)


def operations(rows: int, cols: int) -> int:
    """Of five steps on one matrix, symmetric products at half."""
    n, m = sorted((rows, cols))
    return min(5 * (3 * n * n * m + n**3), 6 * n * n * m + 14 * n**3)


def case(shapes: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> Case:
    def make_inputs(device, generator):
        options = {"device": device, "dtype": dtype, "generator": generator}
        params = [0.02 * torch.randn(shape, **options) for shape in shapes]
        return *params, *(torch.randn(shape, **options) for shape in shapes)

    size = sum(map(math.prod, shapes))
    work = Work(bytes=5 * dtype.itemsize * size, flops=sum(operations(*s) for s in shapes))
    return Case(
        operator="muon",
        shape=(len(shapes), size),
        dtype=dtype,
        make_inputs=make_inputs,
        reference=reference,
        forward=work,
        backward=work,  # there is none, and it is never timed
        products=torch.bfloat16,
    )


PROVIDERS = {
    "tilewright": lambda: stepping(Muon),
    "torch": lambda: stepping(torch.optim.Muon),
}


@pytest.mark.parametrize("variant", variants(PROVIDERS, ("fwd",)), ids=str)
@pytest.mark.parametrize("case", [case(shapes) for shapes in MODELS], ids=str)
def bench_muon(benchmark, case, variant):
    run(benchmark, case, variant)
