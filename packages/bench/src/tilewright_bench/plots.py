"""Plots as SVG: shares of the ceiling as bars, the roofline, curves (`tilewright_bench.curves`).

A plot is data first: a value that can be compared and hashed. The file that is drawn from it holds
its digest and one of the drawing itself, so that whether the file is up to date and as it was drawn
can be told without drawing it again, by any version of matplotlib and without one.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tilewright_bench.curves import Curves, draw_curves
from tilewright_bench.parallel.drawing import Timelines, draw_timelines
from tilewright_bench.rows import OURS, Row, groups_of, lead
from tilewright_bench.tables import DIRECTIONS, NAMES, case_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("tilewright.mplstyle")

DRAWING = 4
"""The version of the code that draws: one more with each change of what it draws."""

FILLS: dict[str, Literal["full", "none", "left"]] = {
    "fwd": "full",
    "bwd": "none",
    "fwd+bwd": "left",
}
"""How much of a marker is filled, by direction."""

_DIGESTS = re.compile(r"data ([0-9a-f]{64}) drawing ([0-9a-f]{64})")
_NO_DIGEST = "0" * 64
_ORDER = (OURS, "torch", "compile", "liger")


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Shares of the ceiling: a panel a direction, a cluster of bars a shape, a bar a provider.

    Attributes:
        operator: whose.
        ceiling: what shares refer to: a copy, a matrix product, or one or the other.
        providers: in the order of their bars.
        cases: in the order of the clusters.
        shares: (direction, case, provider) and share, in per cent.
        leads: (direction, case) and how many times faster ours is than the best peer.
    """

    operator: str
    ceiling: str
    providers: tuple[str, ...]
    cases: tuple[str, ...]
    shares: tuple[tuple[str, str, str, float], ...]
    leads: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Where operators lie under the ceilings of a device.

    Attributes:
        device: its name.
        bandwidths: ceilings of traffic: (name, GB/s).
        rates: ceilings of arithmetic: (name, TFLOP/s).
        points: (family, direction, FLOP per byte, TFLOP/s) of ours, one a case.
    """

    device: str
    bandwidths: tuple[tuple[str, float], ...]
    rates: tuple[tuple[str, float], ...]
    points: tuple[tuple[str, str, float, float], ...]


Plot = Bars | Roofline | Curves | Timelines


def bars(rows: Sequence[Row]) -> Bars:
    """The bars of one operator."""
    groups = groups_of(rows)
    there = {row.provider: None for row in rows}
    providers = [name for name in _ORDER if name in there]
    ceilings = {"matrix product" if row.ceiling == "matmul" else "copy" for row in rows}
    leads = [(group[0].direction, group[0].case, lead(group)) for group in groups]
    return Bars(
        operator=rows[0].operator,
        ceiling=" or ".join(sorted(ceilings)),
        providers=(*providers, *(name for name in there if name not in _ORDER)),
        cases=tuple({row.case: None for row in rows}),
        shares=tuple((r.direction, r.case, r.provider, round(100 * r.share, 1)) for r in rows),
        leads=tuple((d, c, round(ratio, 2)) for d, c, ratio in leads if ratio is not None),
    )


def digest(plot: Plot) -> str:
    """Of a plot's data and of the style and the code that draw them."""
    data = json.dumps([DRAWING, type(plot).__name__, asdict(plot)], sort_keys=True)
    return _sha256(data + STYLE.read_text(encoding="utf-8"))


def digest_in(path: Path) -> str | None:
    """The digest that a drawn file holds.

    None if there is no such file or it holds none, "" if the file was changed after it was drawn.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    found = _DIGESTS.search(text)
    if not found:
        return None
    drawing = _sha256(text.replace(found[2], _NO_DIGEST))
    return found[1] if drawing == found[2] else ""


def draw(plot: Plot, path: Path) -> None:
    """Draw a plot as SVG; the same data give the same bytes.

    Raises:
        ModuleNotFoundError: there is no matplotlib.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(STYLE):
        figure = Figure()
        if isinstance(plot, Bars):
            _draw_bars(plot, figure)
        elif isinstance(plot, Curves):
            draw_curves(plot, figure)
        elif isinstance(plot, Timelines):
            draw_timelines(plot, figure)
        else:
            _draw_roofline(plot, figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        digests = f"data {digest(plot)} drawing {_NO_DIGEST}"
        about = {"Date": None, "Creator": "tilewright_bench", "Description": digests}
        figure.savefig(path, format="svg", metadata=about)
    # matplotlib ends some lines with a space.
    lines = path.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line.rstrip() for line in lines) + "\n"
    path.write_text(text.replace(_NO_DIGEST, _sha256(text)), encoding="utf-8")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _draw_bars(plot: Bars, figure: "Figure") -> None:
    from matplotlib.patches import Patch

    directions = tuple({direction: None for direction, *_ in plot.shares})
    panels = figure.subplots(len(directions), sharex=True, sharey=True, squeeze=False)[:, 0]
    for direction, axes in zip(directions, panels, strict=True):
        _draw_panel(plot, direction, axes)
    width = 14 if len(plot.cases) < 6 else 10
    labels = [_wrapped(case_text(case), width) for case in plot.cases]
    panels[-1].set_xticks(range(len(labels)), labels)
    panels[-1].set_xlim(-0.6, len(labels) - 0.4)
    handles = [
        Patch(color=_color(plot, name), label=NAMES.get(name, name)) for name in plot.providers
    ]
    # Four beside each other leave room for the sentence on the right.
    rows = -(-len(handles) // 4)
    figure.set_size_inches(7.2, 0.5 + 0.2 * rows + 1.5 * len(directions))
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)))
    if plot.leads:
        handle = Patch(color="none", label="1.00×: speed beside the best peer")
        text = figure.legend(handles=[handle], loc="upper right", handlelength=0).get_texts()[0]
        text.set(color=_color(plot, OURS), weight="bold")


def _draw_panel(plot: Bars, direction: str, axes: "Axes") -> None:
    shares = {(case, name): share for d, case, name, share in plot.shares if d == direction}
    leads = {case: ratio for d, case, ratio in plot.leads if d == direction}
    top = max(100, *(share for *_, share in plot.shares))
    width = 0.8 / len(plot.providers)
    for i, name in enumerate(plot.providers):
        offset = (i - (len(plot.providers) - 1) / 2) * width
        there = [x for x, case in enumerate(plot.cases) if (case, name) in shares]
        heights = [shares[plot.cases[x], name] for x in there]
        axes.bar([x + offset for x in there], heights, 0.92 * width, color=_color(plot, name))
    for x, case in enumerate(plot.cases):
        if case in leads:
            at = (x - 0.4 + width / 2, 1.06 * top)
            style = {"ha": "center", "weight": "bold", "color": _color(plot, OURS)}
            axes.annotate(f"{leads[case]:.2f}×", at, **style)
    axes.axhline(100, color="0.5", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_ylim(0, 1.22 * top)
    axes.set_ylabel(f"% of {plot.ceiling}".replace(" or ", "\nor "))
    axes.set_title(DIRECTIONS[direction])
    axes.grid(axis="y")
    axes.tick_params(axis="x", length=0)


def _color(plot: Bars, provider: str) -> str:
    """The same for a provider in every plot, as far as the plots have the same others."""
    others = [name for name in plot.providers if name not in _ORDER]
    return f"C{[*_ORDER, *others].index(provider)}"


def _draw_roofline(plot: Roofline, figure: "Figure") -> None:
    from matplotlib.lines import Line2D

    figure.set_size_inches(7.2, 4.8)
    axes = figure.subplots()
    left, right = 0.1, 10_000.0
    top = max(rate for _, rate in plot.rates)
    for _, gb_per_s in plot.bandwidths:
        slope = gb_per_s / 1e3  # TFLOP/s at one FLOP per byte
        end = min(top / slope, right)
        axes.plot([left, end], [left * slope, end * slope], color="0.5", linewidth=1)
    slopes = [gb_per_s / 1e3 for _, gb_per_s in plot.bandwidths]
    for _, rate in plot.rates:
        axes.plot([rate / max(slopes), right], [rate, rate], color="0.5", linewidth=1)
    # Where no operator can lie: above the slanted lines, and beside the axes.
    for names, gb_per_s in _near_one_another(plot.bandwidths, 2.0):
        at = left * 1.3, 1.35 * left * 1.3 * gb_per_s / 1e3
        _along_the_slope(axes, f"{names} GB/s", *at)
    for names, rate in _near_one_another(plot.rates, 1.6):
        style = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        axes.annotate(names, (1, rate), (5, 0), **style, va="center", fontsize=7)
    families = tuple({family: None for family, *_ in plot.points})
    # Colours repeat after eight families, with another marker.
    styles: dict[str, dict[str, Any]] = {
        family: {
            "color": f"C{i}",
            "marker": "osD^vP*X"[(i + i // 8) % 8],
            "markersize": 5,
            "markerfacecoloralt": "none",
        }
        for i, family in enumerate(families)
    }
    for family, direction, x, y in plot.points:
        axes.plot(x, y, **styles[family], linestyle="", fillstyle=FILLS[direction])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_xlabel("least operations ÷ least traffic, FLOP per byte")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(plot.device)
    axes.grid(which="major")
    handles = [Line2D([], [], linestyle="", label=family, **styles[family]) for family in families]
    plain: dict[str, Any] = {"color": "0.5", "marker": "o", "markerfacecoloralt": "none"}
    handles += [
        Line2D([], [], linestyle="", **plain, fillstyle=FILLS[direction], label=name)
        for direction, name in DIRECTIONS.items()
        if any(direction == there for _, there, *_ in plot.points)
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))


def _along_the_slope(axes: "Axes", text: str, x: float, y: float) -> None:
    """Text along y ∝ x, a line of one slope wherever it lies between logarithmic axes."""
    degrees = math.degrees(math.atan2(y, x))
    style: dict[str, Any] = {"rotation_mode": "anchor", "transform_rotates_text": True}
    axes.text(x, y, text, rotation=degrees, fontsize=7, **style)


def _near_one_another(
    ceilings: Sequence[tuple[str, float]], factor: float
) -> list[tuple[str, float]]:
    """Labels and the highest values; one label for those that lie within a factor of it."""
    clusters: list[list[tuple[str, float]]] = []
    for name, value in sorted(ceilings, key=lambda item: -item[1]):
        if clusters and value * factor > clusters[-1][0][1]:
            clusters[-1].append((name, value))
        else:
            clusters.append([(name, value)])
    return [
        (", ".join(f"{name} {value:.0f}" for name, value in cluster), cluster[0][1])
        for cluster in clusters
    ]


def _wrapped(text: str, width: int) -> str:
    """Broken before a × or the dtype where lines grow longer than width."""
    lines = [""]
    for part in re.split(r"(?=[× ])", text):
        if len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.strip() for line in lines)
