from pathlib import Path

from tilewright_bench.bars import BARS
from tilewright_bench.discovery import operators_in

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
OPERATORS = {name for bars in BARS.values() for bar in bars for name in bar.operators}


def test_what_has_a_bar_has_a_benchmark():
    assert operators_in(BENCHMARKS) >= OPERATORS


def test_an_operator_has_its_bars_in_one_family():
    families = [{name for bar in bars for name in bar.operators} for bars in BARS.values()]
    assert sum(map(len, families)) == len(OPERATORS)


def test_no_bar_is_listed_twice():
    bars = [bar for family in BARS.values() for bar in family]
    assert len(set(bars)) == len(bars)
