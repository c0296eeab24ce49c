"""Tables and plots of documentation pages, made from the committed baselines of a device.

`update` writes what the markers of README and docs ask for (`tilewright_bench.pages`), `stale` says
what it would change. Kinds of markers, with operators as in `Case.operator`:

    table: rms_norm …               every measurement of these operators
    plot: rms_norm …                a bar chart for each: docs/images/<operator>.svg
    summary: rms_norm/16384x4096/fwd …      one line each, a column a provider
    bars: norms …                   what a family must reach (`tilewright_bench.bars`), met or not
    roofline                        docs/images/roofline.svg
    convergence                     docs/images/newton_schulz_convergence.svg, of singular values
    losses: optimizers              docs/images/<name>_losses.svg, of the training runs compared in
                                    baselines/training/<device>-<name>.json
    loads: experts                  docs/images/<name>_loads.svg, of the loads recorded there
    decoders: positions heads       docs/images/decoders_<name>.svg and a table, of the runs in
                                    baselines/training/cpu-<name>.json
    rates: inference                docs/images/<name>_rates.svg and a table, of the rates there
    training: losses precision …    docs/images/training_losses.svg and what train-pretrain reached
                                    (`tilewright_bench.training`), from the folder above,
                                    <device>-training.json and <device>-x<GPUs>-training.json
    parallel: bars steps …          steps on several GPUs (`tilewright_bench.parallel.pages`), from
                                    baselines/parallel/<device>-x<GPUs>.json; transports: ways
                                    to send alone, from <device>-x<GPUs>-transports.json

An operator that has a benchmark but no baseline yet is said to be not measured yet.
"""

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright_bench import (
    curves,
    decoders,
    expert_loads,
    inference,
    plots,
    roofline,
    training,
    training_curves,
)
from tilewright_bench.bars import BARS
from tilewright_bench.discovery import operators_in
from tilewright_bench.judge import judge
from tilewright_bench.pages import Marker, filled
from tilewright_bench.parallel import pages as parallel_pages
from tilewright_bench.parallel import results as parallel
from tilewright_bench.plots import Plot
from tilewright_bench.rows import Row, groups_of, rows_of
from tilewright_bench.saved import BASELINES, SavedRun, SavedRunError, baselines_of
from tilewright_bench.tables import (
    EVENTS,
    bars_summary,
    bars_table,
    full_table,
    summary_table,
)

NOT_MEASURED = "Not measured yet."

_RECORDS = ("losses", "loads", "rates", "parallel", "decoders", "training")
"""Kinds of markers whose words are no operators."""

BENCHMARKS = Path("packages/bench/benchmarks")
IMAGES = Path("docs/images")


@dataclass(frozen=True)
class Source:
    """One operator's measurements and the baseline that holds them."""

    rows: list[Row]
    run: SavedRun


class Figures:
    """All that was measured on one device, by operator.

    Args:
        root: the workspace.
        device: what names of its baselines begin with.

    Raises:
        SavedRunError: no baseline of that name, or an operator in two of them.
    """

    def __init__(self, root: Path, device: str) -> None:
        self._root, self._device = root, device
        self._sources: dict[str, Source] = {}
        self._runs = runs = baselines_of(device, root / BASELINES)
        if not runs:
            raise SavedRunError(f"{root / BASELINES} holds no baseline of {device!r}")
        for run in runs:
            for operator, rows in _by_operator(rows_of(run.content["benchmarks"])).items():
                if operator in self._sources:
                    raise SavedRunError(
                        f"{operator} is in {self._sources[operator].run.path} and in {run.path}; "
                        f"a figure has one source: take it out of one of them"
                    )
                self._sources[operator] = Source(rows, run)
        self._known = operators_in(root / BENCHMARKS) | self._sources.keys()
        self.plots: dict[Path, Plot] = {}
        """What to draw, by path; filled by `content`."""

    def content(self, marker: Marker) -> str:
        """What belongs at a marker.

        Raises:
            PageError: an unknown kind, an operator without a benchmark, or a case that nobody
                measured.
        """
        kinds: dict[str, Callable[[Marker], str]] = {
            "table": self._tables,
            "plot": self._plots,
            "summary": self._summary,
            "bars": self._bars,
            "roofline": self._roofline,
            "convergence": self._convergence,
            "losses": self._losses,
            "loads": self._loads,
            "rates": self._rates,
            "parallel": self._parallel,
            "decoders": self._decoders,
            "training": self._training,
        }
        if marker.kind not in kinds:
            raise marker.error(f"{marker.kind!r} is none of {', '.join(kinds)}")
        if not marker.items and marker.kind not in ("roofline", "convergence"):
            what = "family, as in bars: norms"
            if marker.kind != "bars":
                what = f"operator, as in {marker.kind}: rms_norm"
            raise marker.error(f"name at least one {what}")
        for item in marker.items if marker.kind not in _RECORDS else ():
            self._check_name(marker, item.split("/")[0])
        return kinds[marker.kind](marker)

    def _check_name(self, marker: Marker, name: str) -> None:
        known, lack = self._known, "no benchmark measures an operator"
        if marker.kind == "bars":
            known, lack = BARS.keys(), "there are no bars for a family"
        if name in known:
            return
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else ", ".join(sorted(known))
        raise marker.error(f"{lack} {name!r} ({hint})")

    def _each(self, marker: Marker, content: Callable[[Source], str]) -> str:
        """Content of each operator of a marker, under its name where there are several."""
        parts = []
        for operator in marker.items:
            source = self._sources.get(operator)
            text = NOT_MEASURED if source is None else content(source)
            parts.append(text if len(marker.items) == 1 else f"`{operator}`:\n\n{text}")
        return "\n\n".join(parts)

    def _tables(self, marker: Marker) -> str:
        return self._each(
            marker, lambda source: f"{full_table(source.rows)}\n\n{self._provenance([source])}"
        )

    def _plots(self, marker: Marker) -> str:
        def content(source: Source) -> str:
            operator = source.rows[0].operator
            bars = plots.bars(source.rows)
            path = IMAGES / f"{operator}.svg"
            self.plots[path] = bars
            title = f"{operator} on {self._gpu(source)}: share of the speed of a {bars.ceiling}"
            return _image(f"{title}, by provider", path, marker.page)

        return self._each(marker, content)

    def _summary(self, marker: Marker) -> str:
        chosen, sources, missing = [], [], []
        for item in marker.items:
            operator, case, direction = [*item.split("/"), "", ""][:3]
            source = self._sources.get(operator)
            if source is None:
                missing.append(f"`{operator}`")
                continue
            groups = [
                group
                for group in groups_of(source.rows)
                if (case in ("", group[0].case) or group[0].case.startswith(f"{case}-"))
                and direction in ("", group[0].direction)
            ]
            if not groups:
                there = ", ".join(f"{g[0].case}/{g[0].direction}" for g in groups_of(source.rows))
                raise marker.error(f"{source.run.path.name} has no {item!r}, but {there}")
            chosen += groups
            sources.append(source)
        if not chosen:
            return NOT_MEASURED
        text = f"{summary_table(chosen)}\n\n{self._provenance(sources)}"
        return text + (f" {', '.join(missing)}: {NOT_MEASURED.lower()}" if missing else "")

    def _bars(self, marker: Marker) -> str:
        parts = []
        for family in marker.items:
            named = {operator for bar in BARS[family] for operator in bar.operators}
            sources = [self._sources[name] for name in sorted(named & self._sources.keys())]
            verdicts = judge(BARS[family], [row for source in sources for row in source.rows])
            text = f"{bars_table(verdicts)}\n\n{bars_summary(verdicts)}"
            parts.append(f"{text} {self._provenance(sources)}".rstrip())
        return "\n\n".join(parts)

    def _roofline(self, marker: Marker) -> str:
        saved = self._root / roofline.FOLDER / f"{self._device}.json"
        if not saved.exists():
            return NOT_MEASURED
        drawn = roofline.roofline(roofline.load(saved), self._runs)
        path = IMAGES / "roofline.svg"
        self.plots[path] = drawn
        return _image(
            f"Where operators lie under the ceilings of {drawn.device}", path, marker.page
        )

    def _convergence(self, marker: Marker) -> str:
        path = IMAGES / "newton_schulz_convergence.svg"
        self.plots[path] = curves.convergence()
        return _image("What Newton–Schulz steps make of singular values", path, marker.page)

    def _losses(self, marker: Marker) -> str:
        return self._trained(
            marker, "Validation losses by optimizer", curves.losses, curves.losses_table
        )

    def _loads(self, marker: Marker) -> str:
        return self._trained(
            marker, "Loads of experts in training", expert_loads.loads, expert_loads.loads_table
        )

    def _rates(self, marker: Marker) -> str:
        return self._trained(
            marker, "Memory of a cache", inference.cache_memory, inference.rates_table
        )

    def _trained(
        self,
        marker: Marker,
        title: str,
        plot: Callable[[Mapping[str, Any]], curves.Curves],
        table: Callable[[Mapping[str, Any]], str],
    ) -> str:
        """Image, table and origin of each record of training runs that a marker names."""
        parts = []
        for name in marker.items:
            record = curves.load_comparison(self._root, f"{self._device}-{name}")
            if record is None:
                parts.append(NOT_MEASURED)
                continue
            path = IMAGES / f"{name}_{marker.kind}.svg"
            self.plots[path] = plot(record)
            image = _image(title, path, marker.page)
            parts.append(f"{image}\n\n{table(record)}\n\n{_trained_with(record)}")
        return "\n\n".join(parts)

    def _decoders(self, marker: Marker) -> str:
        parts = []
        for kind in marker.items:
            if kind not in decoders.KINDS:
                raise marker.error(f"{kind!r} is none of {', '.join(decoders.KINDS)}")
            record = decoders.load(self._root, kind)
            if record is None:
                parts.append(NOT_MEASURED)
                continue
            path = IMAGES / f"decoders_{kind}.svg"
            self.plots[path] = decoders.comparison(record)
            image = _image(f"Decoders trained alike: {kind}", path, marker.page)
            table = decoders.comparison_table(record)
            parts.append(f"{image}\n\n{table}\n\n{decoders.origin(record)}")
        return "\n\n".join(parts)

    def _training(self, marker: Marker) -> str:
        record = training.load(self._root, self._device)
        parts = []
        for item in marker.items:
            if item in training.ITEMS:
                parts.append(training.ITEMS[item](record))
            elif item != "losses":
                known = ", ".join(("losses", *training.ITEMS))
                raise marker.error(f"{item!r} is none of {known}")
            elif (drawn := training_curves.losses(record)) is not None:
                path = IMAGES / "training_losses.svg"
                self.plots[path] = drawn
                title = "Training losses by precision and backend"
                parts.append(_image(title, path, marker.page))
            else:
                parts.append(NOT_MEASURED)
        return "\n\n".join(parts)

    def _parallel(self, marker: Marker) -> str:
        runs = parallel.load(self._root, self._device)
        parts = []
        for item in marker.items:
            if item not in parallel_pages.ITEMS:
                raise marker.error(f"{item!r} is none of {', '.join(parallel_pages.ITEMS)}")
            if not runs:
                parts.append(NOT_MEASURED)
            elif item != "timeline":
                parts.append(parallel_pages.text(runs, item))
            elif (drawn := parallel_pages.timeline(runs)) is not None:
                path = parallel_pages.drawing_path(IMAGES)
                self.plots[path] = drawn
                parts.append(_image(drawn.title, path, marker.page))
            else:
                parts.append(NOT_MEASURED)
        return "\n\n".join(parts)

    def _gpu(self, source: Source) -> str:
        return f"one {source.run.content['machine_info']['gpu']}"

    def _provenance(self, sources: Iterable[Source]) -> str:
        """GPU, driver, versions and commit of the runs, and how their times were taken."""
        runs = list({source.run.path: source.run for source in sources}.values())
        rows = [row for source in sources for row in source.rows]
        files: dict[str, list[str]] = {}
        for run in runs:
            file = f"`{(BASELINES / run.path.name).as_posix()}`"
            files.setdefault(_made_with(run), []).append(file)
        text = " ".join(f"{place}: {', '.join(names)}." for place, names in files.items())
        if any(row.clock == EVENTS for row in rows):
            text += " † by events around eager calls."
        return text


def update(root: Path, device: str) -> list[Path]:
    """Make tables and plots anew; returns the files that changed.

    Raises:
        PageError: a marker that cannot be filled.
        SavedRunError: a baseline that cannot be used.
        ModuleNotFoundError: a plot is to be drawn and there is no matplotlib.
    """
    figures = Figures(root, device)
    changed = []
    for page, text in _pages(root).items():
        new = filled(page.relative_to(root), text, figures.content)
        if new != text:
            page.write_text(new, encoding="utf-8")
            changed.append(page)
    for path, plot in figures.plots.items():
        if plots.digest_in(root / path) != plots.digest(plot):
            plots.draw(plot, root / path)
            changed.append(root / path)
    return changed


def stale(root: Path, device: str) -> list[str]:
    """What `update` would change, one line each; plots by the digest of their data.

    Raises:
        PageError: a marker that cannot be filled.
        SavedRunError: a baseline that cannot be used.
    """
    figures = Figures(root, device)
    found = []
    for page, text in _pages(root).items():
        new = filled(page.relative_to(root), text, figures.content)
        if new != text:
            pairs = zip(new.splitlines(), text.splitlines(), strict=False)
            line = next((i for i, (a, b) in enumerate(pairs, start=1) if a != b), 1)
            found.append(f"{page.relative_to(root)}:{line}: differs from the baselines")
    for path, plot in figures.plots.items():
        if plots.digest_in(root / path) != plots.digest(plot):
            found.append(f"{path}: other than what would be drawn from the baselines")
    wanted = {path.name for path in figures.plots}
    for path in sorted((root / IMAGES).glob("*.svg")):
        if path.name not in wanted and plots.digest_in(path) is not None:
            found.append(f"{path.relative_to(root)}: no page asks for this plot")
    return found


def _pages(root: Path) -> dict[Path, str]:
    paths = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return {path: path.read_text(encoding="utf-8") for path in paths}


def _by_operator(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.operator, []).append(row)
    return found


def _made_with(run: SavedRun) -> str:
    """One NVIDIA H200 (driver …), torch …, triton …, commit …."""
    machine, commit = run.content["machine_info"], run.content["commit_info"]["id"]
    versions = [f"torch {machine['torch']}", f"triton {machine['triton']}"]
    if machine.get("liger-kernel"):
        versions.append(f"Liger-Kernel {machine['liger-kernel']}")
    return (
        f"One {machine['gpu']} (driver {machine['driver']}), {', '.join(versions)}, commit "
        f"`{commit[:10]}`"
    )


def _trained_with(comparison: Mapping[str, Any]) -> str:
    return (
        f"One {comparison['gpu']}, torch {comparison['torch']}, triton {comparison['triton']}, "
        f"commit `{comparison['commit']}`: `{comparison['command']}` on {comparison['corpus']}."
    )


def _image(text: str, path: Path, page: Path) -> str:
    return f"![{text}]({Path(os.path.relpath(path, page.parent)).as_posix()})"
