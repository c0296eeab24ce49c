"""Runs as one HTML page that needs nothing: tables and SVG plots in the file itself.

Each run is a colour. Losses are drawn smoothed over the raw curve; several runs are compared by
steps and by tokens. What was left out, and samples, stand below.
"""

import html
import io
import json
import math
import statistics
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from tilewright_train.errors import InputError
from tilewright_train.layers import CONFIG_FILE
from tilewright_train.metrics import Record, read_metrics, steady_tokens_per_second
from tilewright_train.progress import format_seconds
from tilewright_train.run_directory import RunDirectory

# Okabe and Ito's colours, which differ for colour-blind readers too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
_POINTS = 2000  # of a curve; longer ones are thinned
_SAMPLE = 1200  # characters
_MANY_TIMES = 30  # between values, from which on an axis is logarithmic
_FROM_ZERO = (
    "learning rate", "tokens/s", "share of the peak (MFU)", "peak memory, GiB", "updates left out",
)  # fmt: skip

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ddd; --faint: #777; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --paper: #16181b; --line: #3a3d42; --faint: #999; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .5rem; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem; }
figure { margin: 0; background: #fff; border-radius: 6px; padding: .3rem; }
figure svg { width: 100%; height: auto; display: block; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--line);
  padding-left: .8rem; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%;
  margin-right: .4em; }
.faint { color: var(--faint); }
"""


@dataclass(frozen=True)
class Run:
    """One run's files, read."""

    name: str
    """Of its folder."""
    colour: str
    """In all plots."""
    records: Sequence[Record]
    """Of metrics.jsonl."""
    options: Mapping[str, Any]
    """Of config.toml, by name."""
    facts: Mapping[str, Any]
    """Of run.json."""
    samples: Sequence[tuple[str, str]]
    """Name and text of each."""
    left_out: Sequence[Mapping[str, Any]]
    """Steps whose update was not made."""


def read_run(folder: Path, colour: str) -> Run:
    """A run, finished or not.

    Raises:
        InputError: It is no run, or nothing has been measured yet.
    """
    place = RunDirectory(folder)
    if not place.config.is_file():
        raise InputError(f"{folder} is no run: it holds no {CONFIG_FILE}")
    records = read_metrics(place.metrics)
    if not records:
        raise InputError(f"{place.metrics} holds no step yet: let the run make one first")
    try:
        tables = tomllib.loads(place.config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{place.config} is not TOML: {error}; restore it") from None
    options = {
        k: v for table in tables.values() if isinstance(table, dict) for k, v in table.items()
    }
    samples = sorted((folder / "samples").glob("step-*.txt"))
    left_out = sorted(place.left_out.glob("step-*/step.json"))
    return Run(
        name=folder.resolve().name,
        colour=colour,
        records=records,
        options=options,
        facts=_json(place.facts) or {},
        samples=[(file.stem, file.read_text(encoding="utf-8")) for file in samples],
        left_out=[facts for file in left_out if (facts := _json(file))],
    )


def _number(value: Any) -> float | None:
    """A number of run.json, which anybody may have written."""
    return value if isinstance(value, int | float) else None


def write_page(folders: Sequence[Path], path: Path) -> None:
    """Write the page of some runs.

    Args:
        folders: Of the runs; the order is that of the colours.
        path: The file to write; its folder is made.

    Raises:
        InputError: One of them is no run, or is given twice.
        OSError: The page cannot be written.
    """
    resolved = [folder.resolve() for folder in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise InputError(f"{folder} is given twice: name every run once")
    runs = [
        read_run(folder, _COLOURS[index % len(_COLOURS)]) for index, folder in enumerate(folders)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(_page(runs)), encoding="utf-8")


def _page(runs: Sequence[Run]) -> Iterator[str]:
    title = ", ".join(run.name for run in runs)
    yield "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
    yield "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
    yield f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
    yield f"<h1>{'Runs' if len(runs) > 1 else 'Run'} {html.escape(title)}</h1>\n"
    yield from _table(_summaries(runs))
    if different := _differences(runs):
        yield "<h2>Options that differ</h2>\n"
        yield from _table(different)
    yield "<h2>Curves</h2>\n<div class='plots'>\n"
    for number, plot in enumerate(_plots(runs)):
        yield f"<figure>{_svg(plot, number)}</figure>\n"
    yield "</div>\n"
    yield from _left_out(runs)
    yield from _samples(runs)
    yield "</body>\n</html>\n"


def _summaries(runs: Sequence[Run]) -> list[list[str]]:
    """What each run is and came to, a run a row."""
    rows = [
        [
            "run", "parameters", "device", "precision", "steps", "tokens", "validation loss",
            "perplexity", "tokens/s", "of peak", "memory", "time", "left out",
        ]
    ]  # fmt: skip
    for run in runs:
        last = run.records[-1]
        val = _last(run, lambda record: record.val_loss)
        rate = steady_tokens_per_second(run.records)
        shares = [record.mfu for record in run.records if record.mfu is not None]
        processes = run.facts.get("processes", 1)
        rows.append(
            [
                f"<span class='dot' style='background:{run.colour}'></span>"
                + html.escape(run.name),
                _known(_number(run.facts.get("parameters")), lambda n: f"{n / 1e6:.3g} M"),
                html.escape(f"{processes} x {run.facts.get('device', '')}"),
                html.escape(str(run.options.get("precision", ""))),
                f"{last.step} of {run.options.get('steps', '?')}",
                f"{last.tokens:,}",
                _known(val, lambda loss: f"{loss:.4f}"),
                _known(val, lambda loss: f"{math.exp(min(loss, 700)):.4g}"),
                _known(rate, lambda value: f"{value:,.0f}"),
                _known(statistics.median(shares) if shares else None, lambda s: f"{s:.1%}"),
                f"{max(record.peak_memory_bytes for record in run.records) / 2**30:.2f} GiB",
                format_seconds(last.time),
                str(last.skipped_steps),
            ]
        )
    return rows


def _differences(runs: Sequence[Run]) -> list[list[str]]:
    """Options with more than one value among the runs; none for a single run."""
    names = sorted({name for run in runs for name in run.options})
    differing = [name for name in names if len({str(run.options.get(name)) for run in runs}) > 1]
    if not differing:
        return []
    header = ["option", *(html.escape(run.name) for run in runs)]
    return [
        header,
        *([name, *(html.escape(str(run.options.get(name, "–"))) for run in runs)]
          for name in differing),
    ]  # fmt: skip


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "<div class='wide'><table>\n"
    for number, row in enumerate(rows):
        cell = "th" if number == 0 else "td"
        yield "<tr>" + "".join(f"<{cell}>{text}</{cell}>" for text in row) + "</tr>\n"
    yield "</table></div>\n"


def _plots(runs: Sequence[Run]) -> Iterator[Figure]:
    yield _losses(runs, "step", lambda record: record.step)
    if len({run.options.get("batch_size") for run in runs}) > 1:
        yield _losses(runs, "tokens", lambda record: record.tokens)
    curves: list[tuple[str, Callable[[Record], float | None]]] = [
        ("validation loss, nats per token", lambda record: record.val_loss),
        ("learning rate", lambda record: record.lr),
        ("gradient norm before clipping", lambda record: record.grad_norm),
        ("tokens/s", lambda record: record.tokens_per_second),
        ("share of the peak (MFU)", lambda record: record.mfu),
        ("peak memory, GiB", lambda record: record.peak_memory_bytes / 2**30),
        ("loss scale", lambda record: record.loss_scale),
        ("updates left out", lambda record: record.skipped_steps),
    ]
    for label, value in curves:
        lines = [(run, _curve(run, lambda record: record.step, value)) for run in runs]
        values = [y for _, (_, ys) in lines for y in ys]
        if any(values):
            figure, axes = _figure(label, "step")
            for run, (xs, ys) in lines:
                marker = "o" if len(xs) < 40 and label.startswith("validation") else ""
                axes.plot(xs, ys, color=run.colour, linewidth=1.2, marker=marker, markersize=3)
            if label in _FROM_ZERO:
                axes.set_ylim(bottom=0)
            elif min(values) > 0 and max(values) > _MANY_TIMES * min(values):
                axes.set_yscale("log")
            yield figure


def _losses(runs: Sequence[Run], name: str, place: Callable[[Record], float]) -> Figure:
    """Training losses: smoothed, over what was measured."""
    figure, axes = _figure("training loss, nats per token", name)
    for run in runs:
        xs, ys = _curve(run, place, lambda record: record.loss)
        axes.plot(xs, ys, color=run.colour, linewidth=0.6, alpha=0.3)
        axes.plot(xs, smoothed(ys), color=run.colour, linewidth=1.5, label=run.name)
    if len(runs) > 1:
        axes.legend(frameon=False, fontsize=8)
    return figure


def smoothed(values: Sequence[float], share: float = 0.02) -> list[float]:
    """An exponential average, unbiased at its start.

    Args:
        values: In order.
        share: Of their number over which is averaged.
    """
    keep = 1 - 1 / max(1.0, share * len(values))
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + 1 - keep
        result.append(average / weight)
    return result


def _curve(
    run: Run, place: Callable[[Record], float], value: Callable[[Record], float | None]
) -> tuple[list[float], list[float]]:
    """Places and values where there are any, thinned."""
    points = [(place(record), v) for record in run.records if (v := value(record)) is not None]
    stride = max(1, len(points) // _POINTS)
    kept = points[::stride] + (points[-1:] if (len(points) - 1) % stride else [])
    return [x for x, _ in kept], [y for _, y in kept]


def _figure(label: str, x: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set_title(label, fontsize=9, loc="left")
    axes.set_xlabel(x, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure, number: int) -> str:
    """The drawing alone; text stays text, and the same runs give the same bytes."""
    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"plot{number}"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _left_out(runs: Sequence[Run]) -> Iterator[str]:
    rows = [
        [
            html.escape(run.name),
            str(facts.get("step")),
            html.escape(str(facts.get("why"))),
            html.escape(f"{facts.get('loss')}"),
            html.escape(f"{facts.get('norm')}"),
            html.escape(str(facts.get("guilty") or "")),
        ]
        for run in runs
        for facts in run.left_out
    ]
    if rows:
        yield "<h2>Updates that were left out</h2>\n"
        yield from _table([["run", "step", "why", "loss", "norm", "first not finite"], *rows])


def _samples(runs: Sequence[Run]) -> Iterator[str]:
    drawn = [(run, *run.samples[-1]) for run in runs if run.samples]
    if drawn:
        yield "<h2>Samples</h2>\n"
    for run, name, text in drawn:
        cut = text if len(text) <= _SAMPLE else text[:_SAMPLE] + " …"
        yield f"<p class='faint'>{html.escape(run.name)}, {name}</p>\n"
        yield f"<pre>{html.escape(cut)}</pre>\n"


def _last(run: Run, value: Callable[[Record], float | None]) -> float | None:
    values = [v for record in run.records if (v := value(record)) is not None]
    return values[-1] if values else None


def _known(value: Any, spell: Callable[[Any], str]) -> str:
    return "–" if value is None else spell(value)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
