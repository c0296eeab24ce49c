"""Tests of the time that saving costs."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright_train import pretraining, snapshot
from tilewright_train.layers import parse
from tilewright_train.metrics import read_metrics
from tilewright_train.saving_time import SavingTime, clock_of, saving_in_words


class _Gpu:
    """A clock of a device that works behind the host: what is queued ends later."""

    def __init__(self) -> None:
        self.host = self.busy_until = 0.0

    def queue(self, seconds: float) -> None:
        self.busy_until = max(self.host, self.busy_until) + seconds

    def mark(self) -> float:
        return max(self.host, self.busy_until)

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


def test_copies_that_the_host_does_not_wait_for_are_counted() -> None:
    gpu = _Gpu()
    saving = SavingTime(gpu)
    with saving.hold():
        gpu.host += 0.1
        gpu.queue(0.5)  # the host goes on at once
    assert saving.summary(10.0)["steps_waited"] == pytest.approx(0.6)


def test_the_step_behind_a_checkpoint_bears_its_wait_once() -> None:
    gpu = _Gpu()
    saving = SavingTime(gpu)
    for _ in range(30):
        saving.step(0.1, beside=False)
    with saving.hold():
        gpu.queue(0.5)
    saving.step(0.62, beside=True)  # 0.5 of the copy, 0.02 slower
    saving.step(0.13, beside=True)
    saving.step(0.1, beside=False)
    told = saving.summary(5.0)
    assert told["steps_waited"] == pytest.approx(0.5)
    assert told["steps_slower"] == pytest.approx(0.05)
    assert told["steps_beside_writing"] == 2
    assert told["share"] == pytest.approx(0.55 / 5.0)


def test_the_first_steps_are_no_measure_of_those_beside_a_writing() -> None:
    saving = SavingTime(_Gpu())
    for _ in range(10):
        saving.step(100.0, beside=False)
    for _ in range(5):
        saving.step(0.1, beside=False)
    saving.step(0.3, beside=True)
    assert saving.summary(1.0)["steps_slower"] == pytest.approx(0.2)


def test_nothing_is_said_of_slower_steps_where_all_run_beside_a_writing() -> None:
    saving = SavingTime(_Gpu())
    for _ in range(40):
        saving.step(0.3, beside=True)
    assert saving.summary(1.0)["steps_slower"] == 0.0


def test_the_end_waits_for_the_last_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    saving = SavingTime(_Gpu())
    now = iter((5.0, 7.5))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    with saving.end():
        pass
    told = saving.summary(25.0)
    assert told["waited_for_last"] == 2.5
    assert "10.0% of the time: 0 checkpoints" in saving_in_words(told)


def test_a_run_counts_what_its_checkpoints_take(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = snapshot.take

    def slow(*args: Any, **options: Any) -> snapshot.Snapshot:
        time.sleep(0.15)
        return take(*args, **options)

    monkeypatch.setattr(snapshot, "take", slow)
    run = pretraining.run(parse([*tiny_flags, "--name", "one", "--eval-every", "12"]))
    told = json.loads((run / "summary.json").read_text())["saving"]
    assert told["checkpoints"] == 3
    assert 0.45 <= told["steps_waited"] < told["loop_seconds"]
    assert told["share"] >= 0.45 / told["loop_seconds"]
    # The steps behind a checkpoint tell it as well: 64 tokens in 0.15 s are less than 430 a second.
    rates = {r.step: r.tokens_per_second for r in read_metrics(run / "metrics.jsonl")}
    assert (rates[5] or 0) < 430
    assert (rates[9] or 0) < 430


@pytest.mark.gpu
def test_copies_of_a_gpu_are_counted_by_its_events() -> None:
    device = torch.device("cuda")
    saving = SavingTime(clock_of(device))
    big = torch.ones(1 << 28, device=device)  # 1 GiB: 16 ms and more over the bus
    there = torch.empty(big.shape, pin_memory=True)
    there.copy_(big)
    torch.cuda.synchronize()
    began = time.perf_counter()
    with saving.hold():
        there.copy_(big, non_blocking=True)
    returned = time.perf_counter() - began
    torch.cuda.synchronize()
    waited = saving.summary(1.0)["steps_waited"]
    assert returned < 0.008 < waited <= time.perf_counter() - began
