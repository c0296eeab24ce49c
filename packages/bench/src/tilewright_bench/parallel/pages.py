"""What documentation pages show of the saved runs of bench-parallel."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tilewright_bench.parallel import prediction, results
from tilewright_bench.parallel.drawing import Timelines, timelines
from tilewright_bench.parallel.results import step_seconds

ITEMS = ("bars", "steps", "plan", "trace", "timeline", "transports")
"""Words after the marker «parallel:»."""

NAMES = {
    "alone": "no communication",
    "torch": "torch DDP",
    "torch static": "torch DDP, static_graph",
    "torch 100 MB": "torch DDP, 100 MB",
    "torch bf16": "torch DDP, bf16_compress_hook",
    "torch zero": "torch DDP + ZeroRedundancyOptimizer",
    "naive": "naive",
    "per_parameter": "per_parameter",
    "bucketed": "bucketed, NCCL",
    "bucketed 100 MB": "bucketed, NCCL, 100 MB",
    "bucketed copy": "bucketed, copies",
    "bucketed copy 50 MB": "bucketed, copies, 50 MB",
    "bucketed copy 100 MB": "bucketed, copies, 100 MB",
    "bucketed bf16": "bucketed, NCCL, bf16 wire",
    "bucketed copy bf16": "bucketed, copies, bf16 wire",
    "bucketed copy bf16 100 MB": "bucketed, copies, bf16 wire, 100 MB",
    "zero1": "ZeRO-1, NCCL",
    "zero1 copy": "ZeRO-1, copies",
    "zero1 copy 100 MB": "ZeRO-1, copies, 100 MB",
    "fsdp alone": "fully_shard, no communication",
    "fsdp": "fully_shard",
    "muon": "Muon, replicated",
    "zero1 muon": "Muon, ZeRO-1, NCCL",
    "zero1 copy muon": "Muon, ZeRO-1, copies",
}

PARTS = {
    "eager": "eager",
    "compiled": "compiled block by block",
    "ladder": "ladder",
    "muon": "Muon",
}


def text(runs: Sequence[Mapping[str, Any]], item: str) -> str:
    """A table and where its figures are from.

    Args:
        runs: Of one device, the fewest GPUs first.
        item: Of ITEMS, without "timeline".
    """
    if item == "transports":
        runs = [run for run in runs if results.is_of_transports(run)]
    elif item != "bars":
        runs = [run for run in runs if not results.is_of_transports(run)]
    if not runs:
        return ""
    content = {
        "bars": lambda: results.bars_table(runs),
        "steps": lambda: _steps(runs),
        "plan": lambda: prediction.table(runs, NAMES),
        "trace": lambda: _traces(runs),
        "transports": lambda: _transports(runs),
    }[item]()
    return f"{content}\n\n{provenance(runs)}"


def timeline(runs: Sequence[Mapping[str, Any]]) -> Timelines | None:
    """The eager steps of the run on most GPUs, if it was traced."""
    for run in reversed(runs):
        found = run["parts"].get("eager", {}).get("timelines", {})
        steps = [(NAMES.get(name, name), step) for name, step in found.items()]
        if steps:
            return timelines(f"A step on {run['world_size']} GPUs, eager, rank 0", steps)
    return None


def provenance(runs: Sequence[Mapping[str, Any]]) -> str:
    """GPUs, driver, versions and commit of the runs."""
    made: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        machine, commit = run["machine_info"], run["commit_info"]["id"]
        place = (
            f"{machine['gpu']} (driver {machine['driver']}), torch {machine['torch']}, commit "
            f"`{commit[:10]}`"
        )
        made.setdefault(place, []).append(run)
    sentences = [
        f"{' and '.join(str(run['world_size']) for run in found)} {place}: "
        + ", ".join(f"`{(results.FOLDER / results.file_name(run)).as_posix()}`" for run in found)
        for place, found in made.items()
    ]
    return ". ".join(sentences) + "."


def drawing_path(images: Path) -> Path:
    """Of the timelines."""
    return images / "parallel_timeline.svg"


def _steps(runs: Sequence[Mapping[str, Any]]) -> str:
    """A line a setup: ms a step, what communication adds, the update, GiB held, for each run."""
    sizes = [run["world_size"] for run in runs]
    header = " | ".join(f"{n} GPUs, ms | exposed | update, ms | held, GiB" for n in sizes)
    lines = [f"| | {header} |", "| --- |" + " ---: |" * (4 * len(runs))]
    for part, title in PARTS.items():
        setups = {name for run in runs for name in run["parts"].get(part, {}).get("setups", {})}
        if not setups:
            continue
        lines.append(f"| **{title}** |" + " |" * (4 * len(runs)))
        order = list(NAMES)
        for name in sorted(setups, key=order.index):
            cells = [cell for run in runs for cell in _cells(run, part, name)]
            lines.append(f"| {NAMES.get(name, name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(run: Mapping[str, Any], part: str, name: str) -> list[str]:
    setups = run["parts"].get(part, {}).get("setups", {})
    if name not in setups:
        return [""] * 4
    setup = setups[name]
    # The ladder's steps are eager, and timed in the same process.
    alone = setups.get("alone") or run["parts"].get("eager", {}).get("setups", {}).get("alone")
    exposed = ""
    if alone is not None and part != "muon" and name not in ("alone", "fsdp", "fsdp alone"):
        exposed = f"{(1 - step_seconds(alone) / step_seconds(setup)) * 100:.1f} %"
    updates = setup["update_seconds"]
    update = f"{statistics.median(updates) * 1e3:.1f}" if updates else ""
    return [
        f"{step_seconds(setup) * 1e3:.1f}",
        exposed,
        update,
        f"{setup['held_bytes'] / 2**30:.2f}",
    ]


def _transports(runs: Sequence[Mapping[str, Any]]) -> str:
    """A line a setup: of eager and of compiled steps ms, what communication adds, and how long
    backward takes the host and the device when it begins with both at rest.
    """
    header = " | ".join(
        f"{part}, ms | exposed | backward: host | device" for part in ("eager", "compiled")
    )
    lines = [f"| {{}} | {header} |", "| --- |" + " ---: |" * 8]
    lines[0] = lines[0].format(", ".join(results.title(run) for run in runs))
    for run in runs:
        parts = [run["parts"][part]["setups"] for part in ("eager", "compiled")]
        for name in sorted(parts[0], key=[*NAMES].index):
            cells = []
            for part, setups in zip(("eager", "compiled"), parts, strict=True):
                rest = setups[name]["from_rest"]["backward"]
                cells += _cells(run, part, name)[:2]
                cells += [f"{rest[side] * 1e3:.1f}" for side in ("host", "device")]
            lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _traces(runs: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| ms | GPUs | computing | communicating | under no computation | of it the tail |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for part in ("eager", "compiled"):
        for run in runs:
            for name, step in run["parts"].get(part, {}).get("timelines", {}).items():
                figures = (step[f"{key}_ms"] for key in ("computing", "communicating", "exposed"))
                lines.append(
                    f"| {NAMES.get(name, name)}, {part} | {run['world_size']} | "
                    + " | ".join(f"{figure:.1f}" for figure in figures)
                    + f" | {step['tail_ms']:.1f} |"
                )
    return "\n".join(lines)
