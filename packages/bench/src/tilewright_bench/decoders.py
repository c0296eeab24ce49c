"""Small decoders trained alike, to compare what a configuration chooses: plots and tables.

Records are what benchmarks/decoders_in_training.py saves: held-out losses by position for each
position encoding ("positions"), losses by number of key/value heads ("heads"), losses and loads of
experts with and without a balance loss ("experts").
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tilewright_bench.curves import TRAINING, Curves, Line, Panel

DEVICE = "cpu"
"""They fit a CPU core, whatever device the other pages are about."""

KINDS = ("positions", "heads", "experts")


def load(root: Path, kind: str) -> dict[str, Any] | None:
    """The committed record of a comparison, or None."""
    path = root / TRAINING / f"{DEVICE}-{kind}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def comparison(record: Mapping[str, Any]) -> Curves:
    """What to draw of a record."""
    kind = next(kind for kind in KINDS if kind in record)
    found, mean_of = record[kind], record["mean_of"]
    if kind == "positions":
        return _positions(found, record["bin"])
    if kind == "heads":
        named = {f"{count} key/value heads": losses[:-1] for count, losses in found.items()}
        return Curves(panels=(_panel("", "step", "loss, nats a byte", named, mean_of),))
    panels = (
        ("losses", "loss, nats a byte"),
        ("busiest ÷ mean", "load of the busiest expert ÷ mean"),
    )
    return Curves(
        panels=tuple(
            _panel("", "step", y, {name: of[key] for name, of in found.items()}, mean_of)
            for key, y in panels
        )
    )


def _positions(found: Mapping[str, Sequence[float]], spacing: float) -> Curves:
    plain = {name: losses for name, losses in found.items() if "," not in name}
    stretched = {name: losses for name, losses in found.items() if name.startswith("rope")}
    return Curves(
        panels=tuple(
            _panel(title, "position", "held-out loss, nats a byte", values, spacing)
            for title, values in (
                ("trained and read alike", plain),
                ("rotary, changed after training", stretched),
            )
        )
    )


def _panel(
    title: str, x: str, y: str, values: Mapping[str, Sequence[float]], spacing: float
) -> Panel:
    """A line for each entry, points so far apart; broken where a name says what was changed."""
    lines = tuple(
        Line(
            label=name,
            color=color,
            dashes="," in name,
            points=tuple(((i + 0.5) * spacing, y) for i, y in enumerate(losses)),
        )
        for color, (name, losses) in enumerate(values.items())
    )
    return Panel(title=title, x=x, y=y, logarithmic="", lines=lines)


def comparison_table(record: Mapping[str, Any]) -> str:
    """The last figures of a record."""
    kind = next(kind for kind in KINDS if kind in record)
    found = record[kind]
    if kind == "positions":
        rows = _positions_rows(found, record["bin"])
    elif kind == "heads":
        rows = [
            "| key/value heads | last training loss | held-out loss |",
            "| ---: | ---: | ---: |",
        ]
        rows += [f"| {n} | {losses[-2]:.3f} | {losses[-1]:.3f} |" for n, losses in found.items()]
    else:
        rows = [
            "| | last loss | busiest expert ÷ mean, last | over the second half, at most |",
            "| --- | ---: | ---: | ---: |",
        ]
        for name, of in found.items():
            loads = of["busiest ÷ mean"]
            late = max(loads[len(loads) // 2 :])
            rows.append(f"| {name} | {of['losses'][-1]:.3f} | {loads[-1]:.2f} | {late:.2f} |")
    return "\n".join(rows)


def _positions_rows(found: Mapping[str, Sequence[float]], spacing: int) -> list[str]:
    spans = (0, 128), (128, 256), (256, 512)
    rows = ["| positions | " + " | ".join(f"{a}–{b}" for a, b in spans) + " |"]
    rows.append("| --- |" + " ---: |" * len(spans))
    for name, losses in found.items():
        parts = [losses[a // spacing : b // spacing] for a, b in spans]
        means = " | ".join(f"{sum(part) / len(part):.2f}" for part in parts)
        rows.append(f"| {name} | {means} |")
    return rows


def origin(record: Mapping[str, Any]) -> str:
    """What it was trained on, with what."""
    kind = next(kind for kind in KINDS if kind in record)
    sequences, length = record["batch"]
    return (
        f"{record['steps']} steps of {sequences} sequences of {length} bytes, one seed; "
        f"{record['corpus']}; {record['device']}, torch {record['torch']}: "
        f"`packages/bench/benchmarks/decoders_in_training.py {kind}`."
    )
