"""sample_categorical beside plain torch: logits in, a token a row and its log-probability out.

Logits are read once. torch's functions draw as gpt-fast does, by argmax(p / E) with E ~ Exp(1),
which needs no synchronization. Draws of different generators do not agree, so the error of each is
taken where there is no choice, at temperature 0; ours has to draw what its reference does in
float64, too.
"""

from dataclasses import replace

import pytest
import torch

from tilewright_bench import (
    Case,
    Variant,
    Work,
    by_device,
    default_device,
    run,
    usual_providers,
    variants,
)
from tilewright_bench.evaluate import Oracle, error_limit
from tilewright_kernels import sample_categorical, sample_categorical_reference

TEMPERATURE = 0.8
# Rows, vocabulary: a 0.5 B decoder's, and one of the largest.
SHAPES = by_device(gpu=[(1, 32768), (32, 32768), (32, 151936)], cpu=[(2, 64)])


def ours(logits, seeds, steps, temperature):
    return sample_categorical(logits, seeds, steps, temperature=temperature)[1]


def reference(logits, seeds, steps, temperature):
    return sample_categorical_reference(logits, seeds, steps, temperature=temperature)[1]


def eager(logits, seeds, steps, temperature):
    wide = logits if logits.dtype == torch.float64 else logits.float()
    greedy = temperature[:, None] == 0
    p = (wide / torch.where(greedy, 1.0, temperature[:, None])).softmax(-1)
    noise = torch.where(greedy, 1.0, torch.empty_like(p).exponential_())
    tokens = (p / noise).argmax(-1, keepdim=True)
    return wide.log_softmax(-1).gather(1, tokens)[:, 0]


def case(rows: int, size: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    def make_inputs(device, generator, temperature=TEMPERATURE):
        logits = torch.randn(rows, size, device=device, dtype=dtype, generator=generator) * 3
        seeds = torch.arange(rows, device=device)
        return logits, seeds, seeds + 5, torch.full((rows,), temperature, device=device)

    # Seed, position, temperature and log-probability a row; Philox's words are integers and not
    # counted.
    work = Work(bytes=rows * (size * dtype.itemsize + 24), flops=8 * rows * size)
    return Case(
        operator="sample_categorical",
        shape=(rows, size),
        dtype=dtype,
        make_inputs=make_inputs,
        check_inputs=lambda device, generator: make_inputs(device, generator, temperature=0.0),
        reference=eager,
        forward=work,
        backward=work,  # there is none
    )


def check_draws(case: Case, variant: Variant) -> None:
    """Fail unless ours draws what its reference does in float64, under the same seeds."""
    drawn = replace(case, reference=reference, check_inputs=None)
    verdict = Oracle(drawn, variant.direction, default_device()).judge(variant.build())
    assert verdict.error <= error_limit(torch.float32)


PROVIDERS = usual_providers(ours, eager)


@pytest.mark.parametrize("variant", variants(PROVIDERS, ("fwd",)), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_sample_categorical(benchmark, case: Case, variant: Variant):
    if variant.provider == "tilewright":
        check_draws(case, variant)
    run(benchmark, case, variant)
