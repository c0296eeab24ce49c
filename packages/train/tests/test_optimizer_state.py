"""Optimizer state by parameter name: there and back bit for bit, for one group or several."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tilewright_optim import AdamW
from tilewright_train.errors import InputError
from tilewright_train.optimizer_state import flatten, restore


def a_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def an_optimizer(
    kind: type[torch.optim.Optimizer], model: torch.nn.Module, lr: float
) -> torch.optim.Optimizer:
    # Groups in another order than the module's: numbers and names must not be mixed up.
    biases = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim == 2]
    return kind([{"params": biases, "weight_decay": 0.0}, {"params": matrices}], lr=lr)  # type: ignore


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", [AdamW, torch.optim.AdamW, torch.optim.Adam])
def test_a_restored_optimizer_takes_the_same_steps(
    kind: type[torch.optim.Optimizer], tmp_path: Path
) -> None:
    model = a_model()
    optimizer = an_optimizer(kind, model, lr=0.1)
    for seed in range(3):
        step(model, optimizer, seed)
    tensors, record = flatten(optimizer, model)
    assert {"0.weight.exp_avg", "1.bias.exp_avg_sq", "0.bias.step"} <= set(tensors) | set(
        record["plain"]
    )
    save_file(tensors, tmp_path / "state.safetensors")
    text = json.dumps(record)

    other = a_model()
    other.load_state_dict(model.state_dict())
    resumed = an_optimizer(kind, other, lr=99.0)
    restore(resumed, other, load_file(tmp_path / "state.safetensors"), json.loads(text))
    assert resumed.param_groups[0]["lr"] == 0.1
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, resumed, seed)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_an_optimizer_without_state_comes_back_without(tmp_path: Path) -> None:
    model = a_model()
    tensors, record = flatten(an_optimizer(AdamW, model, 0.1), model)
    assert tensors == {}
    fresh = an_optimizer(AdamW, model, 0.2)
    restore(fresh, model, {}, record)
    assert fresh.state_dict()["state"] == {}
    assert fresh.param_groups[0]["lr"] == 0.1


def test_another_model_is_refused() -> None:
    model = a_model()
    tensors, record = flatten(an_optimizer(AdamW, model, 0.1), model)
    other = torch.nn.Sequential(torch.nn.Linear(3, 4))
    with pytest.raises(InputError, match="other parameters or groups than this"):
        restore(an_optimizer(AdamW, other, 0.1), other, tensors, record)
