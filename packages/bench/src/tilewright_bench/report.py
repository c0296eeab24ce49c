"""Measurements as a table of text: what pytest-benchmark's own tables have no columns for."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HEADER = (
    "operator",
    "case",
    "direction",
    "provider",
    "median µs",
    "spread",
    "GB/s",
    "of copy",
    "host µs",
    "extra MiB",
    "error",
)
_TEXT_COLUMNS = 4


@dataclass(frozen=True, kw_only=True)
class Row:
    """One benchmark of a run.

    Attributes:
        median: of its times, in seconds.
        iqr: their interquartile range, in seconds.
        extra_info: the fields of its `Measurement`.
    """

    median: float
    iqr: float
    extra_info: Mapping[str, Any]


def rows_of(benchmarks: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows of a saved run's list `benchmarks`; those measured otherwise are left out."""
    return [
        Row(median=b["stats"]["median"], iqr=b["stats"]["iqr"], extra_info=b["extra_info"])
        for b in benchmarks
        if "share_of_copy" in b["extra_info"]
    ]


def table(rows: Sequence[Row]) -> str:
    """Align rows under HEADER, a blank line between groups of operator, case and direction."""
    cells = [HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADER))]
    lines, group = [], HEADER[:3]
    for line in cells:
        if line[:3] != group:
            lines.append("")
            group = line[:3]
        lines.append(
            "  ".join(
                cell.ljust(width) if i < _TEXT_COLUMNS else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
        )
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    info = row.extra_info
    memory = info["peak_extra_bytes"]
    return (
        info["operator"],
        info["case"],
        info["direction"],
        info["provider"],
        f"{row.median * 1e6:.1f}",
        f"{row.iqr / row.median:.1%}",
        f"{info['gb_per_s']:.0f}" if info["gb_per_s"] >= 10 else f"{info['gb_per_s']:.2g}",
        f"{info['share_of_copy']:.0%}",
        f"{info['host_us']:.1f}",
        "-" if memory is None else f"{memory / 2**20:.1f}",
        f"{info['error']:.1e}",
    )
