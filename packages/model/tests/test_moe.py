import dataclasses
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright_kernels import use_backend
from tilewright_model import CausalLM, ModelConfig
from tilewright_model.moe import MoE

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=24,
    max_position_embeddings=16,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
)


def tokens() -> Tensor:
    return torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(1))


def naive(layer: MoE, x: Tensor, config: ModelConfig) -> Tensor:
    """Token by token and expert by expert, in float64."""
    y = torch.zeros_like(x)
    for n, token in enumerate(x):
        logits = layer.gate.weight @ token
        scores = logits.softmax(0) if config.router_scoring == "softmax" else logits.sigmoid()
        chosen = scores.topk(config.num_experts_per_tok)
        weights = chosen.values
        if config.norm_topk_prob:
            weights = weights / weights.sum()
        for weight, e in zip(weights * config.routed_scaling_factor, chosen.indices, strict=True):
            gate, up = (layer.experts.gate_up_proj[e] @ token).chunk(2)
            y[n] += weight * (layer.experts.down_proj[e] @ (F.silu(gate) * up))
        if layer.shared_experts is not None:
            gate, up = (layer.shared_experts.gate_up_proj.weight @ token).chunk(2)
            y[n] += layer.shared_experts.down_proj.weight @ (F.silu(gate) * up)
    return y


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm_topk_prob": False},
        {"router_scoring": "sigmoid", "routed_scaling_factor": 2.5},
        {"num_shared_experts": 2},
        {"num_experts_per_tok": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_token_is_the_weighted_sum_of_its_experts(
    backend: Literal["torch", "triton"], fields: dict, device: torch.device
) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, **fields)
    layer = MoE(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(7, 16)
    expected = naive(layer.double(), x.double(), config).float()
    with use_backend(backend):
        y, router = layer.float().to(device)(x.to(device).view(1, 7, 16))
    torch.testing.assert_close(y[0].cpu(), expected, rtol=1e-4, atol=1e-5)
    assert router.logits.shape == (7, 4)
    assert router.tokens_per_expert.sum() == 7 * config.num_experts_per_tok


@pytest.mark.parametrize(
    ("fields", "sparse"),
    [
        ({}, (0, 1, 2)),
        ({"first_k_dense_replace": 1}, (1, 2)),
        ({"decoder_sparse_step": 2}, (1,)),
        ({"mlp_only_layers": (1,)}, (0, 2)),
        ({"num_experts": 0}, ()),
    ],
    ids=str,
)
def test_layers_are_sparse_where_asked(fields: dict, sparse: tuple[int, ...]) -> None:
    config = dataclasses.replace(CONFIG, **fields)
    assert config.sparse_layers == sparse
    model = CausalLM(config)
    assert tuple(i for i, b in enumerate(model.layers) if isinstance(b.mlp, MoE)) == sparse


def test_gradients_reach_router_and_experts() -> None:
    torch.manual_seed(0)
    model = CausalLM(dataclasses.replace(CONFIG, num_shared_experts=1))
    model(tokens(), labels=tokens()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_router_losses_are_part_of_the_loss_in_training_only() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    model, ids = CausalLM(config), tokens()
    training, evaluated = model(ids, labels=ids), model.eval()(ids, labels=ids)
    assert torch.equal(training.aux_loss, evaluated.aux_loss)
    plain = CausalLM(dataclasses.replace(config, router_aux_loss_coef=0.0))
    plain.load_state_dict(model.state_dict())
    z_loss = (plain.train()(ids, labels=ids).loss - evaluated.loss) / 0.25
    assert z_loss.item() == pytest.approx(torch.tensor(4.0).log().item() ** 2, rel=0.05)
    expected = evaluated.loss + 0.5 * evaluated.aux_loss + 0.25 * z_loss
    torch.testing.assert_close(training.loss, expected)


def test_micro_batches_weigh_the_router_loss_by_their_tokens() -> None:
    torch.manual_seed(0)
    model, ids = CausalLM(dataclasses.replace(CONFIG, router_aux_loss_coef=1.0)), tokens()
    half = model(ids, labels=ids, num_items=32)  # 16 of 32 labels are here
    free = model.eval()(ids, labels=ids, num_items=32)
    torch.testing.assert_close(half.loss, free.loss + 0.5 * half.aux_loss)


def test_a_dense_model_has_no_aux_loss() -> None:
    model = CausalLM(dataclasses.replace(CONFIG, num_experts=0))
    assert model(tokens()).aux_loss is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 exceeds num_experts 4"),
        ({"first_k_dense_replace": 3}, "no layer of 3 is sparse"),
        ({"num_experts": 0, "num_shared_experts": 1}, "num_shared_experts is 1 and num_experts 0"),
        ({"router_scoring": "tanh"}, "'tanh': choose one of softmax, sigmoid"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef is -1.0"),
        ({"residual_dropout": 1.0}, "residual_dropout is 1.0"),
    ],
    ids=str,
)
def test_contradicting_experts_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)
