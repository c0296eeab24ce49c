"""Schedules against their closed forms, worked out by hand."""

import copy
import math

import pytest
import torch

from tilewright_optim import WarmupCosine, get_schedule


def make(lr=1.0, groups=1, optimizer=torch.optim.SGD, **options):
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(groups)]
    return optimizer([{"params": [p], "lr": lr * (i + 1)} for i, p in enumerate(params)], **options)


def rates(schedule, optimizer, steps):
    """The learning rates that the next optimizer steps use, for the first group."""
    used = []
    for _ in range(steps):
        used.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return used


@pytest.mark.smoke
def test_closed_form():
    optimizer = make(lr=2.0)
    used = rates(WarmupCosine(optimizer, 4, 10, min_lr_ratio=0.1), optimizer, 12)
    warmup = [0.5, 1.0, 1.5, 2.0]
    cosine = [0.2 + 1.8 * (1 + math.cos(math.pi * n / 6)) / 2 for n in range(1, 6)]
    assert used == pytest.approx(warmup + cosine + [0.2, 0.2, 0.2], rel=1e-12)
    assert used[6] == pytest.approx(1.1)  # half way down


@pytest.mark.parametrize(
    ("warmup", "total", "expected"),
    [
        (0, 2, [0.55, 0.1, 0.1]),  # no warm-up: down from the first step
        (2, 2, [0.5, 1.0, 0.1]),  # nothing but warm-up
        (1, 1, [1.0, 0.1, 0.1]),
        (1, 3, [1.0, 0.55, 0.1]),
    ],
)
def test_edges(warmup, total, expected):
    optimizer = make()
    used = rates(WarmupCosine(optimizer, warmup, total), optimizer, 3)
    assert used == pytest.approx(expected, rel=1e-12)


def test_each_group_keeps_its_own_rate():
    optimizer = make(groups=2)
    schedule = WarmupCosine(optimizer, 2, 4)
    assert schedule.get_last_lr() == [0.5, 1.0]


def test_resumes_exactly():
    optimizer = make()
    schedule = WarmupCosine(optimizer, 3, 9, min_lr_ratio=0.2)
    whole = rates(schedule, optimizer, 5)
    saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    whole += rates(schedule, optimizer, 6)

    resumed_optimizer = make()
    resumed = WarmupCosine(resumed_optimizer, 1, 2)  # what was saved wins
    resumed_optimizer.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert rates(resumed, resumed_optimizer, 6) == whole[5:]

    by_epoch_optimizer = make()
    by_epoch_optimizer.load_state_dict(saved[0])
    by_epoch = WarmupCosine(by_epoch_optimizer, 3, 9, min_lr_ratio=0.2, last_epoch=4)
    assert rates(by_epoch, by_epoch_optimizer, 6) == whole[5:]


def test_tensor_rate_changes_in_place(device):
    lr = torch.tensor(1.0, device=device)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1, device=device))], lr=lr)
    schedule = WarmupCosine(optimizer, 2, 4)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == 0.5
    optimizer.step()
    schedule.step()
    assert lr == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "total_steps is 0"),
        ((5, 4), r"warmup_steps is 5; it must be from 0 to total_steps \(4\)"),
        ((-1, 4), "warmup_steps is -1"),
        ((1, 4, 1.5), r"min_lr_ratio is 1.5.*0 to 1"),
        ((1, 4, -0.1), "min_lr_ratio is -0.1"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        WarmupCosine(make(), *arguments)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("constant", {}, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", {}, [0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0, 0]),
        ("linear", {"min_lr_ratio": 0.2}, [0.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2]),
        ("cosine", {}, [0.5, 1, None, None, None, 0.5, None, None, None, 0, 0]),
        ("wsd", {"decay_steps": 4}, [0.5, 1, 1, 1, 1, 1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0, 0]),
        ("wsd", {}, [0.5, 1, 1, 1, 1, 1, 1, 1, 1 - 0.5**0.5, 0, 0]),
        ("wsd", {"decay_steps": 0, "min_lr_ratio": 0.1}, [0.5, *[1] * 8, 0.1, 0.1]),
    ],
)
def test_get_schedule(name, options, expected):
    optimizer = make()
    schedule = get_schedule(name, optimizer, total_steps=10, warmup_steps=2, **options)
    for ours, right in zip(rates(schedule, optimizer, len(expected)), expected, strict=True):
        assert right is None or ours == pytest.approx(right, abs=1e-12)


def test_no_warmup_starts_at_the_full_rate():
    for name in ("constant", "wsd"):
        optimizer = make()
        assert rates(get_schedule(name, optimizer, total_steps=10), optimizer, 1) == [1.0]


def test_wsd_resumes_exactly():
    whole_optimizer, optimizer = make(), make()
    whole = rates(get_schedule("wsd", whole_optimizer, total_steps=9), whole_optimizer, 9)
    first = get_schedule("wsd", optimizer, total_steps=9)
    used = rates(first, optimizer, 8)
    resumed = get_schedule("wsd", optimizer, total_steps=3)
    resumed.load_state_dict(first.state_dict())
    optimizer.param_groups[0]["lr"] = first.get_last_lr()[0]
    assert used + rates(resumed, optimizer, 1) == whole


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("step", {}, "schedule 'step' is none of 'constant', 'linear', 'cosine', 'wsd'"),
        ("cosine", {"decay_steps": 2}, "decay_steps is 2, and cosine decays as a whole"),
        ("wsd", {"decay_steps": 9, "warmup_steps": 2}, r"decay_steps is 9.*warmup_steps \(8\)"),
        ("wsd", {"warmup_steps": 11}, "warmup_steps is 11"),
    ],
)
def test_bad_schedules(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_schedule(name, make(), total_steps=10, **options)
