"""metrics.jsonl: one line a step, written as soon as the step is known.

A run that is resumed drops the lines behind its checkpoint before it computes them again, so the
file holds every step once.
"""

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tilewright_train.errors import InputError, writing

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of one step. Step 0 is the model before training."""

    step: int
    """Optimizer updates that are done."""
    loss: float | None = None
    """Mean training loss of the step's batch over all processes, before its update, in nats; None
    where it is not finite."""
    val_loss: float | None = None
    """Mean validation loss after the update, where it was measured, in nats."""
    lr: float | None = None
    """Learning rate of the update."""
    grad_norm: float | None = None
    """Global norm of the gradients before clipping; None where it is not finite."""
    skipped_steps: int = 0
    """Updates left out so far: of losses or gradients that were not finite, or spikes."""
    loss_scale: float | None = None
    """With fp16: what the loss was multiplied by."""
    tokens: int = 0
    """Tokens trained on so far."""
    tokens_per_second: float | None = None
    """Throughput of the step, all processes together; behind a checkpoint it counts the wait."""
    data_seconds: float | None = None
    """Seconds that this process waited for the step's batch. On a GPU, which computes meanwhile,
    they need not lengthen the step."""
    mfu: float | None = None
    """Model FLOP/s as a share of the devices' peak, where that is known."""
    peak_memory_bytes: int = 0
    """Highest memory so far: of the GPU's allocator, or of the process."""
    time: float = 0.0
    """Seconds of this run until now, pauses between a stop and a resume left out."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the objective tells beside its loss; in the file each stands under its own name,
    which has a slash in it; those of validation begin with «val_»."""


class MetricsFile:
    """Appends records; a reader finds each line whole."""

    def __init__(self, path: Path) -> None:
        self._place = path.parent
        self._remedy = f"make room, then go on with --resume {path.parent}"
        with writing(self._place, self._remedy):
            self._stream: IO[str] = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one line and hand it to the operating system, so that a killed run keeps it."""
        line = _line(record)
        with writing(self._place, self._remedy):
            self._stream.write(line)
            self._stream.flush()

    def flush(self) -> None:
        """Have the disk hold all lines: a checkpoint must not be ahead of them."""
        with writing(self._place, self._remedy):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Flush and let go of the file."""
        self.flush()
        with writing(self._place, self._remedy):  # a line that did not fit is tried once more
            self._stream.close()


def read_metrics(path: Path) -> list[Record]:
    """All records; a last line that a kill cut short is left out.

    Raises:
        InputError: Another line is no record. The message names it.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            record = _record(json.loads(line))
            if not isinstance(record.step, int):
                raise TypeError
            records.append(record)
        except (ValueError, TypeError, RecursionError):
            raise InputError(
                f"{path}:{number} is not a record of a step: mend the line, or start a new run"
            ) from None
    return records


def truncate_metrics(path: Path, step: int) -> None:
    """Drop what lies behind `step`; the file is replaced in one move.

    The record of `step` itself stays, but without a checkpoint (step 0) all of them go: the run
    starts again with the measurement before its first step.
    """
    kept = [record for record in read_metrics(path) if step > 0 and record.step <= step]
    beside = path.with_suffix(".partial")
    remedy = "make room and try again"
    with writing(path.parent, remedy), beside.open("w", encoding="utf-8") as stream:
        stream.writelines(map(_line, kept))
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)


def _line(record: Record) -> str:
    values = dataclasses.asdict(record)
    values.update(values.pop("metrics"))
    return json.dumps(values, allow_nan=False) + "\n"


def _record(values: Any) -> Record:
    """The record of a line; a key that is no field is a metric if it has a slash in it."""
    if not isinstance(values, dict):
        raise TypeError
    fields = {f.name for f in dataclasses.fields(Record)} - {"metrics"}
    known = {name: value for name, value in values.items() if name in fields}
    others = {name: value for name, value in values.items() if name not in fields}
    if not all("/" in name and type(value) in (int, float) for name, value in others.items()):
        raise TypeError
    return Record(**known, metrics=others)


def steady_tokens_per_second(records: Iterable[Record]) -> float | None:
    """Median throughput without the first ten steps (of a short run: the first half).

    The first steps compile kernels and fill caches.
    """
    rates = [r.tokens_per_second for r in records if r.tokens_per_second is not None]
    steady = rates[min(10, len(rates) // 2) :]
    return statistics.median(steady) if steady else None


def data_share(records: Iterable[Record]) -> float | None:
    """Share of the time of later steps that went into waiting for batches; see above for which.

    Time between the steps, in which losses were measured, does not count.
    """
    steps = [r for r in records if r.data_seconds is not None and r.tokens_per_second]
    steady = steps[min(10, len(steps) // 2) :]
    if not steady:
        return None
    a_step = steady[0].tokens / steady[0].step
    seconds = sum(a_step / (r.tokens_per_second or math.inf) for r in steady)
    return sum(r.data_seconds or 0.0 for r in steady) / seconds
