"""What `train-pretrain` reached: a plot of losses, and tables with what it is held to.

A record of one GPU is what packages/train/benchmarks/training.py saves, sections of runs; those of
several GPUs are runs of the same command under torchrun. Each run has its flags, its tokens a
second (median of later steps) and its highest memory, both beside the plan's. What was not run is
said to be so.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from tilewright_bench.curves import TRAINING
from tilewright_bench.training_tables import (
    NOT_MEASURED,
    Record,
    accumulation,
    backends,
    kills,
    options,
    parallel,
    precision,
    runs_of,
    saving,
)

_KERNELS = 12
_HOLDERS = 10


def load(root: Path, device: str) -> Record:
    """The record of one GPU; "parallel" in it are those of several, by their number."""
    folder = root / TRAINING
    one = folder / f"{device}-training.json"
    record = json.loads(one.read_text(encoding="utf-8")) if one.exists() else {}
    several = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob(f"{device}-x*-training.json"))
    ]
    return record | {"parallel": sorted(several, key=lambda found: found["gpus"])}


def profile(record: Record) -> str:
    """The table that `--profile` writes."""
    return _text(record, "looked at", "looked at", "profile", _KERNELS, "ms/step")


def profile_compiled(record: Record) -> str:
    """The same with `--compile`."""
    return _text(record, "looked at", "looked at, compiled", "profile", _KERNELS, "ms/step")


def profile_fp32(record: Record) -> str:
    """The same of fp32 without TF32."""
    return _text(record, "fp32", "fp32 without TF32", "profile", 5, "ms/step")


def memory(record: Record) -> str:
    """The summary that `--memory-snapshot` writes."""
    return _text(record, "looked at", "looked at", "memory", _HOLDERS, "")


def origin(record: Record) -> str:
    """Where the figures of one GPU come from."""
    if "gpu" not in record:
        return NOT_MEASURED
    driver = f" (driver {record['driver']})" if record.get("driver") else ""
    commit = record["commit"][:10]
    return (
        f"One {record['gpu']}{driver}, torch {record['torch']}, triton {record['triton']}, commit"
        f" `{commit}`: `{record['command']} {record['base']}` and the flags of each case,"
        f" on {record['corpus']}."
    )


ITEMS: Mapping[str, Callable[[Record], str]] = {
    "precision": precision,
    "backends": backends,
    "accumulation": accumulation,
    "options": options,
    "saving": saving,
    "kills": kills,
    "profile": profile,
    "profile-compiled": profile_compiled,
    "profile-fp32": profile_fp32,
    "memory": memory,
    "parallel": parallel,
    "origin": origin,
}
"""What a page can ask for, each the text at its marker; "losses" is the plot."""


def _text(record: Record, section: str, case: str, key: str, rows: int, header: str) -> str:
    """A text that a run wrote, cut after so many rows of its last table."""
    text = runs_of(record, section).get(case, {}).get(key)
    if not text:
        return NOT_MEASURED
    lines = text.rstrip("\n").splitlines()
    last = max((i for i, line in enumerate(lines) if header and header in line), default=0)
    kept = lines[: last + 1 + rows]
    if len(kept) < len(lines):
        kept.append("…")
    return "\n".join(("```", *kept, "```"))
