"""Whole runs: what they leave behind, how they end, and that a resumed one is the same run."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file

from tilewright_model import CausalLM, CausalLMOutput
from tilewright_train import finish, saver, tokens
from tilewright_train.batches import Batch, BatchSampler
from tilewright_train.cli import main
from tilewright_train.layers import parse
from tilewright_train.metrics import read_metrics
from tilewright_train.pretraining import run
from tilewright_train.snapshot import Snapshot


def train(flags: list[str], *more: str) -> tuple[Path, str]:
    """Run in this process; the folder of the run and what was printed."""
    printed = io.StringIO()
    folder = run(parse([*flags, *more]), printed)
    return folder, printed.getvalue()


def losses(folder: Path) -> list[tuple]:
    """What must not change when a run is resumed: everything but speed, memory and time."""
    return [
        (r.step, r.loss, r.val_loss, r.lr, r.grad_norm, r.tokens)
        for r in read_metrics(folder / "metrics.jsonl")
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "step-000012" / "model.safetensors")


def assert_same_run(one: Path, other: Path, why: str = "") -> None:
    assert losses(one) == losses(other), why
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[name]), f"{name} {why}"


@pytest.mark.smoke
def test_a_run_learns_and_leaves_everything_behind(tiny_flags: list[str]) -> None:
    folder, printed = train(tiny_flags)
    assert folder.name == "corpus-nano-001"
    records = read_metrics(folder / "metrics.jsonl")
    assert [record.step for record in records] == list(range(13))
    measured = {r.step: r.val_loss for r in records if r.val_loss is not None}
    assert list(measured) == [0, 6, 12]
    assert measured[12] < measured[0] - 0.3
    assert all(r.tokens_per_second and r.grad_norm for r in records[1:])

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["val_loss"] == measured[12]
    assert summary["bigram_val_loss"] < measured[0]
    norm = summary["backend"]["operators"]["rms_norm"]
    assert norm["torch"] > 0
    assert (norm["triton"], norm["launches"]) == (0, 0)
    facts = json.loads((folder / "run.json").read_text())
    assert [source["files"] for source in facts["corpus"]] == [1]
    assert facts["versions"]["torch"] == torch.__version__

    picture = imread(folder / "report" / "loss.png")
    assert picture.std() > 0.01
    assert (folder / "samples" / "step-000012.txt").read_text()
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert kept == ["step-000004", "step-000008", "step-000012"]

    for wanted in (
        "warmup_steps 6        the recipe of nano, at most half the steps",
        "step  0/12  val loss 5.",
        f"bigram model on the same tokens {summary['bigram_val_loss']:.4f}",
        f"run          {folder}",
        f"picture      {folder}/report/loss.png",
        "next         train-pretrain --data",
        "sample\n",
    ):
        assert wanted in printed, wanted
    assert "\x1b" not in printed


def test_the_kernels_train_as_their_references_do(tiny_flags: list[str]) -> None:
    """Through the interpreter: two steps, every operator forward and backward."""
    flags = [*tiny_flags, "--steps", "2", "--batch-size", "2", "--eval-tokens", "30"]
    runs = {backend: train(flags, "--backend", backend)[0] for backend in ("torch", "triton")}
    operators = {}
    for backend, folder in runs.items():
        summary = json.loads((folder / "summary.json").read_text())
        operators[backend] = summary["backend"]["operators"]
    model = {
        "apply_rotary_emb", "linear_cross_entropy", "rms_norm", "scaled_dot_product_attention",
        "gated_mlp",
    }  # fmt: skip
    for name in model:
        assert operators["torch"][name]["torch"] > 0, name
        assert operators["torch"][name]["triton"] == 0, name
        assert operators["torch"][name]["launches"] == 0, name
        assert operators["triton"][name]["triton"] > 0, name
        assert operators["triton"][name]["torch"] == 0, name
        assert operators["triton"][name]["launches"] > operators["triton"][name]["triton"], name
    for one, other in zip(losses(runs["torch"]), losses(runs["triton"]), strict=True):
        for value, expected in zip(other, one, strict=True):
            assert value == (expected if expected is None else pytest.approx(expected, rel=1e-5))


@pytest.mark.gpu
def test_on_a_gpu_the_command_takes_triton_and_bf16(tiny_flags: list[str]) -> None:
    flags = [*tiny_flags, "--device", "cuda", "--steps", "20", "--document-mask", "off"]
    runs = [train(flags, "--backend", backend)[0] for backend in ("torch", "auto", "auto")]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in runs]
    assert {summary["precision"] for summary in summaries} == {"bf16"}
    assert [summary["backend"]["fell_back"] for summary in summaries] == [[], [], []]
    operators = summaries[1]["backend"]["operators"]
    assert operators["rms_norm"]["triton"] > 0
    for name, row in operators.items():
        assert row["fell_back"] == 0, row
        # products of so few tokens are cuBLAS's
        assert row["torch"] == 0 or name in ("gated_mlp", "linear"), row
    by_torch, by_triton = (
        [r.loss for r in read_metrics(folder / "metrics.jsonl") if r.step > 10]
        for folder in runs[:2]
    )
    assert len(by_torch) == 10
    assert by_triton == pytest.approx(by_torch, rel=0.01)
    assert summaries[1]["val_loss"] == pytest.approx(summaries[0]["val_loss"], rel=0.01)
    assert_same_run(runs[1], runs[2])


@pytest.mark.parametrize(
    "flags",
    [
        ["--document-mask", "on"],
        ["--packing", "best_fit"],
        ["--packing", "none"],
        ["--data", "CORPUS", "OTHER", "--weights", "1", "3", "--packing", "best_fit"],
    ],
)
def test_every_packing_trains_and_is_resumed_bit_for_bit(
    tiny_flags: list[str], tmp_path: Path, corpus_file: Path, flags: list[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("a cat, a mat, a hat\n" * 60)
    paths = {"CORPUS": str(corpus_file), "OTHER": str(other)}
    flags = [*tiny_flags, *(paths.get(flag, flag) for flag in flags)]
    whole, printed = train(flags)
    assert ("rows is tokens, the rest padding" in printed) is ("--packing" in flags)
    first, *_, last = [r.val_loss for r in read_metrics(whole / "metrics.jsonl") if r.val_loss]
    assert last < first - 0.2
    part = whole.with_name("part")
    shutil.copytree(whole, part)
    for done in ("step-000012", "step-000008"):
        shutil.rmtree(part / "checkpoints" / done)
    (part / "summary.json").unlink()
    train(["--resume", str(part)])
    assert_same_run(whole, part)
    summary = json.loads((part / "summary.json").read_text())
    assert 0.3 < summary["packing_efficiency"] <= 1
    assert summary["data_share"] < 1


def test_micro_batches_of_any_size_give_the_same_run(tiny_flags: list[str]) -> None:
    """Rows of `best_fit` differ in their predictions: each counts alike in any split."""
    flags = [*tiny_flags, "--packing", "best_fit"]
    whole, _ = train(flags, "--micro-batch-size", "4")
    for size in ("2", "1"):
        split, _ = train(flags, "--micro-batch-size", size)
        for one, other in zip(losses(whole), losses(split), strict=True):
            for value, expected in zip(other, one, strict=True):
                assert value == (
                    expected if expected is None else pytest.approx(expected, rel=2e-5)
                )


def test_workers_change_nothing(tiny_flags: list[str]) -> None:
    alone, _ = train(tiny_flags)
    read_ahead, _ = train(tiny_flags, "--workers", "2", "--prefetch", "1")
    assert_same_run(alone, read_ahead)


def test_the_runs_own_file_starts_the_same_run_again(tiny_flags: list[str]) -> None:
    first, _ = train(tiny_flags)
    second, _ = train(["--config", str(first / "config.toml")])
    assert second.name == "corpus-nano-002"
    assert_same_run(first, second)


def test_a_finished_run_that_is_resumed_says_so(tiny_flags: list[str]) -> None:
    folder, _ = train(tiny_flags)
    before = losses(folder)
    again, printed = train(["--resume", str(folder)])
    assert again == folder
    assert f"{folder} is finished" in printed
    assert losses(folder) == before


def test_a_resumed_run_is_the_same_run(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = train(tiny_flags)

    # Ctrl-C in the middle of the seventh step: it is finished and saved.
    def interrupt(self: BatchSampler, step: int, part: int = 0, parts: int = 1) -> Batch:
        if step == 6:
            signal.raise_signal(signal.SIGINT)
        return batch(self, step, part, parts)

    batch = BatchSampler.batch
    monkeypatch.setattr(BatchSampler, "batch", interrupt)
    assert main(tiny_flags) == 130
    monkeypatch.undo()
    part = whole.with_name("corpus-nano-002")
    assert [r.step for r in read_metrics(part / "metrics.jsonl")] == list(range(8))
    assert (part / "checkpoints" / "step-000007").is_dir()
    assert not (part / "summary.json").exists()

    _, printed = train(["--resume", str(part)])
    assert f"resume       {part} after step 7" in printed
    assert_same_run(whole, part)
    one, other = (
        load_file(folder / "checkpoints" / "step-000012" / "random.safetensors")
        for folder in (whole, part)
    )
    assert one.keys() == other.keys()
    assert "rank0.python" in one
    for name, state in one.items():
        assert torch.equal(state, other[name]), name
    assert json.loads((part / "summary.json").read_text())["first_val_loss"] == losses(whole)[0][2]


def test_ctrl_c_says_how_to_go_on(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tilewright_train import loop

    start = loop.TrainingLoop._start_step

    def interrupted(self: loop.TrainingLoop, step: int) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        start(self, step)

    monkeypatch.setattr(loop.TrainingLoop, "_start_step", interrupted)
    assert main(tiny_flags) == 128 + signal.SIGTERM
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"stopped after step 3 of 12, which is saved; go on with: train-pretrain --resume \S+\n",
        error,
    )


def test_a_damaged_checkpoint_stops_the_resume_until_told_otherwise(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = train(tiny_flags)
    expected = losses(whole), weights(whole)
    (whole / "summary.json").unlink()
    damaged = whole / "checkpoints" / "step-000012" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main(["--resume", str(whole)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {damaged} has ")
    remedy = "from step-000008, the newest whole checkpoint, add --resume-from-older\n"
    assert error.endswith(remedy)
    assert losses(whole) == expected[0]

    _, printed = train(["--resume", str(whole), "--resume-from-older"])
    assert "step-000012 is now step-000012.damaged" in printed
    assert losses(whole) == expected[0]
    for name, tensor in expected[1].items():
        assert torch.equal(tensor, weights(whole)[name]), name


def forget_the_note(folder: Path) -> None:
    """Make run.json what it was before it said whether the run has saved."""
    facts = json.loads((folder / "run.json").read_text())
    assert facts.pop("has_saved") is not None
    (folder / "run.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("gone", ["the folder", "what is in it", "what is in it, and the note"])
def test_a_run_whose_checkpoints_are_gone_keeps_its_metrics(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str], gone: str
) -> None:
    folder, _ = train(tiny_flags)
    (folder / "summary.json").unlink()
    for hidden in folder.glob(".*"):  # what copies often leave behind
        hidden.unlink()
    if "note" in gone:
        forget_the_note(folder)
    shutil.rmtree(folder / "checkpoints")
    if gone != "the folder":
        (folder / "checkpoints").mkdir()
    before = (folder / "metrics.jsonl").read_bytes()
    assert main(["--resume", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder / 'checkpoints'} holds no checkpoint, but ")
    assert "reaches step 12: put the checkpoints back, or start a new run" in error
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_run_without_the_note_gets_it_where_it_goes_on(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    folder, _ = train(tiny_flags)
    (folder / "summary.json").unlink()
    for later in ("step-000008", "step-000012"):
        shutil.rmtree(folder / "checkpoints" / later)
    forget_the_note(folder)
    monkeypatch.setattr(saver, "save", killed)  # what it saves itself would be noted, too
    assert main(["--resume", str(folder), "--no-async-save"]) == 130
    monkeypatch.undo()
    assert read_metrics(folder / "metrics.jsonl")[-1].step == 8  # which is not more than 2 * 4
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    assert main(["--resume", str(folder)]) == 2
    assert "reaches step 8: put the checkpoints back" in capsys.readouterr().err


@pytest.mark.parametrize("note", [True, False])
def test_a_run_killed_before_its_first_checkpoint_is_whole_starts_again(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch, note: bool
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(saver, "save", killed)
    assert main([*tiny_flags, "--no-async-save"]) == 130
    monkeypatch.undo()
    (folder,) = Path(tiny_flags[tiny_flags.index("--out") + 1]).glob("corpus-nano-*")
    assert read_metrics(folder / "metrics.jsonl")[-1].step == 4  # the step of the checkpoint
    if note:
        train(["--resume", str(folder), "--save-every", "1"])  # far less than it has come
    else:
        forget_the_note(folder)
        train(["--resume", str(folder)])
    assert [r.step for r in read_metrics(folder / "metrics.jsonl")] == list(range(13))


def test_a_run_that_never_could_save_starts_again(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(root: Path, snapshot: Snapshot, **_: object) -> None:
        if snapshot.step == 10:
            raise KeyboardInterrupt
        raise OSError("no space left on device")

    monkeypatch.setattr(saver, "save", full)
    flags = [*tiny_flags, "--no-async-save", "--on-save-failure", "continue"]
    flags[flags.index("--save-every") + 1] = "1"
    assert main(flags) == 130
    monkeypatch.undo()
    (folder,) = Path(tiny_flags[tiny_flags.index("--out") + 1]).glob("corpus-nano-*")
    assert read_metrics(folder / "metrics.jsonl")[-1].step == 10
    train(["--resume", str(folder)])
    assert [r.step for r in read_metrics(folder / "metrics.jsonl")] == list(range(13))


@pytest.mark.parametrize("where", ["the model is built", "a step is made"])
@pytest.mark.parametrize("how", ["cpu", "gpu", "python"])
def test_out_of_memory_has_a_remedy(
    tiny_flags: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    how: str,
) -> None:
    def fails(*_: object, **__: object) -> None:
        if how == "cpu":
            torch.empty(1 << 60, dtype=torch.uint8)  # more than any machine has
        raise torch.OutOfMemoryError("CUDA out of memory") if how == "gpu" else MemoryError

    if where == "the model is built":
        monkeypatch.setattr(CausalLM, "to", fails)
    else:
        monkeypatch.setattr(CausalLM, "forward", fails)
    assert main(tiny_flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory with ")
    assert "rows at a time and seq_len 16" in error
    assert "by the plan a step takes" in error
    assert "): start again with " in error.split("activations")[1]
    assert error.count("\n") == 1
    assert ("DefaultCPUAllocator" in error) == (how == "cpu")


def test_other_errors_of_torch_keep_their_traceback(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(CausalLM, "forward", fails)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main(tiny_flags)


def test_a_bigram_model_of_a_part_of_the_tokens_is_said(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tiny_flags, "--steps", "1")[1]
    monkeypatch.setattr(finish, "_BIGRAM_TOKENS", 1000)
    part = train(tiny_flags, "--steps", "1")[1]
    assert "fitted on the first" not in whole
    assert "(fitted on the first 1,000 tokens)" in part


def test_the_tokens_are_checked_once(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    load = tokens.load

    def counted(folder: Path) -> tokens.EncodedSource:
        loaded.append(folder)
        return load(folder)

    monkeypatch.setattr(tokens, "load", counted)
    train(tiny_flags, "--steps", "1")
    assert len(loaded) == 1


def test_a_run_whose_data_changed_is_not_resumed(
    tiny_flags: list[str], corpus_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = train(tiny_flags)
    (folder / "summary.json").unlink()
    corpus_file.write_text(corpus_file.read_text() + '{"text": "one more"}\n')
    assert main(["--resume", str(folder)]) == 2
    assert f"the data of {folder} have changed since it began" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run_with_a_remedy(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = CausalLM.forward
    calls = []

    def diverging(self: CausalLM, *args: Any, **kwargs: Any) -> CausalLMOutput:
        output = forward(self, *args, **kwargs)
        calls.append(torch.is_grad_enabled())
        assert output.loss is not None
        return output._replace(loss=output.loss * torch.nan) if sum(calls) == 7 else output

    monkeypatch.setattr(CausalLM, "forward", diverging)
    assert main([*tiny_flags, "--max-skipped", "1"]) == 2
    error = capsys.readouterr().err
    assert "1 updates in a row were left out, the last at step 6 with loss nan" in error
    assert "start again with a smaller --lr" in error
    (run_folder,) = (Path(tiny_flags[tiny_flags.index("--out") + 1])).glob("corpus-nano-*")
    assert [p.name for p in (run_folder / "checkpoints").iterdir()] == ["step-000004"]


def in_two_processes(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "tilewright_train", *flags),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("parallel", ["ddp", "zero1"])
def test_two_processes_train_as_one_on_the_joined_batch(
    parallel: str, tiny_flags: list[str], tmp_path: Path
) -> None:
    # Gradients are clipped at every step, by the norm over all processes.
    tiny_flags = [*tiny_flags, "--max-grad-norm", "0.05"]
    alone, _ = train(tiny_flags, "--name", "alone")
    # Two rows a process, computed one by one.
    split = ("--parallel", parallel, "--micro-batch-size", "1")
    done = in_two_processes(*tiny_flags, "--name", "two", *split)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("val loss") == 3  # said once, not once a process
    assert "processes    2" in done.stdout
    two = tmp_path / "runs" / "two"
    for one, other in zip(losses(alone), losses(two), strict=True):
        for value, expected in zip(other, one, strict=True):
            assert value == (expected if expected is None else pytest.approx(expected, rel=2e-5))
    whole = weights(two)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=2e-5)
    if parallel == "zero1":
        # From the checkpoint before the last, whose states the first process has collected.
        shutil.rmtree(two / "checkpoints" / "step-000012")
        (two / "summary.json").unlink()
        again = in_two_processes("--resume", str(two))
        assert again.returncode == 0, again.stderr
        for name, tensor in whole.items():
            assert torch.equal(weights(two)[name], tensor), name


def test_an_error_of_one_process_ends_both(tiny_flags: list[str], corpus_file: Path) -> None:
    corpus_file.write_text("bad\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "tilewright_train", *tiny_flags),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1
    assert f"{corpus_file}:1 is not JSON" in ours[0]
