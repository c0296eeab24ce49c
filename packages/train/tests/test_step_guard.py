"""What is left out and what is not, and that a scale moves as torch.amp.GradScaler's."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from tilewright_optim import AdamW, MuonW, clip_grad_norm_
from tilewright_train.loss_scale import LossScale
from tilewright_train.step_guard import HISTORY, StepGuard

CPU = torch.device("cpu")


def make(**options: Any) -> tuple[nn.Linear, StepGuard]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = AdamW(model.parameters(), 0.1)
    parameters = list(model.parameters())
    return model, StepGuard(optimizer, parameters, max_grad_norm=1.0, device=CPU, **options)


def step(model: nn.Linear, guard: StepGuard, *, loss: float = 1.0, factor: float = 1.0):
    """An update with gradients of the same direction and this loss."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = guard.scaled(torch.randn(parameter.shape) * factor)
    return guard.clip_and_step(torch.tensor(loss))


def copies(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("factor", [0.01, 10.0])  # below the limit, and clipped
def test_an_update_is_that_of_clipping_and_stepping(factor: float) -> None:
    model, guard = make()
    outcome = step(model, guard, factor=factor)
    expected = nn.Linear(4, 3)
    torch.manual_seed(0)
    expected = nn.Linear(4, 3)
    optimizer = AdamW(expected.parameters(), 0.1)
    torch.manual_seed(1)
    for parameter in expected.parameters():
        parameter.grad = torch.randn(parameter.shape) * factor
    norm = clip_grad_norm_(expected.parameters(), 1.0)
    optimizer.step()
    assert float(outcome.norm) == pytest.approx(float(norm))
    assert outcome.skipped == 0
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("loss", "factor"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan"))]
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_not_finite_changes_nothing(loss: float, factor: float, optimizer: str) -> None:
    model, guard = make()
    if optimizer == "muon":
        guard.optimizer = MuonW.from_module(model, 0.1)
    step(model, guard)
    before = copies(model)
    for number in (1, 2):
        outcome = step(model, guard, loss=loss, factor=factor)
        assert (int(outcome.skipped), int(outcome.in_a_row)) == (1, number)
    for now, then in zip(model.parameters(), before, strict=True):
        assert torch.equal(now, then)
    outcome = step(model, guard)
    assert (int(outcome.skipped), int(outcome.in_a_row), int(outcome.in_all)) == (0, 0, 2)
    assert not torch.equal(next(model.parameters()), before[0])


def noisy(number: int) -> float:
    return 2.0 + 0.1 * torch.sin(torch.tensor(float(number))).item()


@pytest.mark.parametrize("on_spike", ["keep", "skip"])
def test_spikes_of_loss_or_norm_are_left_out_when_asked(on_spike: str) -> None:
    model, guard = make(on_spike=on_spike)
    for number in range(HISTORY + 10):
        assert step(model, guard, loss=noisy(number), factor=noisy(number)).skipped == 0
    wanted = 2 if on_spike == "skip" else 0
    assert step(model, guard, loss=2.4).skipped == 0  # within six deviations of 0.07
    assert step(model, guard, loss=3.0).skipped == wanted
    assert step(model, guard, loss=2.0, factor=9.0).skipped == wanted
    assert step(model, guard, loss=-5.0, factor=0.01).skipped == 0  # below is no spike


def test_nothing_is_a_spike_before_there_is_a_history() -> None:
    model, guard = make(on_spike="skip")
    for loss in (2.0, 2.0, 2.0, 90.0):
        assert step(model, guard, loss=loss).skipped == 0


def test_a_resumed_guard_decides_as_the_first() -> None:
    model, guard = make(on_spike="skip", scales_loss=True)
    for number in range(70):
        step(model, guard, loss=noisy(number), factor=noisy(number))
    step(model, guard, loss=float("nan"))
    saved = json.loads(json.dumps(guard.state_dict()))
    again, resumed = make(on_spike="skip", scales_loss=True)
    resumed.load_state_dict(saved)
    assert resumed.state_dict() == guard.state_dict()
    for loss in (2.1, 7.0, float("nan")):
        one, other = step(model, guard, loss=loss), step(again, resumed, loss=loss)
        assert list(map(float, one[1:])) == list(map(float, other[1:]))


def test_the_scale_moves_as_that_of_grad_scaler() -> None:
    ours = LossScale(CPU, interval=3)
    theirs = torch.amp.GradScaler("cpu", growth_interval=3)
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], 0.0)
    for overflows in (1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0):
        theirs.scale(torch.ones(()))
        value = torch.inf if overflows else 1.0
        parameter.grad = torch.full((2,), value)
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(float(overflows)))
        assert float(ours.scale) == theirs.get_scale()
    state = theirs.state_dict()
    assert ours.state_dict() == state


def test_a_scaled_loss_gives_the_same_update() -> None:
    plain, first = make()
    scaled, second = make(scales_loss=True)
    for factor in (0.01, 10.0):
        one, other = step(plain, first, factor=factor), step(scaled, second, factor=factor)
        assert float(one.norm) == pytest.approx(float(other.norm))
        assert float(other.scale) == 2.0**16
    for ours, theirs in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert step(scaled, second, factor=float("inf")).skipped == 1
    assert float(step(scaled, second).scale) == 2.0**15
