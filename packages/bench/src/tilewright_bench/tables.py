"""Tables of measurements in Markdown, for documentation pages."""

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from tilewright_bench.judge import AT_MOST, Bar, Verdict
from tilewright_bench.report import quantity
from tilewright_bench.rows import OURS, Row, groups_of

NAMES = {
    "compile": "torch.compile",
    "liger": "Liger-Kernel",
    "cudnn": "cuDNN",
    "flash": "torch's flash",
    "flex": "FlexAttention",
}
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


def bars_table(verdicts: Sequence[Verdict]) -> str:
    """A line a verdict, the figure beside the bar."""
    lines, place = [("case", "bar", "measured", "met"), ("---", "---", "---:", "---")], None
    for verdict in verdicts:
        lines.append(
            (
                "" if verdict.place == place else _place_text(verdict),
                _bar_text(verdict.bar),
                _measured_text(verdict),
                {None: "", True: "yes", False: "**no**"}[verdict.met],
            )
        )
        place = verdict.place
    return _markdown(lines)


def bars_summary(verdicts: Sequence[Verdict]) -> str:
    """How many bars are met, missed and not measured."""
    met, missed, unknown = (
        sum(verdict.met is value for verdict in verdicts) for value in (True, False, None)
    )
    return f"{met} met, {missed} missed, {unknown} not measured."


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


def _place_text(verdict: Verdict) -> str:
    words = [", ".join(f"`{operator}`" for operator in verdict.operators)]
    words += [case_text(verdict.case)] if verdict.case else []
    words += [DIRECTIONS[verdict.direction]] if verdict.direction else []
    provider = verdict.bar.provider
    return " ".join(words) + ("" if provider == OURS else f", {NAMES.get(provider, provider)}")


def _bar_text(bar: Bar) -> str:
    if bar.quantity == "runs":
        return "runs"
    if bar.than is not None:
        operator, case = bar.than
        there = f"`{operator}` {case_text(case)}"
        if bar.quantity == "part":
            return f"≤ {bar.limit * 100:g} % of the time of {there}"
        return f"TFLOP/s ≥ {bar.limit:g}× {there}"
    peers = [NAMES.get(peer, peer) for peer in bar.peers]
    beside = f"× {peers[0]}" if len(peers) == 1 else f"× the best of {', '.join(peers)}"
    text = {
        "share": f"share of the ceiling ≥ {bar.limit * 100:g} %",
        "speed": f"speed ≥ {bar.limit:g}{beside}",
        "host": f"host time ≤ {bar.limit:g}{beside}",
        "memory": f"extra memory ≤ {bar.limit:g}{beside}",
    }[bar.quantity]
    over = {
        "each": "{}",
        "least": "{} in all cases",
        "mean": "geometric mean of {}",
        "quarter": "{} in a quarter of the cases",
    }[bar.over]
    return over.format(text) + (", within the spread" if bar.noise else "")


def _measured_text(verdict: Verdict) -> str:
    """Rounded towards a miss, so that no figure looks better than it was judged."""
    bar, value = verdict.bar, verdict.value
    if value is None:
        return "not measured"
    if bar.over == "quarter":
        return f"{value:.0%} of {len(verdict.figures)} cases".replace("%", " %")
    if bar.quantity == "runs":
        return f"{quantity(value * 1e6)} µs"
    beside = verdict.figures[0].beside
    if bar.quantity == "share":
        text = f"{_rounded(value * 100, 1, bar)} % of {beside}"
    elif bar.quantity == "part":
        text = f"{_rounded(value * 100, 1, bar)} %"
    else:
        text = f"{_rounded(value, 3 if bar.noise else 2, bar)}×"
        text += f" {NAMES.get(beside, beside)}" if len(bar.peers) > 1 else ""
    return text + (f", spread {verdict.figures[0].spread * 100:.1f} %" if bar.noise else "")


def _rounded(value: float, digits: int, bar: Bar) -> str:
    if math.isinf(value):
        return "∞"
    towards = ROUND_CEILING if bar.quantity in AT_MOST else ROUND_FLOOR
    # Nine digits: as 0.953 and not what the float next to it is, 0.95299….
    return str(Decimal(f"{value:.9g}").quantize(Decimal(1).scaleb(-digits), towards))


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        "|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines
    )
