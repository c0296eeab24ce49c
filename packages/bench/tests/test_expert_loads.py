"""What is said of recorded loads: what a capacity drops, what padding adds."""

import pytest

from tilewright_bench.expert_loads import dropped, loads, loads_table

RECORD = {
    "mean_of": 10,
    "runs": {
        "nothing": {
            "losses": [3.0, 2.5],
            "largest": [2.0, 3.0],
            "last_loads": [[3.0, 0.5, 0.5, 0.0], [1.0, 2.0, 0.0, 1.0]],
        },
        "loss": {
            "losses": [3.0, 2.4],
            "largest": [2.0, 1.0],
            "last_loads": [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]],
        },
    },
}


def test_a_capacity_drops_what_is_beyond_it():
    assert dropped(RECORD, "nothing", 1.0) == pytest.approx((2 + 1) / 8)
    assert dropped(RECORD, "nothing", 2.0) == pytest.approx(1 / 8)
    assert dropped(RECORD, "loss", 1.0) == 0


def test_lines_are_of_the_record():
    largest, ranked, lost = (panel.lines for panel in loads(RECORD).panels)
    assert largest[0].points == ((5.0, 2.0), (15.0, 3.0))
    assert ranked[0].points == ((1, 2.5), (2, 0.75), (3, 0.75), (4, 0.0))
    assert lost[0].points[0] == (1.0, 37.5)
    assert lost[0].points[-1] == (3.0, 0.0)
    assert [line.label for line in lost] == ["left alone", "load-balance loss"]


def test_the_table_counts_padding_by_layer():
    nothing, loss = loads_table(RECORD).splitlines()[2:]
    assert nothing == "| left alone | 2.500 | 3.00 | 0.00 | 31.2 % | + 150 % |"
    assert loss == "| load-balance loss | 2.400 | 1.00 | 1.00 | 0.0 % | + 0 % |"
