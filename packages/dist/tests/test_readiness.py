"""Starting orders of single backward passes, without any collective."""

import pytest

from tilewright_dist.readiness import ReadyQueue


def test_units_start_complete_and_in_order():
    queue = ReadyQueue([["a", "b"], ["c"], ["d"]])
    assert queue.arrived("c") == []  # complete, but behind the first
    assert queue.arrived("b") == []
    assert queue.arrived("a") == [0, 1]
    assert list(queue.counts) == ["c", "b", "a"]
    assert queue.rest() == [2]
    assert queue.rest() == []
    queue.reset()
    assert queue.arrived("d") == []
    assert queue.rest() == [0, 1, 2]


def test_members_may_be_expected_often_or_never():
    queue = ReadyQueue([["a"], ["never"], ["b"]], {"a": 2, "b": 1})
    assert queue.arrived("a") == []
    assert queue.arrived("a") == [0, 1]
    assert queue.arrived("b") == [2]


def test_a_first_pass_counts_and_starts_nothing():
    queue = ReadyQueue([["a"], ["b"]], learns=True)
    assert [queue.arrived(name) for name in ("a", "a", "b")] == [[], [], []]
    assert queue.counts == {"a": 2, "b": 1}
    assert queue.rest() == [0, 1]


def test_too_many_arrivals_are_refused():
    queue = ReadyQueue([["a"]])
    queue.arrived("a")
    with pytest.raises(RuntimeError, match="'a' arrived 2 times in one backward pass, 1 expected"):
        queue.arrived("a")
