"""The ceilings of a device, measured: bandwidth of copies by size, speed of products by dtype.

A roofline (Williams, Waterman & Patterson 2009, doi:10.1145/1498765.1498785) draws what a device
can do at most over the operations that a program makes of each byte. Here the lines are not the
datasheet's but what torch reaches on the device at hand.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.utils import get_commit_info

from tilewright_bench.ceilings import copies, input_sets, products
from tilewright_bench.environment import describe
from tilewright_bench.plots import Roofline
from tilewright_bench.rows import OURS, rows_of
from tilewright_bench.saved import BASELINES, SavedRun, SavedRunError
from tilewright_bench.stopwatch import Rotation, time_interleaved
from tilewright_bench.timer import Call

KEYS = {"machine_info", "copy_gb_per_s", "l2_copy_gb_per_s", "matmul_tflop_per_s"}
"""What a file of ceilings must hold to be drawn."""

FOLDER = BASELINES / "roofline"

COPY_BYTES = tuple(2**power for power in range(20, 33, 2))
"""Traffic of the copies, read and written: 1 MiB to 4 GiB."""

CACHED_BYTES = 2**24
"""Traffic of the copy whose source and target stay in the L2 cache."""

MATMUL_SIZE = 8192
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
SECONDS = 0.2


def measure(device: torch.device, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Ceilings of a device.

    Returns:
        copy_gb_per_s and matmul_tflop_per_s by size and dtype, l2_copy_gb_per_s, and where and from
        which commit they were measured, as saved runs say it.
    """

    def best(calls: list[Call]) -> float:
        return min(
            time_interleaved([Rotation(calls)], device, seconds=SECONDS, graph=graph)[0].median
            for graph in (True, False)
        )

    copied = {}
    for size in COPY_BYTES:
        copied[str(size)] = size / best(copies(size, input_sets(size, device), device)) / 1e9
        say(f"copy of {size / 2**20:5.0f} MiB  {copied[str(size)]:7.0f} GB/s")
    cached = CACHED_BYTES / best(copies(CACHED_BYTES, 1, device)) / 1e9
    say(f"copy within L2     {cached:7.0f} GB/s")
    multiplied = {}
    for name, dtype in DTYPES.items():
        former = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        try:
            seconds = best([products(MATMUL_SIZE, dtype, device)])
        finally:
            torch.backends.cuda.matmul.allow_tf32 = former
        multiplied[name] = 2 * MATMUL_SIZE**3 / seconds / 1e12
        say(f"product in {name}    {multiplied[name]:7.1f} TFLOP/s")
    return {
        "machine_info": describe(),
        "commit_info": get_commit_info(),
        "copy_gb_per_s": copied,
        "l2_copy_gb_per_s": cached,
        "matmul_size": MATMUL_SIZE,
        "matmul_tflop_per_s": multiplied,
    }


def save(ceilings: dict[str, Any], path: Path) -> None:
    """Write ceilings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ceilings, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    """Read ceilings.

    Raises:
        SavedRunError: none there, or a file of another kind.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SavedRunError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not content.keys() >= KEYS:
        raise SavedRunError(f"{path} holds no ceilings that bench-roofline measured")
    return content


def roofline(ceilings: dict[str, Any], runs: Iterable[SavedRun]) -> Roofline:
    """Our operators under the ceilings of their device, each in the family that its run names."""
    copied = ceilings["copy_gb_per_s"]
    largest = copied[max(copied, key=int)]
    return Roofline(
        device=ceilings["machine_info"]["gpu"] or "cpu",
        bandwidths=(
            ("L2", round(ceilings["l2_copy_gb_per_s"])),
            ("memory", round(largest)),
        ),
        rates=tuple(
            (name, round(rate, 1)) for name, rate in ceilings["matmul_tflop_per_s"].items()
        ),
        points=tuple(
            (
                family_of(run),
                row.direction,
                round(row.intensity, 3),
                float(f"{row.tflop_per_s:.3g}"),
            )
            for run in runs
            for row in rows_of(run.content["benchmarks"])
            if row.provider == OURS and row.intensity > 0
        ),
    )


def family_of(run: SavedRun) -> str:
    """What the name of a baseline says after its device: norms in h200-norms.json."""
    return run.path.stem.partition("-")[2] or run.path.stem
