"""Tables of measurements in Markdown, for documentation pages."""

from collections.abc import Sequence

from tilewright_bench.report import quantity
from tilewright_bench.rows import OURS, Row, groups_of

NAMES = {"compile": "torch.compile", "liger": "Liger-Kernel"}
"""Providers whose name in a page is another than in benchmarks."""

DIRECTIONS = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward + backward"}

EVENTS = "cuda events"


def full_table(rows: Sequence[Row]) -> str:
    """All measurements of one operator, ours first among the providers of a shape and direction."""
    arithmetic = any(row.ceiling == "matmul" for row in rows)
    rate, share = ("TFLOP/s", "of ceiling") if arithmetic else ("GB/s", "of copy")
    header = ("shape", "direction", "provider", "µs", rate, share, "× ours", "host µs")
    header += ("extra MiB", "error")
    lines, shape = [header, ("---",) * 3 + ("---:",) * 7], ""
    for group in groups_of(rows):
        ours = next((row.median for row in group if row.provider == OURS), None)
        for i, row in enumerate(sorted(group, key=lambda row: row.provider != OURS)):
            lines.append(
                (
                    "" if i or row.case == shape else case_text(row.case),
                    "" if i else DIRECTIONS[row.direction],
                    NAMES.get(row.provider, row.provider),
                    microseconds(row),
                    quantity(row.tflop_per_s if arithmetic else row.gb_per_s),
                    share_text(row),
                    "" if ours is None or row.provider == OURS else f"{row.median / ours:.2f}",
                    quantity(row.host_us),
                    "–" if row.extra_bytes is None else quantity(row.extra_bytes / 2**20),
                    f"{row.error:.1e}",
                )
            )
            shape = row.case
    return _markdown(lines)


def summary_table(groups: Sequence[Sequence[Row]]) -> str:
    """A line a group, a column a provider: µs and, in brackets, the share of the ceiling."""
    providers = [OURS]
    for row in (row for group in groups for row in group):
        if row.provider not in providers:
            providers.append(row.provider)
    lines = [
        ("µs", *(NAMES.get(provider, provider) for provider in providers)),
        ("---",) + ("---:",) * len(providers),
    ]
    for group in groups:
        cells = {row.provider: f"{microseconds(row)} ({share_text(row)})" for row in group}
        operator, case, direction = group[0].group
        what = f"`{operator}` {case_text(case)} {DIRECTIONS[direction]}"
        lines.append((what, *(cells.get(provider, "") for provider in providers)))
    return _markdown(lines)


def case_text(case: str) -> str:
    """16384x4096-bf16 as pages write it: 16384×4096 bf16."""
    return case.replace("x", "×").replace("-", " ")


def microseconds(row: Row) -> str:
    """The median, marked where events around eager calls measured it."""
    microseconds = row.median * 1e6
    text = f"{microseconds:.0f}" if microseconds >= 1000 else f"{microseconds:.3g}"
    return f"{text} †" if row.clock == EVENTS else text


def share_text(row: Row) -> str:
    """The share of the ceiling, which is named where it is not a copy."""
    text = f"{row.share * 100:.0f} %"
    return text if row.ceiling == "copy" else f"{text} of {row.ceiling}"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        "|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines
    )
