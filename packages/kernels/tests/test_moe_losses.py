"""Losses that balance experts, beside transformers' and their definitions in plain torch."""

from typing import Any

import pytest
import torch

from tilewright_kernels import (
    balanced_bias,
    load_balancing_loss,
    load_balancing_loss_reference,
    moe_route,
    router_z_loss,
    router_z_loss_reference,
    use_backend,
)
from tilewright_kernels.testing import check_gradients, count_launches, no_synchronization, randn

BATCH, TOKENS, EXPERTS, K = 4, 6, 8, 2


@pytest.fixture
def layers(device):
    shape = (BATCH * TOKENS, EXPERTS)
    return [
        randn(*shape, dtype=torch.float32, device=device, seed=i).requires_grad_() for i in range(3)
    ]


@pytest.fixture
def mask(device):
    lengths = torch.tensor([TOKENS, 2, 1, TOKENS], device=device)
    return (torch.arange(TOKENS, device=device) < lengths[:, None]).long()


@pytest.fixture(params=["triton", "torch"])
def backend(request):
    with use_backend(request.param):
        yield request.param


def assert_same(ours, expected, wrt):
    torch.testing.assert_close(ours, expected)
    for a, b in zip(*(torch.autograd.grad(y, wrt) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("masked", [False, True])
def test_load_balance_is_transformers(masked, layers, mask, backend):
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    given = mask if masked else None
    expected = modeling.load_balancing_loss_func(tuple(layers), EXPERTS, K, given)
    assert_same(load_balancing_loss(layers, K, attention_mask=given), expected, layers)


@pytest.mark.parametrize("how", ["together", "sum", "mean"])
@pytest.mark.parametrize("masked", [False, True])
def test_load_balance_over_layers(how, masked, layers, mask, backend):
    options = {"attention_mask": mask if masked else None, "layers": how}
    expected = load_balancing_loss_reference(layers, K, **options)
    assert_same(load_balancing_loss(layers, K, **options), expected, layers)
    single = [load_balancing_loss(x, K, attention_mask=options["attention_mask"]) for x in layers]
    if how != "together":
        total = sum(single) / (1 if how == "sum" else len(layers))
        torch.testing.assert_close(expected, total)


def test_counts_of_the_routing(layers, backend):
    counts = [moe_route(x, K).tokens_per_expert for x in layers]
    with count_launches() as launched:
        ours = load_balancing_loss(layers, K, tokens_per_expert=counts)
    assert launched["moe_route"] == 0
    assert_same(ours, load_balancing_loss(layers, K), layers)
    # With a bias the routing's counts are others, and the loss is told of them.
    biased = moe_route(layers[0], K, correction_bias=torch.eye(EXPERTS, device=counts[0].device)[0])
    assert biased.tokens_per_expert[0] == BATCH * TOKENS
    ours = load_balancing_loss(layers[0], K, tokens_per_expert=biased.tokens_per_expert)
    f = biased.tokens_per_expert / (BATCH * TOKENS)
    torch.testing.assert_close(ours, EXPERTS * (f * layers[0].softmax(-1).mean(0)).sum())


def test_even_load_is_k_and_one_expert_is_all(device, backend):
    even = torch.eye(EXPERTS, device=device) * 1e-3
    torch.testing.assert_close(load_balancing_loss(even, 1).item(), 1.0)
    one = torch.zeros(12, EXPERTS, device=device)
    one[:, 3] = 100
    torch.testing.assert_close(load_balancing_loss(one, 1).item(), float(EXPERTS))


@pytest.mark.parametrize("masked", [False, True])
def test_z_loss(masked, layers, mask, backend):
    given = mask if masked else None
    expected = router_z_loss_reference(layers, attention_mask=given)
    assert_same(router_z_loss(layers, attention_mask=given), expected, layers)
    token = layers[0].detach()[:1]
    torch.testing.assert_close(router_z_loss(token), token.exp().sum().log() ** 2)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
def test_nothing_waits(layers, mask, device):
    with use_backend("triton"):
        load_balancing_loss(layers, K, attention_mask=mask)  # compiles
        with no_synchronization():
            loss = load_balancing_loss(layers, K, attention_mask=mask)
            (loss + router_z_loss(layers, attention_mask=mask)).backward()
    assert all(x.grad.abs().sum() > 0 for x in layers)


def test_gradcheck():
    # No tie is near: a difference of 1e-6 changes no choice.
    layers = [
        randn(5, 4, dtype=torch.float64, device="cpu", seed=i).requires_grad_() for i in (1, 2)
    ]
    check_gradients(
        lambda *x: (load_balancing_loss(x, 2), router_z_loss(x)),
        layers,
        operator="router_statistics",
        fast_mode=True,
    )


def test_compiles(layers, mask):
    def function(*layers):
        return load_balancing_loss(layers, K, attention_mask=mask) + router_z_loss(layers)

    torch._dynamo.reset()
    backend = "inductor" if mask.is_cuda else "aot_eager"
    with use_backend("triton"):
        compiled = torch.compile(function, fullgraph=True, backend=backend)(*layers)
        assert_same(compiled, function(*layers), layers)


def test_bias_moves_against_the_load(device):
    bias = torch.zeros(4, device=device)
    moved = balanced_bias(bias, torch.tensor([9, 3, 0, 0], device=device).int(), rate=0.01)
    torch.testing.assert_close(moved, torch.tensor([-0.01, 0.0, 0.01, 0.01], device=device))
    assert not bias.any()


def test_bias_evens_the_load(device):
    # A router that likes expert 0 best: with the rule alone every expert gets its share.
    logits = randn(256, 4, dtype=torch.float32, device=device)
    logits = logits * 0.5 + torch.tensor([1.0, 0.0, 0.0, -1.0], device=device)
    bias = torch.zeros(4, device=device)
    first = moe_route(logits, 1).tokens_per_expert
    for _ in range(200):
        load = moe_route(logits, 1, correction_bias=bias).tokens_per_expert
        bias = balanced_bias(bias, load, rate=3e-3)
    assert first.max() > 150
    assert load.max() < 72


def test_errors(layers, mask):
    x = layers[0]
    counts = torch.ones(EXPERTS, device=x.device)
    unknown: Any = "max"
    for error, message, call in (
        (ValueError, "no layer", lambda: load_balancing_loss([], K)),
        (ValueError, "no layer", lambda: router_z_loss(())),
        (ValueError, "same", lambda: load_balancing_loss([x, x[:, :4]], K)),
        (ValueError, "layers is 'max'", lambda: load_balancing_loss(x, K, layers=unknown)),
        (ValueError, "24 tokens", lambda: load_balancing_loss(x, K, attention_mask=mask[:2])),
        (ValueError, "1 layers", lambda: load_balancing_loss(x, K, tokens_per_expert=[counts] * 2)),
        (ValueError, r"must be \[8\]", lambda: load_balancing_loss(x, K, tokens_per_expert=mask)),
        (ValueError, "attention_mask", lambda: load_balancing_loss(
            x, K, tokens_per_expert=counts, attention_mask=mask
        )),
        (ValueError, "k is 9", lambda: load_balancing_loss(x, 9, tokens_per_expert=counts)),
        (ValueError, "k is 0", lambda: load_balancing_loss(x, 0, tokens_per_expert=counts)),
        (TypeError, r"to\(torch\.float32\)", lambda: balanced_bias(counts.bfloat16(), counts)),
        (TypeError, r"to\(torch\.float32\)", lambda: balanced_bias(counts.half(), counts)),
        (ValueError, r"both must be \[E\]", lambda: balanced_bias(counts, counts[:2])),
        (TypeError, "int64", lambda: router_z_loss(x.long())),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
