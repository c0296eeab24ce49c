"""A memory snapshot of some steps, for pytorch.org/memory_viz, and our own summary of it.

The allocator's history is recorded with Python's stacks. The summary replays it to the moment at
which most was allocated, and sums what was alive then by the line of ours that asked for it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tilewright_train.errors import InputError

_MOST_EVENTS = 1_000_000
_ROWS = 20
BEFORE = "held before the recording: weights, optimizer states"
NO_FRAME = "backward, outside Python"


@dataclass(frozen=True)
class Held:
    """Memory alive at the highest moment, of one line."""

    where: str
    """«tilewright_model.attention:_attend», or what stands for a line."""
    size: int
    """Bytes."""
    blocks: int
    """Allocations."""


class MemoryRecorder:
    """Records from now on, until it is closed.

    Args:
        folder: Takes `snapshot.pickle` and `summary.txt`.
        steps: The first, and the one behind the last; for the text.

    Raises:
        InputError: There is no GPU.
    """

    def __init__(self, folder: Path, steps: tuple[int, int]) -> None:
        if not torch.cuda.is_available():
            raise InputError("--memory-snapshot records a GPU's allocator: leave it out on a CPU")
        self._folder = folder
        self._steps = steps
        self._before = torch.cuda.memory_allocated()
        torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS, stacks="python")

    def close(self) -> list[str]:
        """Write snapshot and summary; the lines that a person is told."""
        torch.cuda.synchronize()
        device = torch.cuda.current_device()
        events = torch.cuda.memory._snapshot()["device_traces"][device]
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / "snapshot.pickle"
        torch.cuda.memory._dump_snapshot(str(file))
        torch.cuda.memory._record_memory_history(enabled=None)
        text = summary_lines(held_at_the_peak(events, self._before), self._steps)
        (self._folder / "summary.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
        return [f"memory       {file}, for pytorch.org/memory_viz", *(f"  {line}" for line in text)]


def held_at_the_peak(events: Iterable[Mapping[str, Any]], before: int) -> list[Held]:
    """What was alive when most was, the largest first.

    Args:
        events: Of torch.cuda.memory._snapshot()["device_traces"][device], in order.
        before: Bytes that were allocated when the recording began.
    """
    alive: dict[int, tuple[int, str]] = {}
    now, peak, at_peak = before, before, {}
    freed_before = 0
    events = list(events)
    sizes: list[int] = []
    for event in events:  # first the moment, then a copy of what was alive: copies are large
        address, size = event["addr"], event["size"]
        if event["action"] == "alloc":
            alive[address] = (size, "")
            now += size
        elif event["action"] == "free_completed":
            now -= size
            alive.pop(address, None)
        sizes.append(now)
        peak = max(peak, now)
    alive.clear()
    for event, now in zip(events, sizes, strict=True):
        address, size = event["addr"], event["size"]
        if event["action"] == "alloc":
            alive[address] = (size, _line_of_ours(event.get("frames", ())))
        elif event["action"] == "free_completed" and alive.pop(address, None) is None:
            freed_before += size
        if now == peak:
            at_peak = dict(alive)
            break
    rows: dict[str, list[int]] = {}
    if before - freed_before > 0:
        rows[BEFORE] = [before - freed_before]
    for size, where in at_peak.values():
        rows.setdefault(where, []).append(size)
    held = [Held(where, sum(blocks), len(blocks)) for where, blocks in rows.items()]
    return sorted(held, key=lambda row: -row.size)


def summary_lines(held: list[Held], steps: tuple[int, int]) -> list[str]:
    """The table for a person."""
    total = sum(row.size for row in held) or 1
    lines = [
        f"steps {steps[0]} to {steps[1] - 1}: {total / 2**30:.2f} GiB at the highest",
        f"{'what asked for it':<64}{'GiB':>8}{'share':>8}{'blocks':>8}",
    ]
    for row in held[:_ROWS]:
        lines.append(
            f"{row.where:<64}{row.size / 2**30:>8.3f}{row.size / total:>8.1%}{row.blocks:>8}"
        )
    if rest := held[_ROWS:]:
        size = sum(row.size for row in rest)
        lines.append(f"{f'{len(rest)} others':<64}{size / 2**30:>8.3f}{size / total:>8.1%}")
    return lines


def _line_of_ours(frames: Iterable[Mapping[str, Any]]) -> str:
    """The innermost function of a tilewright package, else the innermost of all."""
    first = None
    for frame in frames:
        path = Path(frame["filename"])
        package = next((part for part in path.parts if part.startswith("tilewright_")), None)
        label = f"{path.stem}:{frame['name']}"
        if package is not None:
            return f"{package}.{label}"
        if first is None and path.suffix == ".py":
            first = label
    return first or NO_FRAME
