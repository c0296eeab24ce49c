from collections.abc import Iterator
from itertools import chain, product
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tilewright_bench.bars import BARS
from tilewright_bench.case import Case, Variant
from tilewright_bench.discovery import load

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
OPERATORS = {name for bars in BARS.values() for bar in bars for name in bar.operators}


@pytest.fixture
def measured(monkeypatch) -> set[tuple[str, str, str, str]]:
    """Operator, case, direction and provider of all that is measured on a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # by_device gives GPU shapes
    return {
        (case.operator, str(case), variant.direction, variant.provider)
        for path in sorted(BENCHMARKS.glob("bench_*.py"))
        for case, variant in parameters(load(path))
    }


def parameters(module: ModuleType) -> Iterator[tuple[Case, Variant]]:
    """Cases and variants of a benchmark file, parametrized in pairs or each on its own."""
    for function in vars(module).values():
        marks = [m for m in getattr(function, "pytestmark", []) if m.name == "parametrize"]
        values = list(chain.from_iterable(mark.args[1] for mark in marks))
        yield from (value for value in values if isinstance(value, tuple))
        cases = [value for value in values if isinstance(value, Case)]
        yield from product(cases, [value for value in values if isinstance(value, Variant)])


def test_what_has_a_bar_is_measured_beside_the_peers_it_names(measured):
    places = {place[:3] for place in measured}
    for bar in chain.from_iterable(BARS.values()):
        for operator, direction in product(bar.operators, bar.directions):
            there = [case for o, case, d in places if (o, d) == (operator, direction)]
            assert there, (operator, direction)
            asked = product(bar.cases or there, (bar.provider, *bar.peers))
            wanted = {(operator, case, direction, provider) for case, provider in asked}
            if bar.than is not None:
                wanted.add((*bar.than, direction, bar.provider))
            assert wanted <= measured


def test_an_operator_has_its_bars_in_one_family():
    families = [{name for bar in bars for name in bar.operators} for bars in BARS.values()]
    assert sum(map(len, families)) == len(OPERATORS)


def test_no_bar_is_listed_twice():
    bars = [bar for family in BARS.values() for bar in family]
    assert len(set(bars)) == len(bars)
