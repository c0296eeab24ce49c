"""Clipping by the global norm, of gradients that are within it: half a billion, read once.

torch multiplies them by 1 all the same. The shape is tensors × elements.
"""

import math

import pytest
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from tilewright_bench import Case, Work, by_device, run, variants
from tilewright_optim import clip_grad_norm_

HIDDEN = 1536
SHAPES = by_device(
    gpu=[(32768, HIDDEN), *[(HIDDEN,), (HIDDEN, HIDDEN), (4 * HIDDEN, HIDDEN)] * 24],
    cpu=[(7, 16), (16,)],
)


def clipping(function, limit: float):
    """A function of gradients, which clips them and returns their norm."""
    owners = WeakTensorKeyDictionary()

    def clip(*grads):
        if grads[0] not in owners:
            owners[grads[0]] = [torch.nn.Parameter(torch.empty_like(g)) for g in grads]
            for param, grad in zip(owners[grads[0]], grads, strict=True):
                param.grad = grad
        return function(owners[grads[0]], limit)

    return clip


def norm_of(*grads):
    """The norm, which is what is returned whether it clips or not."""
    return torch.nn.utils.get_total_norm(grads)


def case(dtype: torch.dtype) -> Case:
    def make_inputs(device, generator):
        options = {"device": device, "dtype": dtype, "generator": generator}
        return tuple(torch.randn(shape, **options) for shape in SHAPES)

    size = sum(map(math.prod, SHAPES))
    work = Work(bytes=size * dtype.itemsize, flops=2 * size)
    return Case(
        operator="clip_grad_norm_",
        shape=(len(SHAPES), size),
        dtype=dtype,
        make_inputs=make_inputs,
        reference=norm_of,
        forward=work,
        backward=work,  # there is none, and it is never timed
    )


WITHIN = 1e9
PROVIDERS = {
    "tilewright": lambda: clipping(clip_grad_norm_, WITHIN),
    "torch": lambda: clipping(torch.nn.utils.clip_grad_norm_, WITHIN),
}


@pytest.mark.parametrize("variant", variants(PROVIDERS, ("fwd",)), ids=str)
@pytest.mark.parametrize("case", [case(d) for d in (torch.float32, torch.bfloat16)], ids=str)
def bench_clip_grad_norm_(benchmark, case, variant):
    run(benchmark, case, variant)
