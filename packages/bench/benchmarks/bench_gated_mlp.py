"""gated_mlp with silu beside its peers, over [tokens, hidden, I].

Forward is three products of tokens x hidden x I, backward six. The bound is arithmetic. What a
provider holds between forward and backward is as much a result as its time.
"""

import pytest
import torch
import torch.nn.functional as F

from tilewright_bench import Case, Variant, Work, by_device, run, variants
from tilewright_kernels import gated_mlp, gated_mlp_reference

SHAPES = by_device(gpu=[(16384, 1536, 4096), (16384, 4096, 11008)], cpu=[(16, 32, 48)])
CHECKED_TOKENS = 4096
"""Float64 products of all tokens take seconds a provider; of fewer, auto leaves them to torch."""


def recomputing(x, w_gate_up, w_down):
    return gated_mlp(x, w_gate_up, w_down, recompute=True)


def liger():
    product = pytest.importorskip("liger_kernel.ops.swiglu").LigerSiLUMulFunction

    def mlp(x, w_gate_up, w_down):
        w_gate, w_up = w_gate_up.chunk(2)
        return F.linear(product.apply(F.linear(x, w_gate), F.linear(x, w_up)), w_down)

    return mlp


def case(tokens: int, hidden: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    def inputs_of(tokens, device, generator):
        options = {"device": device, "dtype": dtype, "generator": generator}
        x = torch.randn(tokens, hidden, **options).requires_grad_()
        w_gate_up = torch.randn(2 * width, hidden, **options) / hidden**0.5
        w_down = torch.randn(hidden, width, **options) / width**0.5
        return x, w_gate_up.requires_grad_(), w_down.requires_grad_()

    product = 2 * tokens * hidden * width
    # What lies between x and y is not counted.
    activation, weights = tokens * hidden * dtype.itemsize, 3 * hidden * width * dtype.itemsize
    return Case(
        operator="gated_mlp",
        shape=(tokens, hidden, width),
        dtype=dtype,
        make_inputs=lambda device, generator: inputs_of(tokens, device, generator),
        check_inputs=lambda device, generator: inputs_of(
            min(tokens, CHECKED_TOKENS), device, generator
        ),
        reference=gated_mlp_reference,
        forward=Work(bytes=2 * activation + weights, flops=3 * product),
        backward=Work(bytes=3 * activation + 2 * weights, flops=6 * product),
    )


PROVIDERS = {
    "tilewright": lambda: gated_mlp,
    "recompute": lambda: recomputing,
    "torch": lambda: gated_mlp_reference,
    "compile": lambda: torch.compile(gated_mlp_reference, dynamic=False),
    "liger": liger,
}


@pytest.mark.parametrize("variant", variants(PROVIDERS, ("fwd", "bwd", "fwd+bwd")), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_gated_mlp(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)
