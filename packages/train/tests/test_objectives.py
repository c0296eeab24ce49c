"""SFT and DPO in two processes, in parts of one row, are what they are in one process at once."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright_train.config import Objective
from tilewright_train.layers import parse
from tilewright_train.metrics import read_metrics
from tilewright_train.pretraining import run


@pytest.fixture
def data(tmp_path: Path) -> dict[Objective, Path]:
    """Answers of unequal lengths, and pairs of them: rows differ in what they have to predict."""
    words = ["the", "cat", "sat", "on", "a", "red", "mat", "today"]
    files: dict[Objective, Path] = {"sft": tmp_path / "sft.jsonl", "dpo": tmp_path / "dpo.jsonl"}
    talks, pairs = [], []
    for n in range(300):
        answers = (" ".join(words[: 1 + n % 7]), " ".join(words[n % 3 :]))
        turns = [[{"role": "assistant", "content": answer}] for answer in answers]
        prompt = [{"role": "user", "content": f"say {n}"}]
        talks.append(json.dumps({"messages": prompt + turns[0]}))
        pairs.append(json.dumps({"prompt": prompt, "chosen": turns[0], "rejected": turns[1]}))
    files["sft"].write_text("\n".join(talks))
    files["dpo"].write_text("\n".join(pairs))
    return files


def numbers(folder: Path) -> list[float]:
    """Losses, norms and metrics, but for accuracies: a margin of zero is above it by rounding."""
    made: list[float] = []
    for r in read_metrics(folder / "metrics.jsonl"):
        made += [r.loss or 0.0, r.val_loss or 0.0, r.grad_norm or 0.0]
        made += [value for name, value in r.metrics.items() if "accurac" not in name]
    return made


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ("sft", ["--packing", "best_fit", "--parallel", "ddp"]),
        # The moving reference reads weights that travel between the processes.
        ("dpo", ["--packing", "best_fit", "--parallel", "zero1", "--reference", "ema"]),
    ],
)
def test_two_processes_in_parts_are_one_process_at_once(
    objective: Objective,
    more: list[str],
    data: dict[Objective, Path],
    tiny_flags: list[str],
    tmp_path: Path,
) -> None:
    run(parse(tiny_flags), io.StringIO())
    flags = [
        *("--data", str(data[objective]), "--seq-len", "64", "--batch-size", "8", "--steps", "4"),
        *("--lr", "0.01", "--eval-every", "2", "--eval-tokens", "500", "--max-grad-norm", "0.05"),
        *("--threads", "1", "--device", "cpu"),
        *("--out", str(tmp_path / "runs"), "--cache-dir", str(tmp_path / "cache"), *more),
    ]
    alone = run(
        parse([*flags, "--name", "alone", "--micro-batch-size", "8"], objective), io.StringIO()
    )
    two = ["--objective", objective, "--name", "two", "--micro-batch-size", "1"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "tilewright_train", *flags, *two),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "processes    2" in done.stdout
    expected = numbers(alone)
    assert len(expected) >= 15
    assert numbers(tmp_path / "runs" / "two") == pytest.approx(expected, rel=1e-4, abs=1e-5)
