"""linear_log_prob beside its peers, over [tokens, hidden width, classes].

The bound is arithmetic: three matrix products. tilewright makes a fourth, the logits again, because
it keeps none from forward to backward: it trades a third more time for their memory.
"""

import pytest
import torch
import torch.nn.functional as F

from tilewright_bench import Case, Variant, Work, by_device, run, usual_providers, variants
from tilewright_kernels import linear_log_prob

SHAPES = by_device(gpu=[(16384, 1536, 32768)], cpu=[(16, 32, 512)])
CHECKED_TOKENS = 512
"""Float64 logits of all tokens would take minutes; each token is alike."""


def eager(x, weight, labels):
    logits = F.linear(x, weight)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def case(tokens: int, width: int, classes: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    def inputs_of(tokens, device, generator):
        options = {"device": device, "generator": generator}
        x = torch.randn(tokens, width, dtype=dtype, **options).requires_grad_()
        weight = torch.randn(classes, width, dtype=dtype, **options) / width**0.5
        labels = torch.randint(classes, (tokens,), **options)
        return x, weight.requires_grad_(), labels

    read = (tokens + classes) * width * dtype.itemsize
    product = 2 * tokens * width * classes
    return Case(
        operator="linear_log_prob",
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


PROVIDERS = usual_providers(linear_log_prob, eager)


@pytest.mark.parametrize("variant", variants(PROVIDERS, ("fwd", "fwd+bwd")), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_linear_log_prob(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)
