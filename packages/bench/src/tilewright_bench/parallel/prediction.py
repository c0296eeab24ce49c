"""The simulator beside what was measured: from one GPU, the links, and a step on two GPUs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tilewright_bench.parallel.results import step_seconds
from tilewright_dist import Cluster, Layer, Link, Prediction, Workload, plan
from tilewright_dist.planning import Scheme

Run = Mapping[str, Any]

Ways = tuple[tuple[str, Scheme], ...]

SENDING: tuple[tuple[str, Ways], ...] = (
    ("alone", (("bucketed", "ddp"), ("zero1", "zero1"))),
    ("alone", (("bucketed copy", "ddp"), ("zero1 copy", "zero1"))),
    ("fsdp alone", (("fsdp", "zero3"),)),
)
"""Setups that send alike, and the one that computes as they do without sending: the first one's
step on the fewest GPUs says how much communication disturbs computation."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One step, predicted and measured."""

    part: str
    """Of the run."""
    setup: str
    """Way of training."""
    scheme: Literal["ddp", "zero1", "zero3"]
    """What the simulator takes it for."""
    world_size: int
    """Number of GPUs."""
    interference: float
    """Seconds lost for each of hidden communication."""
    predicted: float
    """Seconds of a step."""
    measured: float
    """The same; of the step that gave `interference` no prediction."""
    is_fitted: bool
    """Whether this is that step."""


def compare(runs: Sequence[Run]) -> Iterator[Compared]:
    """All steps of runs on different numbers of GPUs, the fewest first."""
    for part in ("eager", "compiled"):
        for alone, ways in SENDING:
            fitted, _ = ways[0]
            there = [run for run in runs if _has(run, part, alone, fitted)]
            if not there:
                continue
            interference = _interference(there[0], part, alone, ways[0])
            for run in there:
                for setup, scheme in ways:
                    measured = _setups(run, part).get(setup)
                    if measured is None:
                        continue
                    yield Compared(
                        part=part,
                        setup=setup,
                        scheme=scheme,
                        world_size=run["world_size"],
                        interference=interference,
                        predicted=_plan(run, part, alone, scheme, interference).step,
                        measured=step_seconds(measured),
                        is_fitted=run is there[0] and setup == fitted,
                    )


def table(runs: Sequence[Run], names: Mapping[str, str]) -> str:
    """Predicted and measured steps, in Markdown."""
    lines = [
        "| | GPUs | interference | predicted, ms | measured, ms | off by |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in compare(runs):
        off = "fitted" if row.is_fitted else f"{row.predicted / row.measured - 1:+.1%}"
        lines.append(
            f"| {names.get(row.setup, row.setup)}, {row.part} | {row.world_size} "
            f"| {row.interference:.2f} | {row.predicted * 1e3:.1f} | {row.measured * 1e3:.1f} "
            f"| {off.replace('%', ' %')} |"
        )
    return "\n".join(lines)


def workload(run: Run, part: str, alone: str = "alone") -> Workload:
    """The decoder as one GPU of the run trains it by itself.

    Args:
        run: With the phases of the part's step without communication.
        part: Of the run.
        alone: The setup whose step it is; phases are scaled to it.
    """
    phases = run["parts"][part]["phases"]
    scale = step_seconds(_setups(run, part)[alone]) / sum(phases.values())
    size = run["size"]
    block = 4 * size["hidden"] ** 2 + 3 * size["hidden"] * size["intermediate"] + 2 * size["hidden"]
    outside = size["parameters"] - size["layers"] * block
    return Workload(
        layers=[Layer(parameters=outside)] + [Layer(parameters=block)] * size["layers"],
        **{name: seconds * scale for name, seconds in phases.items()},
    )


def cluster(run: Run, interference: float) -> Cluster:
    """The links of a run: latency of its smallest, bandwidth of its largest all-reduce."""
    links = [link for link in run["links"] if link["name"] == "all_reduce"]
    small = min(links, key=lambda link: link["num_bytes"])
    large = max(links, key=lambda link: link["num_bytes"])
    # Of an all-reduce, which the simulator makes of two halves.
    link = Link(bandwidth=large["bus_gb_per_s"] * 1e9, latency=small["seconds"] / 2)
    return Cluster(gpus_per_host=8, inside=link, between=link, interference=interference)


def _plan(run: Run, part: str, alone: str, scheme: Scheme, interference: float) -> Prediction:
    work = workload(run, part, alone)
    if scheme == "zero3":
        work = replace(work, gather_bytes=2)  # bfloat16, as `setups.fsdp` has it
    return plan(work, cluster(run, interference), run["world_size"], scheme)


def _interference(run: Run, part: str, alone: str, way: tuple[str, Scheme]) -> float:
    """What makes the prediction of a step its measurement."""
    setup, scheme = way
    quiet = _plan(run, part, alone, scheme, 0.0)
    hidden = quiet.communication - quiet.exposed
    measured = step_seconds(_setups(run, part)[setup])
    return max(0.0, (measured - quiet.step) / hidden) if hidden > 0 else 0.0


def _setups(run: Run, part: str) -> Mapping[str, Any]:
    """Those of a part; with the eager ones those of the ladder, which are eager too."""
    measured = run["parts"].get(part, {}).get("setups", {})
    if part != "eager":
        return measured
    return run["parts"].get("ladder", {}).get("setups", {}) | measured


def _has(run: Run, part: str, *setups: str) -> bool:
    phases = run["parts"].get(part, {}).get("phases")
    return bool(phases and run["links"]) and all(name in _setups(run, part) for name in setups)
