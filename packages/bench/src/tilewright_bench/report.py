"""Measurements as a table of text: what pytest-benchmark's own tables have no columns for."""

from collections.abc import Sequence

from tilewright_bench.rows import Row

HEADER = (
    "operator",
    "case",
    "direction",
    "provider",
    "median µs",
    "spread",
    "GB/s",
    "TFLOP/s",
    "share",
    "host µs",
    "extra MiB",
    "error",
    "clock",
)
_TEXT_COLUMNS = 4


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


def quantity(value: float) -> str:
    """Whole from 100 on, else three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.operator,
        row.case,
        row.direction,
        row.provider,
        f"{row.median * 1e6:.1f}",
        f"{row.spread:.1%}",
        quantity(row.gb_per_s),
        quantity(row.tflop_per_s),
        f"{row.share:.0%}{'' if row.ceiling == 'copy' else ' of ' + row.ceiling}",
        f"{row.host_us:.1f}",
        "-" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.1f}",
        f"{row.error:.1e}",
        row.clock.removeprefix("cuda "),
    )
