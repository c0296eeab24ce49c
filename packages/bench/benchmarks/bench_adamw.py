"""AdamW beside torch's: one step reads p, g, m, v and writes p, m, v, seven times a parameter.

Shapes are the tensors of a model (tensors × parameters): 0.5 B parameters, where memory decides,
and a thousand small tensors, where the number of launches does. The learning rate is so large that
a step changes a parameter by more than its own size; else the error would say nothing.
"""

import math
from typing import Any

import pytest
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from tilewright_bench import Case, Variant, Work, by_device, run, variants
from tilewright_optim import AdamW, adamw_reference

LR = 0.1


def decoder(layers: int, hidden: int, intermediate: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Shapes of a Llama-like decoder with tied embeddings and as many key heads as query heads."""
    block = [(hidden,)] * 2 + [(hidden, hidden)] * 4
    block += [(2 * intermediate, hidden), (hidden, intermediate)]
    return [(vocabulary, hidden), *block * layers, (hidden,)]


MODELS: dict[str, list[tuple[int, ...]]] = {
    "0.5b": decoder(16, 1536, 4096, 32768),
    "1000 small": [(24, 1024)] * 1000,
    "tiny": decoder(1, 16, 32, 64),
}
SHAPES = by_device(gpu=[("0.5b",), ("1000 small",)], cpu=[("tiny",)])
DTYPES = (torch.float32, torch.bfloat16)


def stepping(make_optimizer):
    """A function of (*params, *grads) that makes a step; each set of inputs has an optimizer."""

    optimizers: Any = WeakTensorKeyDictionary()

    def prepare(inputs):
        half = len(inputs) // 2
        params = [torch.nn.Parameter(p, requires_grad=False) for p in inputs[:half]]
        for p, g in zip(params, inputs[half:], strict=True):
            p.grad = g
        return make_optimizer(params), tuple(params)

    def step(*inputs):
        if inputs[0] not in optimizers:
            optimizers[inputs[0]] = prepare(inputs)
        optimizer, params = optimizers[inputs[0]]
        optimizer.step()
        return params

    return step


def reference(*inputs):
    """The first step, from states of zeros."""
    half = len(inputs) // 2
    params = [p.clone() for p in inputs[:half]]
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    adamw_reference(
        params, inputs[half:], m, v, [], [torch.zeros(()) for _ in params],
        lr=LR, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2,
    )  # fmt: skip
    return tuple(params)


def case(model: str, dtype: torch.dtype = torch.float32) -> Case:
    shapes = MODELS[model]

    def make_inputs(device, generator):
        options = {"device": device, "dtype": dtype, "generator": generator}
        params = [0.02 * torch.randn(shape, **options) for shape in shapes]
        return *params, *(torch.randn(shape, **options) for shape in shapes)

    size = sum(map(math.prod, shapes))
    work = Work(bytes=7 * size * dtype.itemsize, flops=15 * size)
    return Case(
        operator="adamw",
        shape=(len(shapes), size),
        dtype=dtype,
        make_inputs=make_inputs,
        reference=reference,
        forward=work,
        backward=work,  # there is none, and it is never timed
    )


PROVIDERS = {
    "tilewright": lambda: stepping(lambda params: AdamW(params, LR)),
    "torch": lambda: stepping(lambda params: torch.optim.AdamW(params, LR)),
    "fused": lambda: stepping(lambda params: torch.optim.AdamW(params, LR, fused=True)),
}


@pytest.mark.parametrize("variant", variants(PROVIDERS, ("fwd",)), ids=str)
@pytest.mark.parametrize("case", [case(*s, d) for s in SHAPES for d in DTYPES], ids=str)
def bench_adamw(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)
