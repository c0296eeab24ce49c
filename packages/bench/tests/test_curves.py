"""Curves: how Newton–Schulz converges, and what is said of training runs."""

import json

import pytest

from tilewright_bench.curves import (
    TRAINING,
    convergence,
    load_comparison,
    losses,
    losses_table,
    steps_to_reach,
)
from tilewright_bench.plots import digest, digest_in, draw

COMPARISON = {
    "optimizers": {
        "AdamW": {
            "lr": 0.001,
            "seeds": [{"0": 9.0, "10": 6.0, "20": 5.0}, {"0": 9.0, "10": 6.2, "20": 5.2}],
            "grid": {"0.002": 5.5, "0.001": 5.0},
        },
        "MuonW": {
            "lr": 0.004,
            "seeds": [{"0": 9.0, "10": 5.0, "20": 4.0}, {"0": 9.0, "10": 5.1, "20": 4.4}],
            "grid": {"0.002": 4.5, "0.004": 4.0},
        },
    }
}


def test_convergence_is_that_of_the_polynomials():
    mapped, stepwise = convergence().panels
    by_name = {line.label: dict(line.points) for line in mapped.lines}
    assert by_name["quintic"][1.0] == pytest.approx(0.6964, abs=1e-3)  # 1 -> 0.701 -> …
    small = min(by_name["quintic"])
    assert by_name["quintic"][small] == pytest.approx(3.4445**5 * small, rel=1e-2)
    for line in stepwise.lines:
        if line.points[0][1] >= 0.01:  # from there on, five steps are enough
            assert 0.6 < line.points[5][1] < 1.25


def test_losses_are_means_and_ranges():
    runs, rates = losses(COMPARISON).panels
    adamw, muonw = runs.lines
    assert adamw.points == ((10, 6.1), (20, 5.1))
    assert muonw.band == ((10, 5.0, 5.1), (20, 4.0, 4.4))
    assert rates.lines[0].points == ((0.001, 5.0), (0.002, 5.5))


def test_the_table_says_when_the_first_is_reached():
    adamw, muonw = losses_table(COMPARISON).splitlines()[2:]
    assert adamw == "| AdamW | 0.001 | 5.000, 5.200 | 5.100 | 20 of 20 |"
    assert muonw == "| MuonW | 0.004 | 4.000, 4.400 | 4.200 | 10 of 20 |"
    assert steps_to_reach({"10": 5.0}, 4.0) is None


def test_curves_are_drawn_with_their_digest(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "losses.svg"
    plot = losses(COMPARISON)
    draw(plot, path)
    assert digest_in(path) == digest(plot) != digest(convergence())


def test_comparisons_are_found_by_name(tmp_path):
    assert load_comparison(tmp_path, "h200-optimizers") is None
    (tmp_path / TRAINING).mkdir(parents=True)
    (tmp_path / TRAINING / "h200-optimizers.json").write_text(json.dumps(COMPARISON))
    assert load_comparison(tmp_path, "h200-optimizers") == COMPARISON
