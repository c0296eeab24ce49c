"""Losses of `train-pretrain` by precision and by backend, as curves."""

import statistics
from collections.abc import Sequence

from tilewright_bench.curves import Curves, Line, Panel
from tilewright_bench.training_tables import Record, runs_of

PRECISIONS = ("bf16", "bf16-weights", "fp16", "fp32 with TF32")
"""In the order of their colours; the last one is what the others are held against."""

_MEAN_OF = 10  # steps


def losses(record: Record) -> Curves | None:
    """Losses by precision, what they differ by, and those of both backends."""
    precisions = {
        name: run for name, run in runs_of(record, "precision").items() if "losses" in run
    }
    if not precisions:
        return None
    smooth = {name: _smoothed(run["losses"]) for name, run in precisions.items()}
    colors = {name: i for i, name in enumerate(PRECISIONS)}
    panels = [
        Panel(
            title=f"training loss, mean of {_MEAN_OF} steps",
            x="step",
            y="nats",
            logarithmic="",
            lines=tuple(
                Line(label=name, color=colors[name], points=points)
                for name, points in smooth.items()
            ),
        )
    ]
    if exact := smooth.get(PRECISIONS[-1]):
        known = dict(exact)
        panels.append(
            Panel(
                title=f"above {PRECISIONS[-1]}",
                x="step",
                y="nats",
                logarithmic="",
                lines=tuple(
                    Line(
                        label=name,
                        color=colors[name],
                        points=tuple((x, _digits(y - known[x])) for x, y in points if x in known),
                    )
                    for name, points in smooth.items()
                    if name != PRECISIONS[-1]
                ),
            )
        )
    backends = {k: v for k, v in runs_of(record, "backends").items() if "losses" in v}
    if backends:
        panels.append(
            Panel(
                title="by backend, bf16",
                x="step",
                y="nats",
                logarithmic="",
                lines=tuple(
                    Line(
                        label=f"backend {name}",
                        color=len(colors) + i,
                        dashes=i > 0,
                        points=_smoothed(run["losses"]),
                    )
                    for i, (name, run) in enumerate(backends.items())
                ),
            )
        )
    return Curves(panels=tuple(panels))


def _smoothed(values: Sequence[float | None]) -> tuple[tuple[float, float], ...]:
    """Means of so many steps, each at their middle."""
    points = []
    for i in range(0, len(values), _MEAN_OF):
        part = [v for v in values[i : i + _MEAN_OF] if v is not None]
        if part:
            points.append(
                (i + (len(values[i : i + _MEAN_OF]) + 1) / 2, _digits(statistics.fmean(part)))
            )
    return tuple(points)


def _digits(value: float) -> float:
    """Four of them: the plot is the same for numbers that differ in their last bits."""
    return float(f"{value:.4g}")
