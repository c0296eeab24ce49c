"""What training reaches on one GPU: `python training.py OUT.json [SECTION …]`.

The figures of docs/training.md. Every run is one of `train-pretrain` with the flags that its record
names, in this process; nothing of it is left out. Sections: precision, accumulation, backends,
saving, options, looked-at, fp32; without any all of them. What OUT.json holds of other sections
stays. `--small` takes models of seconds instead, to see on a CPU that the script works.
"""

import argparse
import gc
import io
import json
import platform
import re
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tilewright_train import automatic
from tilewright_train.hardware import accelerator_here
from tilewright_train.layers import parse
from tilewright_train.metrics import Record, read_metrics, steady_tokens_per_second
from tilewright_train.plan import make_plan
from tilewright_train.pretraining import run

BASE = "--preset 0.5b --vocab-size 32768 --lr 3e-4"
SMALL = "--preset nano --num-hidden-layers 1 --lr 3e-4 --sample-tokens 1"
BF16 = "--precision bf16"
KEPT = {"profile": "profile/kernels.txt", "memory": "memory/summary.txt"}


@dataclass(frozen=True)
class Case:
    """One run."""

    name: str
    steps: int
    rows: int
    seq_len: int
    flags: str

    def words(self, small: bool) -> list[str]:
        """The flags of the command."""
        steps, rows, seq_len, flags = self.steps, self.rows, self.seq_len, self.flags
        if small:
            steps, rows, seq_len = min(steps, 12), min(rows, 4), 16
            flags = re.sub(r"--(tf32|memory-snapshot|compile)|--micro-batch-size \d+", "", flags)
            flags = flags.replace("triton", "torch").replace("--save-every 100", "--save-every 4")
            flags = flags.replace("--eval-tokens 65536", "--eval-tokens 512")
        words = f"--steps {steps} --warmup-steps {min(30, steps // 2)} --batch-size {rows}"
        words += f" --seq-len {seq_len} {flags}"
        if "--save-every" not in flags:
            words += f" --save-every {steps}"
        if "--eval-every" not in flags:
            words += f" --eval-every {steps} --eval-tokens 4096"
        return words.split()


def learning(name: str, flags: str, steps: int = 300) -> Case:
    """A run whose losses are of interest."""
    return Case(name, steps, 8, 1024, f"{flags} --eval-every 100 --eval-tokens 65536")


def stepping(name: str, flags: str, steps: int = 15, rows: int = 8) -> Case:
    """A run whose speed and memory are of interest."""
    return Case(name, steps, rows, 2048, flags)


OPTIONS = (
    "--compile",
    "--recompute selective",
    "--recompute full",
    "--optim muon",
    "--no-deterministic",
    "--compile --recompute selective",
)
SECTIONS: dict[str, tuple[Case, ...]] = {
    "precision": (
        learning("bf16", BF16),
        learning("bf16-weights", "--precision bf16-weights"),
        learning("fp16", "--precision fp16"),
        learning("fp32 with TF32", "--precision fp32 --tf32"),
    ),
    "accumulation": (
        stepping("16 rows at once", f"{BF16} --micro-batch-size 16", rows=16),
        stepping("4 times 4 rows", f"{BF16} --micro-batch-size 4", rows=16),
        stepping("16 times 1 row", f"{BF16} --micro-batch-size 1", rows=16),
    ),
    "backends": tuple(
        learning(name, f"{BF16} --document-mask off --backend {name}", steps=100)
        for name in ("auto", "triton", "torch")
    ),
    "saving": (
        stepping("without", BF16, steps=110),
        stepping("with", f"{BF16} --save-every 100 --keep 1", steps=210),
    ),
    "options": (
        stepping("as it is", BF16),
        *(stepping(flags, f"{BF16} {flags}") for flags in OPTIONS),
        stepping("64 rows, micro-batch by the plan", BF16, rows=64),
    ),
    "looked at": (
        stepping("looked at", f"{BF16} --profile 6:8 --memory-snapshot", steps=8),
        stepping("looked at, compiled", f"{BF16} --compile --profile 6:8", steps=8),
    ),
    "fp32": (stepping("fp32 without TF32", "--precision fp32 --profile 3:4", steps=3),),
}


def measure(case: Case, folder: Path, small: bool) -> dict[str, Any]:
    """What one run says of itself."""
    words = case.words(small)
    config = parse([*(SMALL if small else BASE).split(), *words, "--out", str(folder)])
    chosen = automatic.choose(config)
    on_gpu = torch.cuda.is_available()
    gpu = accelerator_here(torch.device("cuda")) if on_gpu else None
    plan = make_plan(
        automatic.model_config(chosen), chosen.step_shape(1), gpu, tf32=config.machine.tf32
    )
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    text, began = io.StringIO(), time.perf_counter()
    made = run(config, text)
    seconds = time.perf_counter() - began
    summary = json.loads((made / "summary.json").read_text())
    records = read_metrics(made / "metrics.jsonl")
    steps = [record for record in records if record.step]
    settled = chosen.settled
    found: dict[str, Any] = {
        "case": case.name,
        "flags": " ".join(words),
        "steps": steps[-1].step,
        "rows": settled.batch_size,
        "seq_len": settled.seq_len,
        "micro_batch_size": _micro_batch(text.getvalue(), settled.micro_batch_size),
        "precision": settled.precision,
        "tokens_per_second": steady_tokens_per_second(records),
        "peak_bytes": summary["peak_memory_bytes"],
        "planned_bytes": plan.memory.total,
        "planned_tokens_per_second": plan.tokens_per_second,
        "mfu": statistics.median(record.mfu or 0.0 for record in steps),
        "skipped_steps": steps[-1].skipped_steps,
        "loss_scale": steps[-1].loss_scale,
        "val_loss": {r.step: r.val_loss for r in records if r.val_loss is not None},
        "seconds": seconds,
        "losses": [record.loss for record in steps],
        "step_seconds": [_seconds(record) for record in steps],
        "saving": summary["saving"],
    }
    for name, file in KEPT.items():
        if (made / file).exists():
            found[name] = (made / file).read_text()
    return found


def _micro_batch(text: str, planned: int) -> int:
    """Rows at a time, as the trial of the first batch left them."""
    tried = re.findall(r"^trial +(\d+) rows at a time: ", text, re.MULTILINE)
    return int(tried[-1]) if tried else planned


def _seconds(record: Record) -> float:
    tokens = record.tokens / record.step
    return round(tokens / (record.tokens_per_second or tokens), 5)


def versions() -> dict[str, str | None]:
    """What it runs on."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
    }


def main() -> None:
    """Measure the sections that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("sections", nargs="*", help=", ".join(SECTIONS))
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    wanted = [name.replace("-", " ") for name in options.sections] or list(SECTIONS)
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    record |= {
        **versions(),
        "commit": commit.stdout.strip(),
        "command": "train-pretrain",
        "base": SMALL if options.small else BASE,
        "corpus": "Python's standard library",
    }
    with tempfile.TemporaryDirectory() as folder:
        for section in wanted:
            record[section] = []
            for case in SECTIONS[section]:
                found = measure(case, Path(folder), options.small)
                rate = found["tokens_per_second"] or 0.0
                print(f"{case.name}: {rate:,.0f} tokens/s, {found['seconds']:.1f} s", flush=True)
                record[section].append(found)
                options.out.write_text(json.dumps(record, indent=1) + "\n")
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
