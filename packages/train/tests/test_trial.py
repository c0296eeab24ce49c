"""The first batch before the loop: what it changes, which is nothing, and what it finds."""

import io
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright_model import CausalLM
from tilewright_train import trial
from tilewright_train.cli import main
from tilewright_train.layers import parse
from tilewright_train.metrics import read_metrics
from tilewright_train.pretraining import run


def refuse_more_than(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose memory holds the activations of so many rows."""
    forward = CausalLM.forward

    def limited(self: CausalLM, input_ids: torch.Tensor, **options: Any) -> Any:
        if torch.is_grad_enabled() and len(input_ids) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids, **options)

    monkeypatch.setattr(CausalLM, "forward", limited)


def test_a_micro_batch_that_was_chosen_is_made_smaller_until_it_fits(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_more_than(2, monkeypatch)
    printed = io.StringIO()
    folder = run(parse(tiny_flags), printed)
    assert "trial        4 rows at a time do not fit: 2" in printed.getvalue()
    assert "trial        2 rows at a time: forward and backward in" in printed.getvalue()
    written = tomllib.loads((folder / "config.toml").read_text())
    assert written["training"]["micro_batch_size"] == 2
    assert [r.step for r in read_metrics(folder / "metrics.jsonl")] == list(range(13))


def test_one_that_was_asked_for_is_an_error_with_what_would_fit(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse_more_than(2, monkeypatch)
    assert main([*tiny_flags, "--micro-batch-size", "4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory with 4 of 4 rows at a time and seq_len 16 (CUDA")
    assert "start again with --micro-batch-size 2 (" in line
    (folder,) = Path(tiny_flags[tiny_flags.index("--out") + 1]).glob("corpus-nano-*")
    assert not (folder / "metrics.jsonl").read_text()  # before anything was measured


def test_the_trial_changes_nothing(tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def curve() -> list[float | None]:
        folder = run(parse(tiny_flags), io.StringIO())
        return [record.loss for record in read_metrics(folder / "metrics.jsonl")]

    with_it = curve()
    monkeypatch.setattr("tilewright_train.pretraining.try_first_batch", lambda chosen, *_: chosen)
    assert curve() == with_it


def test_states_that_the_first_update_makes_are_counted(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU with room for the trial alone the micro-batch becomes smaller, and none fits."""
    needed: list[int] = []
    try_one = trial._try

    def with_a_peak(together: int, *arguments: Any) -> tuple[int, str | None]:
        needed.append(together)
        return 100 * together, try_one(together, *arguments)[1]

    monkeypatch.setattr(trial, "_try", with_a_peak)
    monkeypatch.setattr(trial, "_room", lambda device: 150)
    printed = io.StringIO()
    run(parse(tiny_flags), printed)
    assert needed == [4, 2, 1]
    assert "100.00 B" not in printed.getvalue()
    assert "trial        1 rows at a time: " in printed.getvalue()
