"""Timelines of steps: where communication lies under computation, a row a way of training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LANES = {"forward": "C1", "backward": "C2", "update": "C3", "communication": "C0"}
"""What is drawn, and in which colour."""

Span = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Timelines:
    """Steps under one another, on one scale.

    Attributes:
        title: of the whole.
        rows: name of the step, and by lane (of LANES) its intervals in ms.
    """

    title: str
    rows: tuple[tuple[str, tuple[tuple[str, tuple[Span, ...]], ...]], ...]


def timelines(title: str, steps: Sequence[tuple[str, Mapping[str, Any]]]) -> Timelines:
    """Of steps that `trace.timeline` has read, by name.

    What is fetched under the next forward reaches beyond the step; it is drawn as it lies.
    """
    rows = []
    for name, step in steps:
        lanes = []
        for lane in LANES:
            spans = tuple((round(a, 2), round(b, 2)) for a, b in step["lanes"][lane])
            lanes.append((lane, _joined(spans)))
        rows.append((name, tuple(lanes)))
    return Timelines(title=title, rows=tuple(rows))


def draw_timelines(plot: Timelines, figure: "Figure") -> None:
    """Draw into an empty figure: computation above, communication below, for each row."""
    from matplotlib.patches import Patch

    figure.set_size_inches(7.2, 0.9 + 0.5 * len(plot.rows))
    axes = figure.subplots()
    for place, (_, lanes) in enumerate(reversed(plot.rows)):
        for lane, spans in lanes:
            below = lane == "communication"
            at = (place - 0.36, 0.3) if below else (place - 0.04, 0.4)
            bars = [(begin, end - begin) for begin, end in spans]
            axes.broken_barh(bars, at, facecolors=LANES[lane], linewidth=0)
    axes.set_yticks(range(len(plot.rows)), [name for name, _ in reversed(plot.rows)])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("ms")
    axes.set_xlim(left=0)
    axes.set_title(plot.title)
    axes.grid(axis="x")
    handles = [Patch(color=color, label=lane) for lane, color in LANES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _joined(spans: Sequence[Span], gap: float = 0.1) -> tuple[Span, ...]:
    """Without gaps that nobody could see: 0.1 ms is a pixel."""
    found: list[Span] = []
    for begin, end in spans:
        if found and begin - found[-1][1] < gap:
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return tuple(found)
