"""Bars, and whether what was measured reaches them.

A bar is what operators must reach at some shapes: a share of the ceiling, or a speed, a host time
or an amount of memory beside that of peers in the same run. It is data (`tilewright_bench.bars`),
so that a page can show all of them with their figures, those that are missed too.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tilewright_bench.case import Direction
from tilewright_bench.rows import OURS, Row, groups_of

Quantity = Literal["share", "speed", "host", "memory", "rate", "part", "runs"]
Over = Literal["each", "least", "mean", "quarter"]
Group = tuple[str, str, str]

AT_MOST: tuple[Quantity, ...] = ("host", "memory", "part")
"""Quantities that a bar bounds from above."""

QUARTER = 0.25

RUN_TO_RUN = 0.01
"""By so much two runs of one kernel on one device differ, whose samples agree to 0.2 %: where its
tensors lie in memory, and how warm it is, is chosen once a run."""

_COSTS: dict[Quantity, Callable[[Row], float | None]] = {
    "speed": lambda row: row.median,
    "host": lambda row: row.host_us,
    "memory": lambda row: row.extra_bytes,
}


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What some operators must reach.

    Attributes:
        operators: whose.
        cases: shape and dtype as in `str(Case)`; none for all that were measured.
        directions: which of them.
        quantity: "share" of the ceiling; "speed", "host" time of a call or "memory" beyond inputs
            and results, each ÷ that of the best peer; "rate", operations a second ÷ those of the
            same provider at another place; "part", time ÷ that of the same provider there; "runs"
            asks for a measurement alone.
        limit: the least value, the greatest of "host", "memory" and "part".
        provider: whose figures are held against the limit.
        peers: providers that it is compared with. All must have been measured.
        than: operator and case that a rate or a part is of, in the same direction.
        over: "each" case; the "least" of all cases, their geometric "mean", or a "quarter" of them.
        noise: whether a value that misses by less than its spread counts as equal.
    """

    operators: tuple[str, ...]
    cases: tuple[str, ...] = ()
    directions: tuple[Direction, ...]
    quantity: Quantity
    limit: float = 0.0
    provider: str = OURS
    peers: tuple[str, ...] = ()
    than: tuple[str, str] | None = None
    over: Over = "each"
    noise: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("quantity", self.quantity, get_args(Quantity)),
            ("over", self.over, get_args(Over)),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is none of {', '.join(map(repr, known))}")
        needed = "" if self.quantity in _COSTS else "no "
        if bool(self.peers) != (self.quantity in _COSTS):
            raise ValueError(f"{self.quantity!r} needs {needed}peers, and {self.peers} are given")
        if (self.than is not None) != (self.quantity in ("rate", "part")):
            raise ValueError(
                f"'rate' and 'part' need than, and others none: {self.quantity!r}, {self.than}"
            )
        if self.over != "each" and (self.quantity in AT_MOST or self.noise):
            raise ValueError(f"over {self.over!r} is for shares and speeds, without noise")

    def holds(self, value: float, spread: float = 0.0) -> bool:
        """Whether a value reaches the limit."""
        if self.quantity in AT_MOST:
            return value <= self.limit * (1 + spread)
        return value * (1 + spread) >= self.limit


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One value of a bar's quantity.

    Attributes:
        value: the share, the ratio or, for "runs", seconds.
        spread: interquartile range ÷ median, the larger of ours and the peer's, or RUN_TO_RUN.
        beside: the best of the bar's peers, the ceiling that a share is of, or the provider itself.
    """

    value: float
    spread: float
    beside: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A bar at one place.

    Attributes:
        bar: what was asked for.
        operators: of whom; one, or all of the bar's if it is over several cases.
        case: where; "" if over several or if none was measured.
        direction: of the case; "" if over several.
        figures: all values that the bar looks at; none if one of them was not measured.
    """

    bar: Bar
    operators: tuple[str, ...]
    case: str = ""
    direction: str = ""
    figures: tuple[Figure, ...]

    @property
    def place(self) -> tuple[tuple[str, ...], str, str, str]:
        """Where it is passed, and by whom."""
        return self.operators, self.case, self.direction, self.bar.provider

    @property
    def value(self) -> float | None:
        """What is held against the limit, the share of cases for a quarter; None: not measured."""
        values = [figure.value for figure in self.figures]
        if not values:
            return None
        if self.bar.over == "mean":
            return math.exp(math.fsum(map(math.log, values)) / len(values))
        if self.bar.over == "quarter":
            return sum(map(self.bar.holds, values)) / len(values)
        return min(values)

    @property
    def met(self) -> bool | None:
        """None where something was not measured."""
        if self.value is None:
            return None
        if self.bar.over == "quarter":
            return self.value >= QUARTER
        return self.bar.holds(self.value, self.figures[0].spread if self.bar.noise else 0.0)


def judge(bars: Iterable[Bar], rows: Iterable[Row]) -> list[Verdict]:
    """Verdicts, those of one operator and then of one case together, else in the order of bars."""
    groups = {group[0].group: group for group in groups_of(rows)}
    verdicts = [verdict for bar in bars for verdict in _verdicts(bar, groups)]
    operators = list(dict.fromkeys(verdict.operators for verdict in verdicts))
    places = list(dict.fromkeys(verdict.place for verdict in verdicts))
    return sorted(verdicts, key=lambda v: (operators.index(v.operators), places.index(v.place)))


def _verdicts(bar: Bar, groups: Mapping[Group, Sequence[Row]]) -> list[Verdict]:
    found: list[Verdict] = []
    for operator in bar.operators:
        for direction in bar.directions:
            there = [case for o, case, d in groups if (o, d) == (operator, direction)]
            # Without any case there is still a verdict: that nothing was measured.
            for case in bar.cases or there or [""]:
                figure = _figure(bar, groups, (operator, case, direction))
                verdict = Verdict(
                    bar=bar,
                    operators=(operator,),
                    case=case,
                    direction=direction,
                    figures=() if figure is None else (figure,),
                )
                found.append(verdict)
    if bar.over == "each":
        return found
    complete = all(verdict.figures for verdict in found)
    figures = tuple(figure for verdict in found for figure in verdict.figures)
    return [Verdict(bar=bar, operators=bar.operators, figures=figures if complete else ())]


def _figure(bar: Bar, groups: Mapping[Group, Sequence[Row]], place: Group) -> Figure | None:
    """The value of one case and direction; None if it or what it is compared with is missing."""
    rows = {row.provider: row for row in groups.get(place, ())}
    if bar.provider not in rows or any(peer not in rows for peer in bar.peers):
        return None
    ours = rows[bar.provider]
    if bar.quantity in ("share", "runs"):
        value = ours.share if bar.quantity == "share" else ours.median
        return Figure(value=value, spread=max(ours.spread, RUN_TO_RUN), beside=ours.ceiling)
    if bar.than is not None:
        return _elsewhere(bar, ours, groups.get((*bar.than, place[2]), ()))
    costs = {name: _COSTS[bar.quantity](rows[name]) for name in (bar.provider, *bar.peers)}
    known = {name: cost for name, cost in costs.items() if cost is not None}
    if len(known) < len(costs):
        return None
    best = min(bar.peers, key=lambda name: known[name])
    over, under = (bar.provider, best) if bar.quantity in AT_MOST else (best, bar.provider)
    spread = max(ours.spread, rows[best].spread, RUN_TO_RUN)
    return Figure(value=_ratio(known[over], known[under]), spread=spread, beside=best)


def _elsewhere(bar: Bar, ours: Row, there: Iterable[Row]) -> Figure | None:
    """Operations a second, or the time, beside those of the same provider elsewhere."""
    for other in there:
        if other.provider == ours.provider:
            rate = ours.tflop_per_s / other.tflop_per_s
            return Figure(
                value=rate if bar.quantity == "rate" else ours.median / other.median,
                spread=max(ours.spread, other.spread, RUN_TO_RUN),
                beside=ours.provider,
            )
    return None


def _ratio(over: float, under: float) -> float:
    """Defined for nothing ÷ nothing, which memory often is."""
    if under:
        return over / under
    return math.inf if over else 1.0
