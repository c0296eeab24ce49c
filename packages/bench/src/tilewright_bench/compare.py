"""Two saved runs side by side: what got slower, by how much, and is that more than noise?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tilewright_bench.rows import share_of
from tilewright_bench.saved import SavedRun, SavedRunError

HEADER = ("benchmark", "before µs", "after µs", "after/before", "spread", "of ceiling", "")


@dataclass(frozen=True, kw_only=True)
class Change:
    """One benchmark in both runs.

    Attributes:
        name: operator, case, direction and provider; else the benchmark's own.
        before: median in the baseline, in seconds.
        after: median in the run.
        spread: the larger interquartile range ÷ median of the two.
        shares: of the ceiling, before and after; None where that was not measured.
        clocks: what measured the times, before and after; None where that is unknown.
    """

    name: str
    before: float
    after: float
    spread: float
    shares: tuple[float | None, float | None]
    clocks: tuple[str | None, str | None]

    @property
    def ratio(self) -> float:
        """Above 1 where the run is slower."""
        return self.after / self.before

    @property
    def verdict(self) -> str:
        """Slower, faster or, within the spread, neither."""
        if self.slower_by(0.0):
            return "slower"
        return "faster" if self.ratio < 1 - self.spread else ""

    def slower_by(self, share: float) -> bool:
        """Whether the run is slower by more than a share of the baseline, beyond the spread."""
        return self.ratio > 1 + share + self.spread


def changes(baseline: SavedRun, run: SavedRun, words: str = "") -> list[Change]:
    """Benchmarks in both runs whose names hold all of the words, the worst change first.

    Raises:
        SavedRunError: the two are the same file or have no such benchmark in common.
    """
    if baseline.path.resolve() == run.path.resolve():
        raise SavedRunError(f"{run.path} would be compared with itself; name an older run")
    before, after = _selected(baseline, words), _selected(run, words)
    common = [name for name in after if name in before]
    if not common:
        chosen = f" whose name holds {words!r}" if words else ""
        raise SavedRunError(
            f"{baseline.path} ({baseline.device}) and {run.path} ({run.device}) have no benchmark "
            f"in common{chosen}"
        )
    found = []
    for name in common:
        old, new = before[name], after[name]
        spreads = [b["stats"]["iqr"] / b["stats"]["median"] for b in (old, new)]
        change = Change(
            name=_label(new),
            before=old["stats"]["median"],
            after=new["stats"]["median"],
            spread=max(spreads),
            shares=(share_of(old["extra_info"]), share_of(new["extra_info"])),
            clocks=(old["extra_info"].get("clock"), new["extra_info"].get("clock")),
        )
        found.append(change)
    return sorted(found, key=lambda change: -change.ratio)


def missing(baseline: SavedRun, run: SavedRun, words: str = "") -> list[str]:
    """Names of benchmarks of the baseline, those that hold all of the words, that the run lacks."""
    after = _selected(run, words)
    return [_label(b) for name, b in _selected(baseline, words).items() if name not in after]


def compare(
    baseline: SavedRun, run: SavedRun, *, fail: float | None = None, words: str = ""
) -> int:
    """Print the comparison.

    Args:
        baseline: what ratios refer to.
        run: what is judged.
        fail: by how much of its baseline a benchmark may be slower, beyond its spread.
        words: compare only benchmarks whose names hold all of these.

    Returns:
        1 if a benchmark is slower than `fail` allows or missing from the run, else 0.

    Raises:
        SavedRunError: as `changes`.
    """
    found = changes(baseline, run, words)
    print(f"baseline: {baseline.path}  ({baseline.device})")
    print(f"run:      {run.path}  ({run.device})")
    if baseline.device != run.device:
        print("The devices differ, and so do their times, whatever the code.")
    lacking, new = missing(baseline, run, words), missing(run, baseline, words)
    print(f"{len(found)} benchmarks compared, {len(lacking)} missing, {len(new)} new\n")
    print(_table(found))
    if any(change.clocks[0] != change.clocks[1] for change in found):
        print("* measured by another clock than before; the ratio is not of the code alone")
    print("".join(f"\nmissing: {name}" for name in lacking))
    mean = math.exp(math.fsum(math.log(change.ratio) for change in found) / len(found))
    verdicts = [change.verdict for change in found]
    print(
        f"\ngeometric mean {mean:.3f}; slower beyond their spread: {verdicts.count('slower')}, "
        f"faster: {verdicts.count('faster')}"
    )
    if fail is None:
        return 0
    slower = [change.name for change in found if change.slower_by(fail)]
    if slower:
        print(f"FAILED: {len(slower)} slower by more than {fail:.1%} beyond their spread:")
        print("\n".join(f"  {name}" for name in slower))
    if lacking:
        print(f"FAILED: {len(lacking)} missing from the run")
    return int(bool(slower or lacking))


def _selected(run: SavedRun, words: str) -> dict[str, dict[str, Any]]:
    """Benchmarks whose names hold all of the words, by what they measure, wherever it is written.

    That is operator, case, direction and provider; else the benchmark's full name.
    """
    return {
        _label(benchmark) if "operator" in benchmark["extra_info"] else name: benchmark
        for name, benchmark in run.benchmarks.items()
        if all(word in f"{name} {_label(benchmark)}" for word in words.split())
    }


def _label(benchmark: Mapping[str, Any]) -> str:
    info = benchmark["extra_info"]
    if "operator" not in info:
        return benchmark["name"]
    return " ".join(info[key] for key in ("operator", "case", "direction", "provider"))


def _table(found: list[Change]) -> str:
    cells = [HEADER, *(_cells(change) for change in found)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def _cells(change: Change) -> tuple[str, ...]:
    shares = " → ".join("-" if share is None else f"{share:.0%}" for share in change.shares)
    return (
        change.name,
        f"{change.before * 1e6:.1f}",
        f"{change.after * 1e6:.1f}",
        f"{change.ratio:.3f}{'' if change.clocks[0] == change.clocks[1] else ' *'}",
        f"{change.spread:.1%}",
        shares,
        change.verdict,
    )
