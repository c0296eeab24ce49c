"""The optimizers of a run: which parameters they update, and that their states come back."""

import copy
import dataclasses
import json

import pytest
import torch

from tilewright_model import CausalLM, ModelConfig
from tilewright_optim import AdamW, MuonW
from tilewright_train import optimizer_state
from tilewright_train.config import TrainingOptions
from tilewright_train.errors import InputError
from tilewright_train.optimizers import make_optimizer, stacked_rows

SHAPE = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=32,
)


def make(optim):
    torch.manual_seed(0)
    model = CausalLM(SHAPE)
    options = TrainingOptions(optim=optim, weight_decay=0.2, beta2=0.9)
    return model, make_optimizer(options, model, 0.01)


def train(model, optimizer, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, SHAPE.vocab_size, (2, 16), generator=generator)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("optim", "cls"), [("adamw", AdamW), ("muon", MuonW)])
def test_every_parameter_is_updated_once(optim, cls):
    model, optimizer = make(optim)
    assert type(optimizer) is cls
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(params) == len({id(p) for p in params}) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        decay = 0.0 if group["params"][0].ndim < 2 else 0.2
        assert all((p.ndim < 2) == (decay == 0.0) for p in group["params"])
        assert (group["lr"], group["weight_decay"]) == (0.01, decay)


def test_stacked_weights_are_split_for_muon():
    model, optimizer = make("muon")
    sizes = {
        name.split(".")[-2]: group["split_sizes"]
        for group in optimizer.param_groups
        if group["kind"] == "muon"
        for name in group["param_names"]
    }
    assert sizes == {
        "qkv_proj": (32, 16, 16), "gate_up_proj": (48, 48), "o_proj": None, "down_proj": None,
    }  # fmt: skip
    for end, rows in stacked_rows(SHAPE).items():
        weights = [p for name, p in model.named_parameters() if name.endswith(end)]
        assert weights
        assert all(len(p) == sum(rows) for p in weights)


def test_experts_are_split_for_muon():
    shape = dataclasses.replace(
        SHAPE, num_experts=4, moe_intermediate_size=24, num_shared_experts=2, mlp_only_layers=(1,)
    )
    torch.manual_seed(0)
    model = CausalLM(shape)
    optimizer = make_optimizer(TrainingOptions(optim="muon"), model, 0.01)
    sizes = {
        name.removeprefix("layers."): group["split_sizes"]
        for group in optimizer.param_groups
        if group["kind"] == "muon"
        for name in group["param_names"]
        if "gate_up" in name
    }
    assert sizes == {
        "0.mlp.experts.gate_up_proj": (24, 24),
        "0.mlp.shared_experts.gate_up_proj.weight": (48, 48),
        "1.mlp.gate_up_proj.weight": (48, 48),
    }
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, [0])
    for (name, after), former in zip(model.named_parameters(), before, strict=True):
        assert not torch.equal(after, former), name


def test_adamw_gets_the_rest_with_the_runs_betas():
    _, optimizer = make("muon")
    rest = [group for group in optimizer.param_groups if group["kind"] == "adamw"]
    assert any("embed_tokens.weight" in group["param_names"] for group in rest)
    assert all(tuple(group["betas"]) == (0.9, 0.9) for group in rest)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_state_comes_back_bit_for_bit(optim):
    model, optimizer = make(optim)
    train(model, optimizer, (1, 2))
    tensors, record = optimizer_state.flatten(optimizer, model)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # as a file does
    record = json.loads(json.dumps(record))
    twin, again = make(optim)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    optimizer_state.restore(again, twin, tensors, record)
    train(model, optimizer, (3, 4))
    train(twin, again, (3, 4))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(InputError, match="did you mean 'muon'"):
        TrainingOptions(optim="moun")  # pyrefly: ignore[bad-argument-type]
