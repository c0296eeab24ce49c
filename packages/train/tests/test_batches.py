"""Batches: a pure function of seed and step, shared by ranks, every token once an epoch."""

import pytest
import torch

from tilewright_train.batches import BatchSampler, validation_rows
from tilewright_train.errors import InputError

TOKENS = torch.arange(101, dtype=torch.int32)


def sampler(**options: int) -> BatchSampler:
    return BatchSampler(TOKENS, **({"batch_size": 4, "seq_len": 6, "seed": 0} | options))


def test_the_same_step_gives_the_same_rows_whatever_was_asked_before() -> None:
    one, other = sampler(), sampler()
    expected = [one.rows(step) for step in range(12)]
    for step in (11, 3, 7, 3, 0):
        torch.testing.assert_close(other.rows(step), expected[step], rtol=0, atol=0)
    assert expected[0].shape == (4, 6)
    assert expected[0].dtype == torch.int64


def test_another_seed_gives_another_order() -> None:
    assert not torch.equal(sampler(seed=1).rows(0), sampler(seed=0).rows(0))


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_rows_of_one_batch(world_size: int) -> None:
    for step in (0, 9):
        shares = [sampler(rank=r, world_size=world_size).rows(step) for r in range(world_size)]
        torch.testing.assert_close(torch.cat(shares), sampler().rows(step), rtol=0, atol=0)


def test_an_epoch_predicts_every_token_once() -> None:
    # 101 tokens are 20 windows of 5 predictions, and one token that this epoch leaves out.
    one = sampler()
    for first in (0, 5):
        rows = torch.cat([one.rows(step) for step in range(first, first + 5)])
        predicted = rows[:, 1:].flatten()
        assert predicted.unique().numel() == predicted.numel() == 100
    assert one.windows == 20
    assert one.epochs(10) == 2.0


def test_windows_are_consecutive_tokens_on_a_ring() -> None:
    rows = torch.cat([sampler().rows(step) for step in range(5)])
    assert torch.equal(rows.diff(dim=1) % 101, torch.ones(20, 5, dtype=torch.int64))


def test_epochs_differ_in_order_and_in_where_windows_begin() -> None:
    first, second = (torch.cat([sampler().rows(s) for s in e]) for e in (range(5), range(5, 10)))
    assert set(first[:, 0].tolist()) != set(second[:, 0].tolist())
    assert not torch.equal(first.diff(dim=0)[:, 0], second.diff(dim=0)[:, 0])


def test_too_few_tokens_or_uneven_shares_are_errors() -> None:
    assert sampler(seq_len=101).rows(0).shape == (4, 101)
    with pytest.raises(InputError, match="has 101 training tokens, fewer than one sequence of 102"):
        sampler(seq_len=102)
    with pytest.raises(InputError, match="batch_size 4 is not a multiple of the 3 processes"):
        sampler(world_size=3)


def test_validation_rows_are_spread_evenly_and_overlap_by_one_token() -> None:
    rows = validation_rows(TOKENS, 6, 10**6)
    assert rows.shape == (20, 6)
    assert torch.equal(rows[:, 1:].flatten(), torch.arange(1, 101))
    assert validation_rows(TOKENS, 6, 20)[:, 0].tolist() == [0, 25, 50, 75]
    assert validation_rows(TOKENS, 6, 1).shape == (1, 6)


def test_few_validation_tokens_make_one_short_row() -> None:
    assert validation_rows(TOKENS[:3], 6, 100).tolist() == [[0, 1, 2]]
    with pytest.raises(InputError, match="has 1 validation tokens, too few"):
        validation_rows(TOKENS[:1], 6, 100)
