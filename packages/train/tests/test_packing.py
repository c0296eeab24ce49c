"""Best fit decreasing: everything once, no row too full, as good as the definition."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright_train import packing
from tilewright_train.errors import InputError
from tilewright_train.packing import best_fit, plan_rows
from tilewright_train.samples import Samples


def best_fit_by_definition(lengths: list[int], seq_len: int) -> list[int]:
    """Room left in each row, by looking at all rows for each piece."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            best = min(fitting, key=lambda i: rooms[i])
            rooms[best] -= length
        else:
            rooms.append(seq_len - length)
    return rooms


def rows_of(order: torch.Tensor, sizes: torch.Tensor) -> list[list[int]]:
    return [row.tolist() for row in order.split(sizes.tolist())]


def samples(lengths: list[int], *, targets: list[int] | None = None) -> Samples:
    total = sum(lengths)
    return Samples(
        torch.arange(total, dtype=torch.int32),
        torch.tensor(lengths).cumsum(0),
        None if targets is None else torch.tensor(targets, dtype=torch.uint8),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_rows_are_those_of_the_definition(lengths: list[int]) -> None:
    rows = rows_of(*best_fit(torch.tensor(lengths), 30))
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    rooms = [30 - sum(lengths[piece] for piece in row) for row in rows]
    assert min(rooms) >= 0
    assert sorted(rooms) == sorted(best_fit_by_definition(lengths, 30))


def test_many_samples_are_packed_group_by_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_TOGETHER", 10)
    rows = rows_of(*best_fit(torch.tensor([3] * 25), 9))
    assert [len(row) for row in rows] == [3, 3, 3, 1, 3, 3, 3, 1, 3, 2]
    assert sorted(piece for row in rows for piece in row) == list(range(25))


def test_ordinary_documents_fill_more_than_nine_tenths() -> None:
    draw = random.Random(0)
    lengths = [min(512, int(draw.lognormvariate(4.5, 1.0)) + 1) for _ in range(3000)]
    plan = plan_rows(samples(lengths, targets=[1] * sum(lengths)), 512, pack=True)
    assert plan.efficiency > 0.98
    alone = plan_rows(samples(lengths, targets=[1] * sum(lengths)), 512, pack=False)
    assert alone.efficiency < 0.4
    assert alone.rows == 3000


def test_a_text_longer_than_a_row_is_cut_and_every_token_is_predicted_once() -> None:
    plan = plan_rows(samples([3, 17, 1, 6]), 6, pack=True)
    predicted = []
    for start, length in zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True):
        assert length <= 6
        predicted += range(start + 1, start + length)  # the first token of a piece is only read
    assert sorted(predicted) == list(range(27))
    assert int(plan.targets.sum()) == 27
    assert (plan.truncated, plan.dropped) == (0, 0)


def test_a_sample_longer_than_a_row_is_cut_off_and_counted() -> None:
    # Targets of the third lie behind the row's end; the fourth has one as its first token only.
    targets = [*(0, 0, 1), *(0, 1, 1, 1, 1, 1), *(0, 0, 0, 0, 0, 1), *(1, 0)]
    plan = plan_rows(samples([3, 6, 6, 2], targets=targets), 5, pack=False)
    assert plan.starts.tolist() == [0, 3]
    assert plan.lengths.tolist() == [3, 5]
    assert plan.targets.tolist() == [1, 4]
    assert (plan.truncated, plan.dropped) == (2, 2)


def test_nothing_to_predict_is_an_error() -> None:
    with pytest.raises(InputError, match="no sample has a token to predict within 4 tokens"):
        plan_rows(samples([3], targets=[0, 0, 0]), 4, pack=True)
