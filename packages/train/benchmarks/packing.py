"""Packed rows against padded ones on `stories`: `python packing.py OUT.json`, on one GPU.

The 26 M preset, 256 tokens a row, 40 steps of 256 packed rows and of the 1,896 padded rows that
hold about as many documents. Each is a whole run of `train-pretrain`; the time of a step is the
mean of 25, without those that compile and without the last, which is followed by a checkpoint.
"""

import io
import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tilewright_train.layers import parse
from tilewright_train.metrics import read_metrics
from tilewright_train.pretraining import run

STEPS, TIMED = 40, 25
FLAGS = (
    f"--data stories --preset 26m --seq-len 256 --steps {STEPS} --eval-every {STEPS}"
    f" --eval-tokens 60000 --save-every {STEPS} --sample-tokens 20 --warmup-steps 10"
    " --vocab-size 4096 --seed 0 --no-deterministic"
)
VARIANTS = {
    "best_fit": "--packing best_fit --batch-size 256",
    # Half of the rows at a time: the logits of all would take most of the memory.
    "none": "--packing none --batch-size 1896 --micro-batch-size 948",
    "concat, mask on": "--document-mask on --batch-size 256",
}


def measure(flags: str, folder: Path) -> dict[str, Any]:
    """What one run says of itself."""
    torch.cuda.reset_peak_memory_stats()
    places = ["--out", str(folder / "runs"), "--cache-dir", str(folder / "cache")]
    made = run(parse([*FLAGS.split(), *flags.split(), *places]), io.StringIO())
    summary = json.loads((made / "summary.json").read_text())
    ends = {record.step: record.time for record in read_metrics(made / "metrics.jsonl")}
    return {
        "flags": flags,
        "step_seconds": (ends[STEPS - 1] - ends[STEPS - 1 - TIMED]) / TIMED,
        "val_loss": summary["val_loss"],
        "peak_memory_gib": summary["peak_memory_bytes"] / 2**30,
        "packing_efficiency": summary["packing_efficiency"],
        "data_share": summary["data_share"],
    }


def main(out: Path) -> None:
    """Measure all variants and write them to `out`."""
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in VARIANTS.items():
            runs.append({"name": name, **measure(flags, Path(folder))})
            print(runs[-1], flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    record = {
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit.stdout.strip(),
        "command": "python packages/train/benchmarks/packing.py OUT.json",
        "flags": FLAGS,
        "runs": runs,
    }
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
