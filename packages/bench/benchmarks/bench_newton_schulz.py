"""newton_schulz beside the same iteration by torch.bmm; shapes are batch x n x m.

The least work of five steps has every symmetric product at half its operations, and takes the form
that needs fewer: n x n products in the Gram form, or those of the formula. Bytes are those of X in
and out.
"""

import pytest
import torch
from torch import Tensor

from tilewright_bench import Case, Variant, Work, by_device, run, usual_providers, variants
from tilewright_optim import newton_schulz, newton_schulz_reference

SHAPES = by_device(gpu=[(16, 1536, 1536), (16, 1536, 4096), (4, 4096, 4096)], cpu=[(2, 16, 24)])
STEPS = 5
A, B, C = 3.4445, -4.775, 2.0315
"""Of the quintic iteration, which both take."""


def batched_bmm(x: Tensor) -> Tensor:
    """What torch.optim.Muon does to a matrix, in its dtype, for a batch."""
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = torch.bmm(x, x.mT)
        factor = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        x = torch.baddbmm(x, factor, x, beta=A)
    return x


def case(batch: int, n: int, m: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    def make_inputs(device, generator):
        return (torch.randn(batch, n, m, device=device, dtype=dtype, generator=generator),)

    standard = STEPS * (n * n * m + n**3 + 2 * n * n * m)
    gram = 2 * (n * n * m + 2 * n * n * m) + 14 * n**3
    work = Work(bytes=2 * batch * n * m * dtype.itemsize, flops=batch * min(standard, gram))
    return Case(
        operator="newton_schulz",
        shape=(batch, n, m),
        dtype=dtype,
        make_inputs=make_inputs,
        reference=newton_schulz_reference,
        forward=work,
        backward=work,  # there is none, and it is never timed
    )


@pytest.mark.parametrize(
    "variant", variants(usual_providers(newton_schulz, batched_bmm), ("fwd",)), ids=str
)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_newton_schulz(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)
