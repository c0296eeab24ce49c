"""How evenly experts are used in training: plots and a table of recorded loads.

A record is what benchmarks/load_in_training.py saves: of each run the losses, the largest load of a
layer (mean over layers) as training goes, and the last loads of all layers; loads as multiples of
the mean, 1 for each where all are alike. A load is what an implementation computes for an expert.
What a limit on it would drop, and what a common size for all experts would pad, follows from it.
"""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from tilewright_bench.curves import Curves, Line, Panel

CAPACITY = 1.25
"""Rows of an expert at most, as a multiple of the mean: Switch's usual capacity factor."""

LABELS = {"nothing": "left alone", "loss": "load-balance loss", "bias": "bias of the choice"}


def dropped(record: Mapping[str, Any], run: str, capacity: float) -> float:
    """Share of the assignments beyond the capacity, over the last loads of all layers."""
    loads = list(chain.from_iterable(record["runs"][run]["last_loads"]))
    return sum(max(0.0, load - capacity) for load in loads) / len(loads)


def loads(record: Mapping[str, Any]) -> Curves:
    """Largest load over steps; last loads by rank; what each capacity drops."""
    largest, ranked, lost = [], [], []
    for color, (run, found) in enumerate(record["runs"].items()):
        named = {"label": LABELS.get(run, run), "color": color}
        steps = [(i + 0.5) * record["mean_of"] for i in range(len(found["largest"]))]
        largest.append(Line(points=tuple(zip(steps, found["largest"], strict=True)), **named))
        by_rank = zip(*(sorted(layer, reverse=True) for layer in found["last_loads"]), strict=True)
        means = [round(sum(column) / len(column), 4) for column in by_rank]
        ranked.append(Line(points=tuple(enumerate(means, start=1)), **named))
        top = max(map(max, found["last_loads"]))
        capacities = [1 + i * (top - 1) / 100 for i in range(101)]
        shares = [(round(c, 4), round(100 * dropped(record, run, c), 4)) for c in capacities]
        lost.append(Line(points=tuple(shares), **named))
    return Curves(
        panels=(
            Panel(
                title="largest load of a layer",
                x="steps",
                y="load ÷ mean",
                logarithmic="",
                lines=tuple(largest),
            ),
            Panel(
                title="last loads, mean of layers",
                x="expert, busiest first",
                y="load ÷ mean",
                logarithmic="",
                lines=tuple(ranked),
            ),
            Panel(
                title="assignments over capacity",
                x="capacity ÷ mean load",
                y="dropped, %",
                logarithmic="",
                lines=tuple(lost),
            ),
        )
    )


def loads_table(record: Mapping[str, Any]) -> str:
    """Last loss and loads of each run, and what they would cost with a capacity or with padding."""
    rows = [
        f"| balance | loss | largest load | smallest | dropped at capacity {CAPACITY:g} "
        "| rows padded to drop none |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run, found in record["runs"].items():
        layers = found["last_loads"]
        # Of a layer all experts are padded to its largest.
        padding = sum(max(layer) - 1 for layer in layers) / len(layers)
        rows.append(
            f"| {LABELS.get(run, run)} | {found['losses'][-1]:.3f} | {max(map(max, layers)):.2f} "
            f"| {min(map(min, layers)):.2f} | {dropped(record, run, CAPACITY):.1%} "
            f"| + {padding:.0%} |".replace("%", " %")
        )
    return "\n".join(rows)
