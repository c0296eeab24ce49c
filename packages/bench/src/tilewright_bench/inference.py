"""What a model's inference reached: a table with the bars it is held to, and the cache's plot.

A record is what benchmarks/inference_rates.py saves: tokens a second of decoding, the rate of a
prefill beside a matrix product's, and time and memory of a cache by rows and by concatenation.
"""

from collections.abc import Mapping
from typing import Any

from tilewright_bench.curves import Curves, Line, Panel

DECODE_BARS = {1: 1400, 32: 45_000}
"""Greedy tokens a second, by batch, that a 0.5 B decoder must reach on one H200 in bfloat16."""

PREFILL_BAR = 0.7
"""Of the rate of a large matrix product."""

CACHE_BAR = 1.3
"""Tokens a second by rows over those by concatenation."""

FIRST_CALL_BAR = 20.0
"""Seconds until an engine that compiles and captures everything has finished its first call."""

LABELS = {"rows": "one allocation", "concatenation": "concatenation"}


def cache_memory(record: Mapping[str, Any]) -> Curves:
    """Memory of keys and values over tokens."""
    lines = []
    for color, found in enumerate(record["cache"]):
        memory = found["bytes_each_50_tokens"]
        points = tuple((50 * (i + 1), round(n / 2**20, 2)) for i, n in enumerate(memory))
        lines.append(Line(label=LABELS[found["cache"]], color=color, points=points))
    return Curves(
        panels=(
            Panel(
                title=f"{record['model']}, batch {record['cache'][0]['batch']}",
                x="tokens",
                y="MiB allocated for keys and values",
                logarithmic="",
                lines=tuple(lines),
            ),
        )
    )


def rates_table(record: Mapping[str, Any]) -> str:
    """A line for each figure; bars where there are any."""
    rows = ["| case | measured | bar | met |", "| --- | --- | --- | --- |"]

    def add(case: str, measured: str, bar: str = "", met: bool | None = None) -> None:
        verdict = "" if met is None else "yes" if met else "no"
        rows.append(f"| {case} | {measured} | {bar} | {verdict} |")

    for found in record["decode"]:
        batch, rate = found["batch"], found["tokens_per_s"]
        greedy = found["options"].get("temperature") == 0
        how = "greedy" if greedy else "temperature, top-k and top-p"
        case = f"decode, batch {batch}, {found['prompt']} + {found['new']} tokens, {how}"
        bar = DECODE_BARS.get(batch) if greedy else None
        measured = f"{rate:,.0f} tokens/s ({found['tokens_per_s_with_prompts']:,.0f} with prompts)"
        if bar is None:
            add(case, measured)
        else:
            add(case, measured, f"≥ {bar:,} tokens/s", rate >= bar)
    first = record["decode"][0]["first_call_s"]
    add("first call", f"{first:.1f} s", f"< {FIRST_CALL_BAR:g} s", first < FIRST_CALL_BAR)
    prefill = record["prefill"]
    add(
        f"prefill, {prefill['batch']} × {prefill['length']} tokens",
        f"{prefill['tflop_per_s']:,.0f} TFLOP/s, {prefill['share']:.0%} of matmul "
        f"({prefill['tokens_per_s']:,} tokens/s)".replace("%", " %"),
        f"≥ {PREFILL_BAR:.0%}".replace("%", " %"),
        prefill["share"] >= PREFILL_BAR,
    )
    speeds = {found["cache"]: found["tokens_per_s"] for found in record["cache"]}
    ratio = speeds["rows"] / speeds["concatenation"]
    add(
        f"one allocation against concatenation, {record['cache'][0]['tokens']} tokens, launched "
        f"one by one",
        f"{ratio:.2f}× ({speeds['rows']:,.0f} and {speeds['concatenation']:,.0f} tokens/s)",
        f"≥ {CACHE_BAR}×",
        ratio >= CACHE_BAR,
    )
    return "\n".join(rows)
