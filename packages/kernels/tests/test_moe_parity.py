"""Sparse layers of transformers, with the same weights: routing, experts and gradients."""

import pytest
import torch
import torch.nn.functional as F

from tilewright_kernels import moe_mlp, moe_route, use_backend
from tilewright_kernels.testing import randn

pytest.importorskip("transformers")

# The modules and not the models: a model would add attention, and nothing to what is compared.
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

BATCH, TOKENS, HIDDEN, WIDTH, EXPERTS = 2, 9, 16, 24, 8


def mixtral(k):
    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS,
        num_experts_per_tok=k,
    )  # fmt: skip
    return MixtralSparseMoeBlock(config), True


def qwen3(k, normalize):
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=EXPERTS,
        num_experts_per_tok=k, norm_topk_prob=normalize,
    )  # fmt: skip
    return Qwen3MoeSparseMoeBlock(config), normalize


BLOCKS = {
    "Mixtral": lambda: mixtral(2),
    "Mixtral, one expert": lambda: mixtral(1),
    "Qwen3-MoE": lambda: qwen3(4, True),
    "Qwen3-MoE, not normalized": lambda: qwen3(4, False),
}


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("make", BLOCKS.values(), ids=list(BLOCKS))
def test_sparse_blocks(make, backend, device):
    block, normalize = make()
    block.to(device)
    k, gate, experts = block.gate.top_k, block.gate.weight, block.experts
    wrt = (gate, experts.gate_up_proj, experts.down_proj)
    with torch.no_grad():
        for seed, parameter in enumerate(wrt, start=1):
            values = randn(*parameter.shape, dtype=torch.float32, device=device, seed=seed)
            parameter.copy_(values / parameter.shape[-1] ** 0.5)
    x = randn(BATCH, TOKENS, HIDDEN, dtype=torch.float32, device=device).requires_grad_()
    with use_backend(backend):
        routing = moe_route(F.linear(x, gate).flatten(0, 1), k, normalize=normalize)
        ours = moe_mlp(x, experts.gate_up_proj, experts.down_proj, routing)
        dy = torch.rand_like(ours)
        grads = torch.autograd.grad(ours, (x, *wrt), dy)
    expected = block(x)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(grads, torch.autograd.grad(expected, (x, *wrt), dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("normalize", [True, False])
def test_deepseeks_router(normalize, backend, device):
    config = DeepseekV3Config(
        hidden_size=HIDDEN, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
        norm_topk_prob=normalize, routed_scaling_factor=2.5,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config).to(device)
    with torch.no_grad():
        router.weight.copy_(randn(16, HIDDEN, dtype=torch.float32, device=device, seed=1))
        bias = randn(16, dtype=torch.float32, device=device, seed=2) / 4
        router.e_score_correction_bias.copy_(bias)
    x = randn(20, HIDDEN, dtype=torch.float32, device=device)
    logits, weights, ids = router(x)
    with use_backend(backend):
        routing = moe_route(
            logits, 4, scoring="sigmoid", normalize=normalize, correction_bias=bias, scale=2.5,
            num_groups=4, topk_groups=2,
        )  # fmt: skip
    # transformers does not sort what it chose.
    in_place = ids.sort(-1).indices
    ours = routing.ids.sort(-1)
    assert torch.equal(ours.values.long(), ids.gather(1, in_place))
    torch.testing.assert_close(routing.weights.gather(1, ours.indices), weights.gather(1, in_place))
