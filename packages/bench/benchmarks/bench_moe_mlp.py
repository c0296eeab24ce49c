"""moe_mlp with silu beside its peers, over [tokens, hidden, experts, k, I]; routing is given.

Forward is three products of k rows a token x hidden x I, backward six. The bound is arithmetic.
What a provider holds between forward and backward is as much a result as its time. Of
`moe_mlp_skewed` one expert is chosen by 60 % of the tokens where k is 2 (30 % of all rows), and by
all of them where k is 8, the most there can be; the others are random.
"""

import pytest
import torch
import torch.nn.functional as F

from tilewright_bench import Case, Variant, Work, by_device, run, variants
from tilewright_kernels import Routing, moe_mlp, moe_mlp_reference, moe_permutation

SHAPES = by_device(
    gpu=[(16384, 2048, 64, 8, 1024), (16384, 4096, 8, 2, 14336)], cpu=[(16, 24, 4, 2, 16)]
)
SKEW = {8: 1.0, 2: 0.6}
"""By k: part of the tokens that one expert gets."""

CHECKED_TOKENS = 1024
"""Float64 products of all tokens take seconds a provider."""


def ours(x, w_gate_up, w_down, weights, routing):
    return moe_mlp(x, w_gate_up, w_down, routing._replace(weights=weights))


def recomputing(x, w_gate_up, w_down, weights, routing):
    return moe_mlp(x, w_gate_up, w_down, routing._replace(weights=weights), recompute=True)


def definition(x, w_gate_up, w_down, weights, routing):
    return moe_mlp_reference(x, w_gate_up, w_down, routing._replace(weights=weights))


def on_grouped_mm(x, w_gate_up, w_down, weights, routing):
    """As it is written with torch's product: rows by index, weighted, added up by index."""
    tokens = routing.permutation // weights.shape[1]
    gate, up = F.grouped_mm(x[tokens], w_gate_up.mT, offs=routing.offs).chunk(2, dim=-1)
    rows = F.grouped_mm(F.silu(gate) * up, w_down.mT, offs=routing.offs)
    rows = rows * weights.flatten()[routing.permutation][:, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, tokens, rows)


def transformers():
    qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")

    def experts(x, w_gate_up, w_down, weights, routing):
        config = qwen.Qwen3MoeConfig(
            hidden_size=x.shape[1], num_experts=len(w_down), moe_intermediate_size=w_down.shape[2]
        )
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            module = qwen.Qwen3MoeExperts(config)
        given = {"gate_up_proj": w_gate_up, "down_proj": w_down}
        ids = routing.ids.long()
        return torch.func.functional_call(module, given, (x, ids, weights.to(x.dtype)))

    return experts


def case(
    tokens: int, hidden: int, experts: int, k: int, width: int,
    dtype: torch.dtype = torch.bfloat16, *, skew: float = 0.0,
) -> Case:  # fmt: skip
    def inputs_of(tokens, device, generator):
        options = {"device": device, "generator": generator}
        x = torch.randn(tokens, hidden, dtype=dtype, **options).requires_grad_()
        w_gate_up = torch.randn(experts, 2 * width, hidden, dtype=dtype, **options) / hidden**0.5
        w_down = torch.randn(experts, hidden, width, dtype=dtype, **options) / width**0.5
        scores = torch.rand(tokens, experts, **options)
        scores[: round(skew * tokens), 0] = 2.0
        ids = scores.argsort(dim=1, descending=True)[:, :k].contiguous()
        weights = torch.rand(tokens, k, **options).requires_grad_()
        routing = Routing(weights.detach(), ids.int(), *moe_permutation(ids, experts)[:4])
        return x, w_gate_up.requires_grad_(), w_down.requires_grad_(), weights, routing

    product = 2 * tokens * k * hidden * width
    # What lies between x and y is not counted.
    activation = tokens * hidden * dtype.itemsize
    matrices = 3 * experts * hidden * width * dtype.itemsize
    return Case(
        operator="moe_mlp_skewed" if skew else "moe_mlp",
        shape=(tokens, hidden, experts, k, width),
        dtype=dtype,
        make_inputs=lambda device, generator: inputs_of(tokens, device, generator),
        check_inputs=lambda device, generator: inputs_of(
            min(tokens, CHECKED_TOKENS), device, generator
        ),
        reference=definition,
        forward=Work(bytes=2 * activation + matrices, flops=3 * product),
        backward=Work(bytes=3 * activation + 2 * matrices, flops=6 * product),
    )


PROVIDERS = {
    "tilewright": lambda: ours,
    "recompute": lambda: recomputing,
    "torch": lambda: on_grouped_mm,
    "compile": lambda: torch.compile(on_grouped_mm, dynamic=False),
    "transformers": transformers,
}


@pytest.mark.parametrize("variant", variants(PROVIDERS, ("fwd", "bwd", "fwd+bwd")), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_moe_mlp(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)


@pytest.mark.parametrize(
    "variant", variants({"tilewright": lambda: ours}, ("fwd", "fwd+bwd")), ids=str
)
@pytest.mark.parametrize("case", [case(*shape, skew=SKEW[shape[3]]) for shape in SHAPES], ids=str)
def bench_moe_mlp_skewed(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)
