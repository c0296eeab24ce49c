"""Step counts as torch's own arithmetic has them, whoever writes to them in between."""

import copy

import pytest
import torch

from tilewright_optim._states import pack_steps
from tilewright_optim._step_counts import StepCounts


def packed(values, dtype=torch.float32):
    """Counts as an optimizer has them: views of one tensor."""
    states = [{"step": torch.tensor(v, dtype=dtype), "exp_avg": torch.zeros(1)} for v in values]
    pack_steps(states)
    return [state["step"] for state in states]


def values(steps):
    return [step.item() for step in steps]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.float16])
@pytest.mark.parametrize("first", [[0, 0, 0], [5, 7, 5], [2**24 - 2] * 3], ids=str)
def test_reading_and_advancing(first, dtype):
    steps, expected = packed(first, dtype), torch.tensor(first, dtype=dtype)
    counts = StepCounts(steps)
    for _ in range(4):
        read, ahead = counts.read()
        assert [read + a for a in ahead] == expected.tolist()
        counts.advance(None)
        expected += 1
        assert values(steps) == expected.tolist()


def fill_one(steps):
    steps[1].fill_(9)


def fill_all(steps):
    for step in steps:
        step.fill_(9)


def fill_data(steps):
    steps[2].data.fill_(9)


def fill_by_numpy(steps):
    steps[0].numpy().fill(9)


@pytest.mark.parametrize("write", [fill_one, fill_all, fill_data, fill_by_numpy])
def test_what_others_write_is_read(write):
    steps = packed([3, 3, 3])
    counts = StepCounts(steps)
    for _ in range(2):
        counts.read()
        counts.advance(None)
    write(steps)
    first, ahead = counts.read()
    assert [first + a for a in ahead] == values(steps)
    before = values(steps)
    counts.advance(None)
    assert values(steps) == [value + 1 for value in before]


def test_apart_they_are_read_one_by_one():
    steps = [torch.tensor(float(value)) for value in (2, 5)]
    counts = StepCounts(steps)
    assert counts.flat is None
    for start in (2, 3):
        assert counts.read() == (start, [0, 3])
        counts.advance(None)
    assert values(steps) == [4, 7]


def test_lists_stay_while_counts_are_alike():
    counts = StepCounts(packed([1, 1]))
    _, ahead = counts.read()
    counts.advance(None)
    assert counts.read() == (2, [0, 0])
    assert counts.read()[1] is ahead  # tables hold it, and are not compared with it


def test_memory_that_moved_is_not_read():
    steps = packed([4, 4])
    counts = StepCounts(steps)
    counts.read()
    assert counts.flat is not None
    kept = counts.flat.untyped_storage()
    kept.resize_(2**20)  # elsewhere
    assert not counts.stay()
    assert counts.read() == (4, [0, 0])
    counts.advance(None)
    assert values(steps) == [5, 5]


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_overflow(found_inf, device):
    steps = [step.to(device) for step in packed([4, 4])]
    counts = StepCounts(steps)
    counts.advance(torch.tensor(found_inf, device=device))
    assert values(steps) == [5 - found_inf] * 2


def test_autograd_is_told():
    steps = packed([4, 4])
    counts = StepCounts(steps)
    counts.read()
    before = [step._version for step in steps]
    counts.advance(None)
    assert all(step._version > old for step, old in zip(steps, before, strict=True))


def test_copies_are_left_alone():
    steps = packed([4, 4])
    counts = StepCounts(steps)
    cloned = copy.deepcopy(steps)
    counts.read()
    counts.advance(None)
    assert values(cloned) == [4, 4]


def test_counts_whose_bytes_are_not_their_values():
    steps = [torch._neg_view(x) for x in torch.full((2,), -5.0).unbind()]
    counts = StepCounts(steps)
    assert counts.read() == (5.0, [0, 0])
    counts.advance(None)
    assert values(steps) == [6.0, 6.0]
