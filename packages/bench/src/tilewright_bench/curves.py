"""Plots of one thing over another: how Newton–Schulz converges, and losses of training runs.

As all plots they are data first (`tilewright_bench.plots`): panels of lines, drawn alike.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAINING = Path("packages/bench/baselines/training")

NEWTON_SCHULZ = ("quintic", "polar_express")
"""Coefficients that are drawn."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line, perhaps with a band around it.

    Attributes:
        label: in the legend; lines of one label have one entry.
        color: index into the style's colours.
        dashes: whether the line is broken.
        points: (x, y).
        band: (x, low, high).
    """

    label: str
    color: int
    dashes: bool = False
    points: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Axes with lines."""

    title: str
    x: str
    y: str
    logarithmic: str
    """Which axes are: "", "x", "y" or "xy"."""
    lines: tuple[Line, ...]


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Panels side by side under one legend."""

    panels: tuple[Panel, ...]


def convergence() -> Curves:
    """What the iteration makes of singular values, from its polynomials alone."""
    from tilewright_optim.newton_schulz import polynomial

    inputs = [10 ** (-4 + 4 * i / 200) for i in range(201)]
    mapped, stepwise = [], []
    for color, name in enumerate(NEWTON_SCHULZ):
        ends = [polynomial(s, name, 5) for s in inputs]
        points = tuple((_digits(s), _digits(y)) for s, y in zip(inputs, ends, strict=True))
        mapped.append(Line(label=name, color=color, points=points))
        for start in (0.1, 0.01, 0.001):
            points = tuple((k, _digits(polynomial(start, name, k))) for k in range(9))
            stepwise.append(Line(label=name, color=color, points=points))
    return Curves(
        panels=(
            Panel(
                title="after 5 steps",
                x="singular value ÷ Frobenius norm",
                y="singular value",
                logarithmic="x",
                lines=tuple(mapped),
            ),
            Panel(
                title="from 0.1, 0.01 and 0.001",
                x="steps",
                y="singular value",
                logarithmic="y",
                lines=tuple(stepwise),
            ),
        )
    )


def load_comparison(root: Path, name: str) -> dict[str, Any] | None:
    """A saved comparison of optimizers by training runs; None if there is none of that name."""
    path = root / TRAINING / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def losses(comparison: Mapping[str, Any]) -> Curves:
    """Validation losses over steps, in the mean and the range of the seeds; and over the rates.

    Args:
        comparison: "optimizers" by name, each with "lr", "seeds" (validation losses by step, one
            mapping a seed) and "grid" (the last loss by learning rate).
    """
    runs: list[Line] = []
    rates: list[Line] = []
    for color, (name, found) in enumerate(comparison["optimizers"].items()):
        label = f"{name}, lr {found['lr']:g}"
        steps = [step for step in found["seeds"][0] if int(step) > 0]
        columns = [[seed[step] for seed in found["seeds"]] for step in steps]
        xs = [int(step) for step in steps]
        means = [_digits(statistics.fmean(column)) for column in columns]
        band = tuple((x, min(c), max(c)) for x, c in zip(xs, columns, strict=True))
        points = tuple(zip(xs, means, strict=True))
        runs.append(Line(label=label, color=color, points=points, band=band))
        grid = sorted((float(rate), loss) for rate, loss in found["grid"].items())
        rates.append(Line(label=label, color=color, points=tuple(grid)))
    return Curves(
        panels=(
            Panel(
                title=f"mean and range of {len(found['seeds'])} seeds",
                x="steps",
                y="validation loss",
                logarithmic="",
                lines=tuple(runs),
            ),
            Panel(
                title="after the last step",
                x="highest learning rate",
                y="validation loss",
                logarithmic="x",
                lines=tuple(rates),
            ),
        )
    )


def steps_to_reach(losses: Mapping[str, float], target: float) -> int | None:
    """The first step whose validation loss is at most the target."""
    steps = sorted(int(step) for step, loss in losses.items() if loss <= target)
    return steps[0] if steps else None


def losses_table(comparison: Mapping[str, Any]) -> str:
    """Last losses by optimizer and seed, and when the first optimizer's last mean was reached."""
    rows = ["| optimizer | lr | last validation loss by seed | mean | steps to the first's |"]
    rows.append("| --- | ---: | --- | ---: | ---: |")
    target = None
    for name, found in comparison["optimizers"].items():
        mean = {
            step: statistics.fmean(s[step] for s in found["seeds"]) for step in found["seeds"][0]
        }
        last = max(mean, key=int)
        target = mean[last] if target is None else target
        reached = steps_to_reach(mean, target)
        each = ", ".join(f"{seed[last]:.3f}" for seed in found["seeds"])
        steps = "never" if reached is None else f"{reached} of {last}"
        rows.append(f"| {name} | {found['lr']:g} | {each} | {mean[last]:.3f} | {steps} |")
    return "\n".join(rows)


def draw_curves(plot: Curves, figure: "Figure") -> None:
    """Draw into an empty figure."""
    figure.set_size_inches(3.6 * len(plot.panels), 3.2)
    handles: dict[str, Any] = {}
    for panel, axes in zip(plot.panels, _axes(figure, len(plot.panels)), strict=True):
        for line in panel.lines:
            xs, ys = zip(*line.points, strict=True)
            style = {"color": f"C{line.color}", "linestyle": "--" if line.dashes else "-"}
            (handle,) = axes.plot(xs, ys, **style)
            handles.setdefault(line.label, handle)
            if line.band:
                bx, low, high = zip(*line.band, strict=True)
                axes.fill_between(bx, low, high, color=style["color"], alpha=0.25, linewidth=0)
        for axis in panel.logarithmic:
            getattr(axes, f"set_{axis}scale")("log")
        axes.set_title(panel.title)
        axes.set_xlabel(panel.x)
        axes.set_ylabel(panel.y)
        axes.grid(which="major")
    figure.legend(
        handles=list(handles.values()), labels=list(handles), loc="outside lower center", ncols=4
    )


def _axes(figure: "Figure", count: int) -> Sequence[Any]:
    return figure.subplots(1, count, squeeze=False)[0]


def _digits(value: float) -> float:
    """Four of them: plots are the same for numbers that differ in their last bits."""
    return float(f"{value:.4g}")
