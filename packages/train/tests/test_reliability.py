"""Runs that are killed, stopped, damaged, moved to other ranks: the curve is that of the whole run.

Processes are forked from one that has imported everything, so that ten of them start in the time of
one import of torch.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tilewright_train import checkpoint
from tilewright_train.cli import main
from tilewright_train.layers import parse
from tilewright_train.metrics import read_metrics
from tilewright_train.pretraining import run
from tilewright_train.run_lock import locked

# `start(flags, ranks)` forks the processes of a run; steps and saves take long enough to be hit.
FORKS = """
import os, random, signal, socket, sys, time
from pathlib import Path
import tilewright_optim
from tilewright_train import checkpoint, cli, loop, pretraining

seal, step = checkpoint.seal, loop.TrainingLoop._start_step

def slow_seal(folder):
    time.sleep(0.03)
    seal(folder)
    time.sleep(0.03)

def slow_step(self, number):
    time.sleep(0.02)
    step(self, number)

checkpoint.seal, loop.TrainingLoop._start_step = slow_seal, slow_step

def start(flags, ranks=0):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks or 1):
        child = os.fork()
        if child == 0:
            if ranks:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost",
                    "MASTER_PORT": str(port),
                }
            os._exit(cli.main(flags))
        children.append(child)
    return children

def statuses(children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

def lines(run):
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\\n") if file.exists() else 0

def wait_until(condition, child):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the run does not get on"
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run has ended"
        time.sleep(0.001)
"""


def forks(script: str, *arguments: str) -> str:
    """Run a script that begins with `FORKS`; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS + script, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def train(flags: list[str], *more: str) -> tuple[Path, str]:
    printed = io.StringIO()
    folder = run(parse([*flags, *more]), printed)
    return folder, printed.getvalue()


def curve(folder: Path) -> list[tuple]:
    """Everything in the metrics but speed, memory and time."""
    return [
        (r.step, r.loss, r.val_loss, r.lr, r.grad_norm, r.tokens)
        for r in read_metrics(folder / "metrics.jsonl")
    ]


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.all_checkpoints(folder / "checkpoints")[-1] / "model.safetensors")


def assert_same(one: Path, other: Path, why: object = "") -> None:
    assert curve(one) == curve(other), why
    for name, tensor in last_weights(one).items():
        assert torch.equal(tensor, last_weights(other)[name]), f"{name} {why}"


def assert_close(one: Path, other: Path, tolerance: float = 5e-5) -> None:
    """Up to the order of sums, which follows from how ranks divide a batch."""
    for mine, theirs in zip(curve(one), curve(other), strict=True):
        for value, expected in zip(mine, theirs, strict=True):
            assert value == (
                expected if expected is None else pytest.approx(expected, rel=tolerance)
            )


KILLS = """
run, draw, flags = Path(sys.argv[1]), random.Random(int(sys.argv[2])), sys.argv[3:]

def partial():
    folder = run / "checkpoints"
    there = os.scandir(folder) if folder.is_dir() else ()
    return {(file.name, file.inode()) for file in there if file.name.endswith(".partial")}

in_a_save = 0
for kill in range(10):
    done, rests = lines(run), partial()
    (child,) = start(flags)
    # Five times while a checkpoint is written, five times whenever it may be.
    wait_until(lambda: partial() - rests if kill % 2 else lines(run) > min(done, 3), child)
    time.sleep(draw.uniform(0, 0.05))
    in_a_save += bool(partial() - rests)
    os.kill(child, signal.SIGKILL)
    assert statuses([child]) == [-9], kill
print("in a save:", in_a_save)
"""


def test_killed_ten_times_at_random_the_curve_is_that_of_the_whole_run(
    tiny_flags: list[str], tmp_path: Path
) -> None:
    flags = [*tiny_flags, "--steps", "48", "--save-every", "2"]
    whole, _ = train(flags, "--name", "whole")
    seed = int.from_bytes(os.urandom(2), "big")
    killed = tmp_path / "runs" / "killed"
    again = [*flags, "--name", "killed", "--resume", "auto"]  # the same command every time
    printed = forks(KILLS, str(killed), str(seed), *again)
    hits = int(printed.rpartition("in a save: ")[2])
    assert hits >= 3, f"seed {seed}: {printed}"
    assert not (killed / "summary.json").exists()
    train(again)
    assert_same(whole, killed, f"seed {seed}")
    assert not list((killed / "checkpoints").glob(".*"))


RANKS = """
import shutil
run, flags = Path(sys.argv[1]), sys.argv[2:]
children = start(flags, 2)
wait_until(lambda: lines(run) > 5, children[0])
os.kill(children[1], signal.SIGTERM)  # one of them alone
print("stopped:", statuses(children))
for name in ("one", "three"):
    shutil.copytree(run, run.with_name(name))
print("one:", statuses(start(["--resume", str(run.with_name("one"))])))
three = ["--resume", str(run.with_name("three"))]
print("three:", statuses(start([*three, "--parallel", os.environ["THEN"]], 3)))
print("five:", statuses(start(["--resume", str(run)], 5)))
"""


@pytest.mark.parametrize(("parallel", "then"), [("zero1", "fsdp"), ("fsdp", "ddp")])
def test_a_signal_to_one_rank_stops_all_at_a_step_from_which_one_or_three_go_on(
    tiny_flags: list[str],
    tmp_path: Path,
    parallel: str,
    then: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two hold a part of the states each; one holds all of them, and three do or divide more."""
    monkeypatch.setenv("THEN", then)
    flags = [*tiny_flags, "--batch-size", "6", "--micro-batch-size", "3", "--steps", "20"]
    whole, _ = train(flags, "--name", "whole")
    two = tmp_path / "runs" / "two"
    printed = forks(RANKS, str(two), *flags, "--name", "two", "--parallel", parallel)
    assert "stopped: [143, 143]" in printed
    saved = checkpoint.all_checkpoints(two / "checkpoints")[-1]
    assert read_metrics(two / "metrics.jsonl")[-1].step == checkpoint.step_of(saved) < 20
    assert f"stopped after step {checkpoint.step_of(saved)} of 20, which is saved" in printed
    facts = json.loads((saved / "training.json").read_text())["facts"]
    assert facts["rows"] == 6 * checkpoint.step_of(saved)
    assert "one: [0]" in printed
    assert "three: [0, 0, 0]" in printed
    assert "2 processes before, 3 now: sums are taken in another order" in printed
    for name in ("one", "three"):
        assert_close(two.with_name(name), whole)
    # A number that does not fit says so once, and all end.
    assert "five: [2, 2, 2, 2, 2]" in printed
    assert printed.count("error: batch_size 6 is not a multiple of the 5 processes: start") == 1


LOST = """
import os, signal, sys
from tilewright_train import cli, loop

step = loop.TrainingLoop._start_step

def killed(self, number):
    place = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    if number == 6 and place == ("1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, number)

loop.TrainingLoop._start_step = killed
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.multigpu(2))])
def test_a_rank_that_is_killed_is_named_and_the_run_restarted(
    tiny_flags: list[str], tmp_path: Path, device: str
) -> None:
    tiny_flags = [*tiny_flags, "--device", device, "--precision", "fp32"]
    whole, _ = train(tiny_flags, "--name", "whole")
    script = tmp_path / "lost.py"
    script.write_text(LOST)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "2"),
            *("--nproc-per-node", "2", str(script), *tiny_flags),
            *("--name", "lost", "--resume", "auto"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    # On GPUs the others wait inside NCCL: torchrun, whose child it was, names it and ends them.
    assert "failed (exitcode: -9) local_rank: 1" in done.stderr
    named = [line for line in done.stderr.splitlines() if line.startswith("error: rank 0: ")]
    assert len(named) == (device == "cpu")
    assert device != "cpu" or "rank(s) 1 died or hang. Restart from the last" in named[0]
    lost = tmp_path / "runs" / "lost"
    assert f"resume       {lost} after step 4" in done.stdout
    assert_close(lost, whole, 5e-5 if device == "cpu" else 1e-3)


def test_a_run_belongs_to_one_process(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = train(tiny_flags)
    (folder / "summary.json").unlink()
    before = curve(folder)
    held, hold = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with locked(folder):
            os.write(held[1], b".")
            os.read(hold[0], 1)
        os._exit(0)
    os.read(held[0], 1)
    try:
        assert main(["--resume", str(folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {folder} is in use by process {child} on ")
        assert line.endswith(": wait for it or stop it, or start a new run with another --name")
        assert curve(folder) == before
    finally:
        os.write(hold[1], b".")
        os.waitpid(child, 0)
        for end in (*held, *hold):
            os.close(end)
    assert main(["--resume", str(folder)]) == 0


def test_a_folder_that_has_become_read_only_is_one_line(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = train(tiny_flags)
    (folder / "summary.json").unlink()
    opened = Path.open

    def read_only(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.is_relative_to(folder) and mode != "r" and mode != "rb":
            raise OSError(30, os.strerror(30), str(self))  # EROFS; root writes whatever the mode is
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", read_only)
    assert main(["--resume", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder} cannot be written (")
    assert "read-only file system): make it writable" in line


def full_disk_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    seal = checkpoint.seal

    def full(folder: Path) -> None:
        if folder.name in [f".step-{step:06d}.partial" for step in steps]:
            raise OSError(28, os.strerror(28), str(folder / "MANIFEST.json"))
        seal(folder)

    monkeypatch.setattr(checkpoint, "seal", full)


def test_a_save_that_fails_is_left_out_as_told(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = train(tiny_flags, "--name", "whole")
    full_disk_at(monkeypatch, 8)
    folder, printed = train(tiny_flags, "--on-save-failure", "continue")
    (line,) = [line for line in printed.splitlines() if line.startswith("not saved")]
    assert line.startswith("not saved    step 8: ")
    assert "no space left on device" in line
    assert line.endswith("(--on-save-failure continue), older checkpoints are whole")
    names = [f.name for f in checkpoint.all_checkpoints(folder / "checkpoints")]
    assert names == ["step-000004", "step-000012"]
    assert_same(whole, folder)
    assert json.loads((folder / "summary.json").read_text())["checkpoints_not_saved"] == 1


def test_a_save_that_fails_ends_the_run_before_the_next_one(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_disk_at(monkeypatch, 8)
    flags = [*tiny_flags, "--steps", "4000", "--save-every", "8", "--eval-every", "4000"]
    assert main([*flags, "--name", "full"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no space left on device): make room, then go on with" in line
    folder = Path(tiny_flags[tiny_flags.index("--out") + 1]) / "full"
    assert not checkpoint.all_checkpoints(folder / "checkpoints")
    assert 8 <= read_metrics(folder / "metrics.jsonl")[-1].step <= 16


def test_without_its_last_checkpoint_no_run_ends_well(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_disk_at(monkeypatch, 12)
    assert main([*tiny_flags, "--name", "full", "--on-save-failure", "continue"]) == 2
    assert "no space left on device): make room, then go on with" in capsys.readouterr().err
    folder = Path(tiny_flags[tiny_flags.index("--out") + 1]) / "full"
    assert not (folder / "summary.json").exists()
    monkeypatch.undo()
    assert main(["--resume", str(folder)]) == 0
    whole, _ = train(tiny_flags, "--name", "whole")
    assert_same(whole, folder)


def test_a_run_goes_on_with_changed_data_when_told(
    tiny_flags: list[str], corpus_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = train(tiny_flags)
    before = curve(folder)
    for gone in ("step-000012", "step-000008"):
        shutil.rmtree(folder / "checkpoints" / gone)
    (folder / "summary.json").unlink()
    vocabulary = (folder / "checkpoints/step-000004/tokenizer.json").read_bytes()
    corpus_file.write_text(corpus_file.read_text() + '{"text": "zebras quiz a jinx"}\n' * 40)
    assert main(["--resume", str(folder)]) == 2
    assert "add --accept-changed-data to go on with other ones" in capsys.readouterr().err
    _, printed = train(["--resume", str(folder), "--accept-changed-data"])
    assert f"data         have changed since {folder} began" in printed
    assert curve(folder)[:5] == before[:5]
    assert curve(folder)[5:] != before[5:]
    assert (folder / "checkpoints/step-000012/tokenizer.json").read_bytes() == vocabulary
    facts = json.loads((folder / "run.json").read_text())
    assert facts["tokens"]["sha256"] != facts["tokens_before"]["sha256"]
    assert facts["tokens"]["train_tokens"] > facts["tokens_before"]["train_tokens"]
    # From then on these are its data.
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-000012")
    goes_on = curve(folder)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder / "report")
    assert main(["--resume", str(folder), "--accept-changed-data"]) == 0
    assert curve(folder) == goes_on


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden-size", "48"], "holds another model than this run's: hidden_size 48, not 32;"),
        (["--vocab-size", "260"], "has another vocabulary than this run, 260 entries and not 279,"),
        (["--optim", "muon"], "optimizer is MuonW and this run's is AdamW: give the --optim that"),
        (["--batch-size", "6"], "has read 72 rows, which is not 12 steps of this run's batch_size"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    folder, _ = train(tiny_flags)
    (folder / "summary.json").unlink()
    other, _ = train(tiny_flags, *flags)
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(other / "checkpoints", folder / "checkpoints")
    capsys.readouterr()
    assert main(["--resume", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder / 'checkpoints' / 'step-000012'}")
    assert message in line
    assert "start a new run" in line


def test_a_config_that_was_cut_short_is_refused(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = train(tiny_flags, "--weight-decay", "0.3")
    (folder / "summary.json").unlink()
    config = folder / "config.toml"
    lines = [x for x in config.read_text().splitlines() if not x.startswith("weight_decay")]
    config.write_text("\n".join(lines) + "\n")
    assert main(["--resume", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "step-000012 was trained with weight_decay 0.3 and the run's config.toml" in line
    assert line.endswith("gives 0.1: put 0.3 back, or start a new run")


@pytest.mark.gpu
def test_on_a_gpu_a_resumed_run_is_the_same_run(tiny_flags: list[str]) -> None:
    flags = [*tiny_flags, "--device", "cuda"]
    whole, _ = train(flags, "--name", "whole")
    part = whole.with_name("part")
    shutil.copytree(whole, part)
    for gone in ("step-000012", "step-000008"):
        shutil.rmtree(part / "checkpoints" / gone)
    (part / "summary.json").unlink()
    train(["--resume", str(part)])
    assert_same(whole, part)
