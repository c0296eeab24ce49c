"""Hooks and ranges around a step: those of torch's optimizers, as often, for the same calls."""

import functools

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tilewright_optim import AdamW
from tilewright_optim.testing import random_parameters, set_random_grads


def made(kind):
    params = random_parameters(torch.device("cpu"), torch.float32, [(3,)])
    set_random_grads(params, 0)
    return kind(params, lr=1e-2)


def calls(kind, step):
    """What hooks of all four sorts are given, and what the step returns."""
    optimizer = made(kind)
    seen = []

    def noting(name):
        return lambda self, args, kwargs: seen.append((name, self is optimizer, len(args), *kwargs))

    handles = [
        optimizer.register_step_pre_hook(noting("pre")),
        optimizer.register_step_post_hook(noting("post")),
        register_optimizer_step_pre_hook(noting("global pre")),
        register_optimizer_step_post_hook(noting("global post")),
    ]
    try:
        seen.append(step(optimizer))
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    return seen


@pytest.mark.parametrize(
    "step",
    [
        lambda optimizer: optimizer.step(),
        lambda optimizer: optimizer.step(None),
        lambda optimizer: optimizer.step(lambda: 3.0),
        lambda optimizer: optimizer.step(closure=lambda: 3.0),
    ],
    ids=["plain", "none", "closure", "named"],
)
def test_hooks(step):
    found = calls(AdamW, step)
    assert found == calls(torch.optim.AdamW, step)
    assert len(found) == 5


def test_hooks_around_a_step_that_somebody_wrapped(monkeypatch):
    def timed(step):
        @functools.wraps(step)
        def call(*args, **kwargs):
            times.append(1)
            return step(*args, **kwargs)

        return call

    for kind in (AdamW, torch.optim.AdamW):
        times: list[int] = []
        made(kind)
        monkeypatch.setattr(kind, "step", timed(kind.step))
        assert len(calls(kind, lambda optimizer: optimizer.step())) == 5
        assert len(times) == 2


def test_each_hook_alone():
    seen = []
    for register in (
        AdamW.register_step_pre_hook,
        AdamW.register_step_post_hook,
        lambda _, hook: register_optimizer_step_pre_hook(hook),
        lambda _, hook: register_optimizer_step_post_hook(hook),
    ):
        optimizer = made(AdamW)
        handle = register(optimizer, lambda *_: seen.append(1))
        optimizer.step()
        handle.remove()
        optimizer.step()
    assert len(seen) == 4


def test_a_hook_may_give_another_closure():
    optimizer = made(AdamW)
    optimizer.register_step_pre_hook(lambda self, *_: ((self, lambda: 7.0), {}))
    assert optimizer.step() == 7.0


def test_profiles_have_the_range():
    optimizer = made(AdamW)
    optimizer.step()
    profile = torch.autograd.profiler.profile()
    with profile:
        optimizer.step()
    names = [event.name for event in profile.function_events or []]
    assert names.count("Optimizer.step#AdamW.step") == 1


def test_a_schedule_sees_the_step():
    optimizer = made(AdamW)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    schedule.step()  # which warns if there was none
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_grad_mode_is_as_it_was():
    modes = []
    optimizer = made(AdamW)
    optimizer.register_step_post_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    optimizer.step(lambda: modes.append(torch.is_grad_enabled()))
    assert modes == [True, True]
    assert torch.is_grad_enabled()
