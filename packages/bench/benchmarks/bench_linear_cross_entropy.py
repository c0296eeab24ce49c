"""linear_cross_entropy beside its peers, over [tokens, hidden width, classes].

The bound is arithmetic: logits, the gradient of input and that of weight are a matrix product each.
How much memory a provider takes beside the gradients is as much a result as its time.
"""

import pytest
import torch
import torch.nn.functional as F

from tilewright_bench import Case, Variant, Work, by_device, run, usual_providers, variants
from tilewright_kernels import linear_cross_entropy

SHAPES = by_device(
    # The last is GPT-2's vocabulary: an odd number of classes.
    gpu=[(16384, 1536, 32768), (16384, 4096, 131072), (4096, 2048, 50257)], cpu=[(16, 32, 512)]
)  # fmt: skip
CHECKED_TOKENS = 512
"""Float64 logits of all tokens would take minutes; each token is alike."""


def eager(x, weight, target):
    # float32 inside, as training code does it and as the other providers do by themselves.
    logits = F.linear(x, weight)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)


def liger():
    transformers = pytest.importorskip("liger_kernel.transformers")
    loss = transformers.LigerFusedLinearCrossEntropyLoss()
    return lambda x, weight, target: loss(weight, x, target)


def case(tokens: int, width: int, classes: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    def inputs_of(tokens, device, generator):
        options = {"device": device, "generator": generator}
        x = torch.randn(tokens, width, dtype=dtype, **options).requires_grad_()
        weight = torch.randn(classes, width, dtype=dtype, **options) / width**0.5
        target = torch.randint(classes, (tokens,), **options)
        return x, weight.requires_grad_(), target

    read = (tokens + classes) * width * dtype.itemsize
    product = 2 * tokens * width * classes
    return Case(
        operator="linear_cross_entropy",
        shape=(tokens, width, classes),
        dtype=dtype,
        make_inputs=lambda device, generator: inputs_of(tokens, device, generator),
        check_inputs=lambda device, generator: inputs_of(
            min(tokens, CHECKED_TOKENS), device, generator
        ),
        reference=eager,
        forward=Work(bytes=read, flops=product),
        backward=Work(bytes=2 * read, flops=2 * product),
        forward_backward=Work(bytes=2 * read, flops=3 * product),
    )


PROVIDERS = usual_providers(linear_cross_entropy, eager, liger=liger)


# Gradients that are computed in forward leave no backward to compare.
@pytest.mark.parametrize("variant", variants(PROVIDERS, ("fwd+bwd",)), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_linear_cross_entropy(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)
