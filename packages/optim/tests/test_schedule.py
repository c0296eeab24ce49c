"""WarmupCosine against its closed form, worked out by hand."""

import copy
import math

import pytest
import torch

from tilewright_optim import WarmupCosine


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
