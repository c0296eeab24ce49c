"""Runs that go wrong: what is left out, what stops them, what is named."""

import io
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tilewright_model import CausalLM
from tilewright_train import checkpoint, loop, preparation, pretraining
from tilewright_train.cli import main
from tilewright_train.layers import parse
from tilewright_train.metrics import read_metrics
from tilewright_train.pretraining import run


def folder_of(flags: list[str]) -> Path:
    (folder,) = Path(flags[flags.index("--out") + 1]).glob("corpus-nano-*")
    return folder


def broken_at(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float) -> None:
    """Multiply what the second norm gives in the forwards of these training steps, from 1 on."""
    forward = CausalLM.forward
    calls: list[torch.Tensor] = []
    seen: set[int] = set()

    def breaking(self: CausalLM, input_ids: torch.Tensor, **options: Any) -> Any:
        if torch.is_grad_enabled() and not any(input_ids.equal(ids) for ids in calls):
            calls.append(input_ids.clone())
            seen.add(len(calls))
        number = next((n for n, ids in enumerate(calls, 1) if input_ids.equal(ids)), 0)
        if torch.is_grad_enabled() and number in steps:
            block = self.layers[0].get_submodule("post_attention_layernorm")
            handle = block.register_forward_hook(lambda m, i, o: (o[0] * value, o[1]))
            try:
                return forward(self, input_ids, **options)
            finally:
                handle.remove()
        return forward(self, input_ids, **options)

    monkeypatch.setattr(CausalLM, "forward", breaking)


def test_an_injected_nan_is_left_out_and_named(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_at(monkeypatch, {5, 6}, math.nan)
    printed = io.StringIO()
    folder = run(parse(tiny_flags), printed)
    records = {record.step: record for record in read_metrics(folder / "metrics.jsonl")}
    assert [step for step, record in records.items() if step and record.loss is None] == [5, 6]
    assert records[12].skipped_steps == 2
    assert (records[12].val_loss or 9) < (records[0].val_loss or 0) - 0.3  # it learned all the same
    kept = folder / "skipped"
    assert sorted(p.name for p in kept.iterdir()) == ["step-000005", "step-000006"]
    facts = json.loads((kept / "step-000005" / "step.json").read_text())
    assert facts["why"] == "not finite"
    assert facts["guilty"].startswith("output of layers.0.")
    assert facts["own_loss"] == "nan"
    assert "left out     the update of step 5 (not finite: loss nan" in printed.getvalue()
    assert "first not finite: output of layers.0." in printed.getvalue()


def test_too_many_in_a_row_stop_the_run(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_at(monkeypatch, {5, 6, 7}, math.nan)
    assert main([*tiny_flags, "--max-skipped", "3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: 3 updates in a row were left out, the last at step 7")
    assert "allow more with --max-skipped" in line
    saved = [p.name for p in (folder_of(tiny_flags) / "checkpoints").iterdir()]
    assert saved == ["step-000004"]


def break_a_weight_at(monkeypatch: pytest.MonkeyPatch, step: int, value: float) -> None:
    """Change one weight of the second parameter just before a step."""
    start = loop.TrainingLoop._start_step

    def breaking(self: loop.TrainingLoop, number: int) -> None:
        if number + 1 == step:
            with torch.no_grad():
                self.guard.parameters[1].view(-1)[3] = value
        start(self, number)

    monkeypatch.setattr(loop.TrainingLoop, "_start_step", breaking)


def test_weights_that_are_not_finite_take_no_checkpoints_place(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_a_weight_at(monkeypatch, 7, math.nan)
    flags = [*tiny_flags, "--steps", "40", "--save-every", "2", "--keep", "2", "--eval-every", "40"]
    assert main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    newest = folder_of(tiny_flags) / "checkpoints" / "step-000006"
    assert line.startswith("error: 10 updates in a row were left out, the last at step 16")
    assert f"the newest checkpoint from before is {newest} (--init begins with its" in line
    saved = checkpoint.all_checkpoints(newest.parent)
    assert [folder.name for folder in saved] == ["step-000004", "step-000006"]
    for folder in saved:
        assert all(w.isfinite().all() for w in load_file(folder / "model.safetensors").values())


def test_the_checkpoint_of_a_stopped_run_holds_finite_weights_or_is_none(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_a_weight_at(monkeypatch, 6, math.inf)
    monkeypatch.setattr(pretraining._Training, "_left_out", lambda self, _: stop_now())
    assert main([*tiny_flags, "--steps", "40", "--eval-every", "40"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: step 7 is not saved: parameter layers.0.")
    assert "(1 of 2048 values not finite); start again with a smaller --lr" in line
    assert [f.name for f in (folder_of(tiny_flags) / "checkpoints").iterdir()] == ["step-000004"]


def stop_now() -> None:
    signal.raise_signal(signal.SIGTERM)


def test_a_checkpoint_waits_for_an_update_that_is_made(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_at(monkeypatch, {4, 5, 12}, math.nan)
    folder = run(parse([*tiny_flags, "--keep", "1"]), io.StringIO())
    # That of the last step is of weights from before it, so the one it follows stays.
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "step-000008",
        "step-000012",
    ]
    monkeypatch.undo()
    broken_at(monkeypatch, {4, 5}, math.nan)
    folder = run(parse([*tiny_flags, "--name", "other"]), io.StringIO())
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "step-000006",
        "step-000008",
        "step-000012",
    ]


def test_a_parameter_that_broke_is_named(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = preparation.build

    def with_a_broken_weight(*arguments: Any) -> Any:
        trainee = build(*arguments)
        weight = trainee.model.get_parameter("layers.0.self_attn.o_proj.weight")
        with torch.no_grad():
            weight[3, 2] = math.inf
        return trainee

    monkeypatch.setattr(preparation, "build", with_a_broken_weight)
    assert main([*tiny_flags, "--max-skipped", "2"]) == 2
    out, err = capsys.readouterr()
    everything = out + err
    assert "parameter layers.0.self_attn.o_proj.weight (1 of 1024 values not finite)" in everything


def test_a_learning_rate_a_hundred_times_too_large_is_told(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Spikes are left out when asked, and end the run when they do not stop; else it diverges."""
    flags = [*tiny_flags, "--steps", "100", "--warmup-steps", "0", "--eval-every", "100"]
    flags += ["--save-every", "100", "--max-skipped", "4"]
    good = run(parse([*flags, "--name", "good"]), io.StringIO())
    losses = [record.loss or math.nan for record in read_metrics(good / "metrics.jsonl")]
    _raise_the_rate(monkeypatch, after=70)
    kept = run(parse([*flags, "--name", "kept"]), io.StringIO())
    diverged = [record.loss or math.nan for record in read_metrics(kept / "metrics.jsonl")]
    assert diverged[1:71] == losses[1:71]
    assert max(diverged[71:]) > max(losses[71:]) + 1
    assert main([*flags, "--name", "skipped", "--on-spike", "skip"]) == 2
    out, err = capsys.readouterr()
    assert "(spike: loss " in out
    assert "4 updates in a row were left out" in err


def _raise_the_rate(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Multiply the learning rate by 100 from a step on."""
    build = preparation.build

    def with_another_schedule(*arguments: Any) -> Any:
        trainee = build(*arguments)
        step, count = trainee.guard.clip_and_step, [0]

        def louder(loss: torch.Tensor) -> Any:
            count[0] += 1
            factor = 100 if count[0] > after else 1
            groups = trainee.optimizer.param_groups
            rates = [group["lr"] for group in groups]
            for group in groups:
                group["lr"] *= factor
            outcome = step(loss)
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            return outcome

        trainee.guard.clip_and_step = louder
        return trainee

    monkeypatch.setattr(preparation, "build", with_another_schedule)


def test_a_guard_of_several_parts_decides_once_a_step(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_at(monkeypatch, {7}, math.nan)  # the first part of the fourth step
    printed = io.StringIO()
    folder = run(parse([*tiny_flags, "--micro-batch-size", "2"]), printed)
    records = read_metrics(folder / "metrics.jsonl")
    assert [record.step for record in records if record.step and record.loss is None] == [4]
    facts = json.loads((folder / "skipped" / "step-000004" / "step.json").read_text())
    assert facts["part"] == 0
