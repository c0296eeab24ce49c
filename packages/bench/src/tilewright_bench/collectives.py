"""Collectives measured: time, algorithm bandwidth and bus bandwidth by size, under torchrun.

The size is that of the whole message: what every rank holds before an all-reduce, a broadcast or a
reduce-scatter and after an all-gather. Algorithm bandwidth is size over time. Bus bandwidth is what
a rank has to send at least, over time, so that it can be compared with a link whatever the number
of ranks W: 2 (W-1)/W sizes for an all-reduce, (W-1)/W for a reduce-scatter or an all-gather, one
for a broadcast. Times are medians over batches of calls, each the slowest rank's.
"""

import csv
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist

from tilewright_bench.curves import Curves, Line, Panel

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = tuple(2**power for power in range(10, 31, 2))
"""Bytes: 1 KiB to 1 GiB."""

BATCHES = 7
BATCH_SECONDS = 0.02
"""About what a batch lasts: more than a clock's noise, little enough for a GiB on CPUs."""


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One measured collective."""

    name: str
    """Which."""
    dtype: str
    """Of its elements."""
    num_bytes: int
    """Size of the message."""
    world_size: int
    """Number of ranks."""
    seconds: float
    """Of one call, on the slowest rank."""
    algorithm_gb_per_s: float
    """Size over time."""
    bus_gb_per_s: float
    """What a rank sends at least, over time."""


def bus_factor(name: str, world_size: int) -> float:
    """Sizes that a rank has to send at least."""
    ring = (world_size - 1) / world_size
    return {"all_reduce": 2 * ring, "reduce_scatter": ring, "all_gather": ring, "broadcast": 1.0}[
        name
    ]


def measure(
    group: dist.ProcessGroup,
    device: torch.device,
    *,
    names: Iterable[str] = COLLECTIVES,
    sizes: Iterable[int] = SIZES,
    dtypes: Iterable[str] = tuple(DTYPES),
    batch_seconds: float = BATCH_SECONDS,
) -> list[Collective]:
    """Measure collectives; all ranks call this alike, and get the same numbers."""
    found = []
    for name in names:
        for dtype in dtypes:
            for size in sizes:
                call, num_bytes = _call_of(name, size, DTYPES[dtype], group, device)
                seconds = _median_seconds(call, group, device, batch_seconds)
                rate = num_bytes / seconds / 1e9
                found.append(
                    Collective(
                        name=name,
                        dtype=dtype,
                        num_bytes=num_bytes,
                        world_size=group.size(),
                        seconds=seconds,
                        algorithm_gb_per_s=rate,
                        bus_gb_per_s=rate * bus_factor(name, group.size()),
                    )
                )
    return found


def table(measured: Sequence[Collective]) -> str:
    """The measurements as text, a line each."""
    lines = [f"{'collective':<16}{'dtype':<10}{'size':>10}{'time':>12}{'algorithm':>12}{'bus':>12}"]
    for m in measured:
        lines.append(
            f"{m.name:<16}{m.dtype:<10}{_size_text(m.num_bytes):>10}{m.seconds * 1e6:>9.1f} µs"
            f"{m.algorithm_gb_per_s:>7.2f} GB/s{m.bus_gb_per_s:>7.2f} GB/s"
        )
    return "\n".join(lines)


def write_csv(measured: Sequence[Collective], path: Path) -> None:
    """Write the measurements, a row each, with the fields' names above."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Collective)])
        writer.writeheader()
        writer.writerows(asdict(m) for m in measured)


def curves(measured: Sequence[Collective]) -> Curves:
    """Bus bandwidth over size: a panel a dtype, a line a collective."""
    names = list(dict.fromkeys(m.name for m in measured))
    panels = []
    for dtype in dict.fromkeys(m.dtype for m in measured):
        lines = [
            Line(
                label=name,
                color=color,
                points=tuple(
                    (m.num_bytes / 2**20, round(m.bus_gb_per_s, 4))
                    for m in measured
                    if (m.name, m.dtype) == (name, dtype)
                ),
            )
            for color, name in enumerate(names)
        ]
        title = f"{dtype}, {measured[0].world_size} ranks"
        panels.append(
            Panel(title=title, x="size, MiB", y="bus GB/s", logarithmic="xy", lines=tuple(lines))
        )
    return Curves(panels=tuple(panels))


def _call_of(
    name: str, size: int, dtype: torch.dtype, group: dist.ProcessGroup, device: torch.device
) -> tuple[Callable[[], object], int]:
    """The call, and the bytes of its message: the size rounded down to equal parts."""
    world_size = group.size()
    part = max(1, size // dtype.itemsize // world_size)
    # Not zeros: links and adders at rest draw less power.
    whole = torch.randn(part * world_size, dtype=torch.float32, device=device).to(dtype)
    mine = whole[part * group.rank() :][:part]
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole, op=dist.ReduceOp.AVG, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(
            mine, whole, op=dist.ReduceOp.AVG, group=group
        ),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, mine, group=group),
        "broadcast": lambda: dist.broadcast(whole, group=group, group_src=0),
    }
    return calls[name], whole.nbytes


def _median_seconds(
    call: Callable[[], object],
    group: dist.ProcessGroup,
    device: torch.device,
    batch_seconds: float,
) -> float:
    _slowest(call, 2, group, device)
    once = _slowest(call, 1, group, device)
    # From a number that all ranks share, so that they make equally many calls.
    count = max(1, min(1000, round(batch_seconds / once)))
    return statistics.median(_slowest(call, count, group, device) for _ in range(BATCHES))


def _slowest(
    call: Callable[[], object], count: int, group: dist.ProcessGroup, device: torch.device
) -> float:
    """Seconds of one of several calls, on the slowest rank; the same on all."""
    dist.barrier(group=group)
    _wait(device)
    began = time.perf_counter()
    for _ in range(count):
        call()
    _wait(device)
    seconds = torch.tensor((time.perf_counter() - began) / count, device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)
    return seconds.item()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _size_text(num_bytes: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes = num_bytes / 1024  # pyrefly: ignore
    return f"{num_bytes:.4g} GiB"
