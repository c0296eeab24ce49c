"""Comparisons of small decoders: what is drawn and said of a record."""

from pathlib import Path

import pytest

from tilewright_bench.decoders import KINDS, comparison, comparison_table, load, origin

ROOT = Path(__file__).parents[3]
ABOUT = {
    "steps": 40, "mean_of": 20, "batch": [8, 128], "bin": 128, "corpus": "C", "device": "D",
    "torch": "2",
}  # fmt: skip


def test_losses_by_position_are_split_by_what_was_changed() -> None:
    found = {"rope": [1.0, 2.0, 3.0, 4.0], "rope, ntk": [1.5] * 4, "none": [2.0] * 4}
    record = {**ABOUT, "positions": found}
    trained, changed = comparison(record).panels
    assert [line.label for line in trained.lines] == ["rope", "none"]
    assert [(line.label, line.dashes) for line in changed.lines] == [
        ("rope", False),
        ("rope, ntk", True),
    ]
    assert trained.lines[0].points == ((64.0, 1.0), (192.0, 2.0), (320.0, 3.0), (448.0, 4.0))
    assert "| rope | 1.00 | 2.00 | 3.50 |" in comparison_table(record)
    assert "40 steps of 8 sequences of 128 bytes" in origin(record)


def test_the_last_loss_of_heads_is_held_out() -> None:
    record = {**ABOUT, "heads": {"4": [3.0, 2.0, 2.5], "1": [3.5, 2.25, 2.75]}}
    (panel,) = comparison(record).panels
    assert [len(line.points) for line in panel.lines] == [2, 2]
    assert "| 1 | 2.250 | 2.750 |" in comparison_table(record)


def test_loads_are_told_from_the_second_half() -> None:
    of = {"losses": [4.0, 3.0, 2.0, 1.0], "busiest ÷ mean": [1.9, 1.2, 1.4, 1.1]}
    record = {**ABOUT, "experts": {"balance loss": of}}
    losses, loads = comparison(record).panels
    assert losses.lines[0].points[0] == (10.0, 4.0)
    assert loads.lines[0].points[-1] == (70.0, 1.1)
    assert "| balance loss | 1.000 | 1.10 | 1.40 |" in comparison_table(record)


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="needs the repository's baselines")
@pytest.mark.parametrize("kind", KINDS)
def test_committed_records_can_be_drawn(kind: str) -> None:
    record = load(ROOT, kind)
    assert record is not None
    assert comparison(record).panels
    assert comparison_table(record).count("\n") >= 3
