"""What saved runs of bench-parallel say: tables, bars, and the simulator beside them."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tilewright_bench.saved import BASELINES

FOLDER = BASELINES / "parallel"

TORCH = ("torch", "torch static", "torch 100 MB")
OURS = (
    *("bucketed", "bucketed 100 MB"),
    *("bucketed copy", "bucketed copy 50 MB", "bucketed copy 100 MB"),
)
HALF = ("bucketed bf16", "bucketed copy bf16", "bucketed copy bf16 100 MB")
ZERO = ("zero1", "zero1 copy", "zero1 copy 100 MB")

Quantity = Literal["speed", "time", "exposed", "update", "memory", "arithmetic"]


@dataclass(frozen=True, kw_only=True)
class ParallelBar:
    """What a way of training has to reach.

    Attributes:
        part: Of the run.
        ours: Setups; the fastest of them is held against the limit.
        beside: Setups; the fastest of them is compared with, "alone" for exposed communication.
        quantity: "speed" of the step and of the "update" alone, theirs ÷ ours; "time" of the step,
            ours ÷ theirs; "exposed" share of the step that communication adds; "memory" held, ours
            ÷ theirs; or ÷ "arithmetic".
        limit: The least speed, the greatest share or ratio.
        world_size: Number of ranks; 0 for any.
    """

    part: str
    ours: tuple[str, ...]
    beside: tuple[str, ...]
    quantity: Quantity
    limit: float
    world_size: int = 0

    def value(self, run: Mapping[str, Any]) -> float | None:
        """Of the bar's quantity; None where something was not measured."""
        setups = run["parts"].get(self.part, {}).get("setups", {})
        ours = [setups[name] for name in self.ours if name in setups]
        beside = [setups[name] for name in self.beside if name in setups]
        if not ours or (self.beside and not beside):
            return None
        copies = [name for name in self.ours if "copy" in name]
        if copies and not any(name in setups for name in copies):
            return None  # what is left of them is not the best of ours
        name = self.best(run)
        assert name is not None
        best = setups[name]
        if self.quantity in ("arithmetic", "memory") and not best["held_bytes"]:
            return None  # on CPUs
        if self.quantity == "arithmetic":
            return best["held_bytes"] / arithmetic(run)
        if self.quantity == "memory":
            return best["held_bytes"] / min(setup["held_bytes"] for setup in beside)
        if self.quantity == "update":
            mine = statistics.median(best["update_seconds"])
            return min(statistics.median(s["update_seconds"]) for s in beside) / mine
        theirs = min(map(step_seconds, beside))
        if self.quantity == "time":
            return step_seconds(best) / theirs
        if self.quantity == "exposed":
            return 1 - theirs / step_seconds(best)
        return theirs / step_seconds(best)

    def best(self, run: Mapping[str, Any]) -> str | None:
        """Name of the fastest of ours, by the update where that is the quantity."""
        setups = run["parts"].get(self.part, {}).get("setups", {})
        names = [name for name in self.ours if name in setups]
        if self.quantity == "update":
            return min(
                names, key=lambda n: statistics.median(setups[n]["update_seconds"]), default=None
            )
        return min(names, key=lambda name: step_seconds(setups[name]), default=None)

    def holds(self, value: float) -> bool:
        """Whether a value reaches the limit."""
        return value >= self.limit if self.quantity in ("speed", "update") else value <= self.limit

    def text(self) -> str:
        """The bar in words."""
        what = {
            "speed": f"speed ≥ {self.limit:g}× {_best(self.beside)}",
            "time": f"time ≤ {self.limit:g}× {_best(self.beside)}",
            "exposed": f"exposed communication ≤ {self.limit * 100:g} % of the step",
            "update": f"update ≥ {self.limit:g}× as fast as {_best(self.beside)}",
            "memory": f"memory held ≤ {self.limit:g}× {_best(self.beside)}",
            "arithmetic": f"memory held ≤ {self.limit:g}× the arithmetic",
        }
        return what[self.quantity]


def _bars_of_steps(part: str) -> tuple[ParallelBar, ...]:
    def bar(ours, beside, quantity, limit, world_size=0):
        return ParallelBar(
            part=part,
            ours=ours,
            beside=beside,
            quantity=quantity,
            limit=limit,
            world_size=world_size,
        )

    return (
        bar(OURS, TORCH, "speed", 1.03),
        bar(OURS, ("alone",), "exposed", 0.07),
        bar(HALF, ("torch bf16",), "speed", 1.02),
        bar(HALF, ("alone",), "exposed", 0.05),
        bar(ZERO, OURS, "time", 1.02),
        bar(ZERO, ("torch zero",), "speed", 1.05, 2),
        bar(ZERO, ("torch zero",), "speed", 1.08, 4),
        # Not with copies: their gradients are freed between steps, when this is read, and those
        # of the arithmetic are not.
        bar(("zero1",), (), "arithmetic", 1.03),
        bar(("zero1",), ("torch zero",), "memory", 1.0),
    )


BARS: tuple[ParallelBar, ...] = (
    *_bars_of_steps("eager"),
    *_bars_of_steps("compiled"),
    ParallelBar(
        part="muon",
        ours=("zero1 muon", "zero1 copy muon"),
        beside=("muon",),
        quantity="update",
        limit=3.0,
        world_size=4,
    ),
)


def load(root: Path, device: str) -> list[dict[str, Any]]:
    """The saved runs of a device, by number of ranks; those of transports behind."""
    paths = sorted((root / FOLDER).glob(f"{device}-x*.json"))
    runs = [json.loads(p.read_text(encoding="utf-8")) | {"file": p.name} for p in paths]
    return sorted(runs, key=lambda run: (run["world_size"], is_of_transports(run)))


def is_of_transports(run: Mapping[str, Any]) -> bool:
    """Whether a run is of ways to send alone, not of all parts."""
    return file_name(run).endswith("-transports.json")


def file_name(run: Mapping[str, Any]) -> str:
    """Of a run's file in `FOLDER`."""
    return run.get("file", f"h200-x{run['world_size']}.json")


def title(run: Mapping[str, Any]) -> str:
    """Of a run's columns."""
    later = ", transports" if is_of_transports(run) else ""
    return f"{run['world_size']} GPUs{later}"


def step_seconds(setup: Mapping[str, Any]) -> float:
    """The median of rounds."""
    return statistics.median(setup["seconds"])


def arithmetic(run: Mapping[str, Any]) -> float:
    """Bytes of float32 weights and gradients, and of a W-th of Adam's states."""
    return run["size"]["parameters"] * (8 + 8 / run["world_size"])


def text(run: Mapping[str, Any]) -> str:
    """A run as it is printed: every setup, then every bar."""
    lines = []
    for name, part in run["parts"].items():
        setups = part["setups"]
        lines.append(
            f"{name:<22}{'step ms':>9}{'spread':>8}{'exposed':>9}{'host ms':>9}{'update':>8}"
            f"{'held GiB':>10}{'loss':>9}"
        )
        alone = step_seconds(setups["alone"]) if "alone" in setups else None
        for setup_name, setup in setups.items():
            seconds = step_seconds(setup)
            spread = (max(setup["seconds"]) - min(setup["seconds"])) / seconds
            exposed = "" if alone is None else f"{1 - alone / seconds:.1%}"
            lines.append(
                f"  {setup_name:<20}{seconds * 1e3:>9.2f}{spread:>8.1%}{exposed:>9}"
                f"{statistics.median(setup['host_seconds']) * 1e3:>9.1f}"
                f"{statistics.median(setup['update_seconds'] or [0.0]) * 1e3:>8.2f}"
                f"{setup['held_bytes'] / 2**30:>10.3f}{setup['loss']:>9.4f}"
            )
        for setup_name, line in part["timelines"].items():
            lines.append(
                f"  trace {setup_name:<20} computing {line['computing_ms']:.1f} communicating "
                f"{line['communicating_ms']:.1f} exposed {line['exposed_ms']:.1f} of it tail "
                f"{line['tail_ms']:.1f} ms"
            )
        lines += [f"  {setup}: {error}" for setup, error in part.get("errors", {}).items()]
    for collective in run["links"]:
        lines.append(
            f"{collective['name']:<16}{collective['num_bytes'] / 2**20:>10.3f} MiB"
            f"{collective['seconds'] * 1e6:>10.1f} µs{collective['bus_gb_per_s']:>8.1f} GB/s bus"
        )
    return "\n".join(lines + [_bar_line(bar, run) for bar in _bars_for(run)])


def bars_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """A line a bar, a column a number of GPUs."""
    titles = [title(run) for run in runs]
    lines = [
        "| case | bar | " + " | ".join(f"{name} | met" for name in titles) + " |",
        "| --- | --- |" + " ---: | --- |" * len(titles),
    ]
    for bar in BARS:
        cells = []
        for run in runs:
            asked = bar.world_size in (0, run["world_size"])
            value = bar.value(run) if asked else None
            measured = "not measured" if value is None else _shown(bar, value, run)
            cells.append(measured if asked else "")
            cells.append("" if value is None else "yes" if bar.holds(value) else "**no**")
        case = f"{_case(bar)}, {bar.part}" if bar.part != "muon" else _case(bar)
        lines.append(f"| {case} | {bar.text()} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _bars_for(run: Mapping[str, Any]) -> list[ParallelBar]:
    return [bar for bar in BARS if bar.world_size in (0, run["world_size"])]


def _bar_line(bar: ParallelBar, run: Mapping[str, Any]) -> str:
    value = bar.value(run)
    shown = "not measured" if value is None else _shown(bar, value, run)
    verdict = "" if value is None else "yes" if bar.holds(value) else "NO"
    return f"{bar.part:<9} {_case(bar):<22} {bar.text():<60} {shown:>20} {verdict}"


def _shown(bar: ParallelBar, value: float, run: Mapping[str, Any]) -> str:
    """Three decimals, shares in per cent; and by what the best of ours sends."""
    shown = f"{value * 100:.1f} %" if bar.quantity == "exposed" else f"{value:.3f}×"
    best = bar.best(run)
    return f"{shown} ({'copies' if best is not None and 'copy' in best else 'NCCL'})"


def _case(bar: ParallelBar) -> str:
    names: dict[tuple[str, ...], str] = {
        OURS: "DDP",
        HALF: "DDP, bf16 on the wire",
        ZERO: "ZeRO-1",
        ("zero1",): "ZeRO-1, NCCL",
    }
    return names.get(bar.ours, "ZeRO-1, Muon")


def _best(names: tuple[str, ...]) -> str:
    texts: dict[tuple[str, ...], str] = {
        TORCH: "torch's DDP at its best setting",
        OURS: "our DDP",
        ("torch bf16",): "torch's with bf16_compress_hook",
        ("torch zero",): "torch's DDP + ZeroRedundancyOptimizer",
        ("muon",): "replicated",
    }
    return texts.get(names, ", ".join(names))
