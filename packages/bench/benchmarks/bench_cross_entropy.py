"""cross_entropy beside its peers, over logits [tokens, vocabulary].

Forward reads the logits once; backward reads them again and writes their gradient. Both together
need one read and one write only: the gradient of a loss can be formed while the logits are at hand.
"""

import pytest
import torch
import torch.nn.functional as F

from tilewright_bench import Case, Variant, Work, by_device, run, usual_providers, variants
from tilewright_kernels import cross_entropy

SHAPES = by_device(gpu=[(16384, 32768), (8192, 131072), (256, 1024)], cpu=[(16, 512)])


def eager(logits, target):
    # float32 inside, as training code does it and as the other providers do by themselves.
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, target)


def liger():
    loss = pytest.importorskip("liger_kernel.transformers.cross_entropy").LigerCrossEntropyLoss()
    # It writes the gradient over the logits, so a step that still needs them makes a copy.
    return lambda logits, target: loss(logits * 1.0, target)


def case(tokens: int, vocabulary: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    def make_inputs(device, generator):
        options = {"device": device, "generator": generator}
        logits = torch.randn(tokens, vocabulary, dtype=dtype, **options).requires_grad_()
        target = torch.randint(vocabulary, (tokens,), **options)
        return logits, target

    size = tokens * vocabulary
    read = size * dtype.itemsize
    return Case(
        operator="cross_entropy",
        shape=(tokens, vocabulary),
        dtype=dtype,
        make_inputs=make_inputs,
        reference=eager,
        # maximum, difference, exponential, sum; backward: difference, exponential, scale.
        forward=Work(bytes=read, flops=4 * size),
        backward=Work(bytes=2 * read, flops=3 * size),
        forward_backward=Work(bytes=2 * read, flops=6 * size),
    )


PROVIDERS = usual_providers(cross_entropy, eager, liger=liger)


@pytest.mark.parametrize("variant", variants(PROVIDERS, ("fwd", "bwd", "fwd+bwd")), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_cross_entropy(benchmark, case: Case, variant: Variant):
    if variant.provider == "liger" and variant.direction != "fwd+bwd":
        pytest.skip("liger: computes the gradient in its forward, so only fwd+bwd compares")
    run(benchmark, case, variant)
