"""One benchmark of a saved run as tables, plots and comparisons read it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

OURS = "tilewright"
"""The provider that the others are compared with."""

OUR_OTHERS = frozenset(
    {
        *("triton", "deterministic", "recompute", "bf16_states"),
        *("naive", "grouped", "pipelined", "persistent", "stream_k"),
    }
)
"""Providers that are ours in another mode, and no peers."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measurement with its times.

    Attributes:
        operator: the case's operator.
        case: shape and dtype: 16384x4096-bf16.
        direction: "fwd", "bwd" or "fwd+bwd".
        provider: whose code ran.
        clock: what measured the times.
        median: of the times, in seconds.
        spread: their interquartile range ÷ median.
        gb_per_s: least traffic ÷ median.
        tflop_per_s: least operations ÷ median.
        ceiling: what bounds the case, "copy" or "matmul".
        share: of that ceiling's speed.
        intensity: least operations ÷ least traffic, FLOP per byte.
        host_us: until an eager call returns on the host.
        extra_bytes: memory that a call needs beyond its inputs and results, None if unknown.
        error: against float64.
    """

    operator: str
    case: str
    direction: str
    provider: str
    clock: str
    median: float
    spread: float
    gb_per_s: float
    tflop_per_s: float
    ceiling: str
    share: float
    intensity: float
    host_us: float
    extra_bytes: int | None
    error: float

    @property
    def group(self) -> tuple[str, str, str]:
        """What providers are compared within."""
        return self.operator, self.case, self.direction


def row_of(stats: Mapping[str, Any], info: Mapping[str, Any]) -> Row:
    """A row from a benchmark's `stats` and `extra_info`.

    Files from before there were `ceiling` and `result_bytes` can be read: all they say is the share
    of a copy.
    """
    peak, results = info["peak_extra_bytes"], info.get("result_bytes")
    return Row(
        operator=info["operator"],
        case=info["case"],
        direction=info["direction"],
        provider=info["provider"],
        clock=info["clock"],
        median=stats["median"],
        spread=stats["iqr"] / stats["median"],
        gb_per_s=info["gb_per_s"],
        tflop_per_s=info["tflop_per_s"],
        ceiling=info.get("ceiling", "copy"),
        share=share_of(info) or 0.0,
        intensity=info["flops"] / info["bytes"],
        host_us=info["host_us"],
        extra_bytes=None if peak is None or results is None else max(peak - results, 0),
        error=info["error"],
    )


def share_of(info: Mapping[str, Any]) -> float | None:
    """The share of the ceiling that a benchmark's `extra_info` names."""
    return info.get("share", info.get("share_of_copy"))


def rows_of(benchmarks: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows of a saved run's list `benchmarks`; those measured otherwise are left out."""
    return [
        row_of(b["stats"], b["extra_info"])
        for b in benchmarks
        if "share_of_copy" in b["extra_info"]
    ]


def groups_of(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows by operator, case and direction, in the order in which each first comes."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return list(groups.values())


def lead(group: Iterable[Row]) -> float | None:
    """How many times faster ours is than the best peer; None where one of them is missing."""
    rows = list(group)
    ours = [row.median for row in rows if row.provider == OURS]
    peers = [row.median for row in rows if row.provider not in {OURS, *OUR_OTHERS}]
    return min(peers) / ours[0] if ours and peers else None
