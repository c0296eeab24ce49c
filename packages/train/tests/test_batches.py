"""Batches: a pure function of seed and step, shared by ranks, every token once an epoch."""

import pickle
from pathlib import Path

import pytest
import torch

from tilewright_train.batches import (
    IGNORE_INDEX,
    Batch,
    BatchSampler,
    MixedRows,
    PlannedRows,
    WindowRows,
    assemble,
    join,
)
from tilewright_train.errors import InputError
from tilewright_train.packing import plan_rows
from tilewright_train.samples import Encoded, Samples, open_samples, write_samples

TOKENS = torch.arange(101, dtype=torch.int32)
END = 0


def windows(tokens: torch.Tensor = TOKENS, *, seq_len: int = 6, seed: int | None = 0) -> WindowRows:
    samples = Samples(tokens, torch.tensor([tokens.numel()]))
    return WindowRows(samples, seq_len=seq_len, seed=seed, document_mask=False)


def sampler(*, rank: int = 0, world_size: int = 1, seq_len: int = 6, seed: int = 0) -> BatchSampler:
    rows = windows(seq_len=seq_len, seed=seed)
    return BatchSampler(rows, batch_size=4, rank=rank, world_size=world_size)


def assert_equal(one: Batch, other: Batch) -> None:
    assert vars(one).keys() == vars(other).keys()
    for name, value in vars(one).items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, getattr(other, name)), name


def documents(lengths: list[int]) -> Samples:
    """Texts of tokens 1, 2, … with the end token behind each."""
    tokens = [t for n in lengths for t in (*range(1, n), END)]
    return Samples(torch.tensor(tokens, dtype=torch.int32), torch.tensor(lengths).cumsum(0))


def planned(samples: Samples, seq_len: int = 8, *, seed: int | None = 0) -> PlannedRows:
    plan = plan_rows(samples, seq_len, pack=True)
    return PlannedRows(samples, plan, seed=seed, padding=END)


def test_the_same_step_gives_the_same_rows_whatever_was_asked_before() -> None:
    one, other = sampler(), sampler()
    expected = [one.batch(step).input_ids for step in range(12)]
    for step in (11, 3, 7, 3, 0):
        torch.testing.assert_close(other.batch(step).input_ids, expected[step], rtol=0, atol=0)
    assert expected[0].shape == (4, 6)
    assert expected[0].dtype == torch.int64


def test_another_seed_gives_another_order() -> None:
    assert not torch.equal(sampler(seed=1).batch(0).input_ids, sampler(seed=0).batch(0).input_ids)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_and_micro_batches_share_the_rows_of_one_batch(world_size: int) -> None:
    for step in (0, 9):
        whole = sampler().batch(step)
        shares = [sampler(rank=r, world_size=world_size).batch(step) for r in range(world_size)]
        assert_equal(join(shares), whole)
        assert_equal(join([sampler().batch(step, p, world_size) for p in range(world_size)]), whole)
        assert sampler(world_size=world_size).targets(step) == whole.targets == 20


def test_an_epoch_predicts_every_token_once() -> None:
    # 101 tokens are 20 windows of 5 predictions, and one token that this epoch leaves out.
    one = sampler()
    for first in (0, 5):
        rows = torch.cat([one.batch(step).labels for step in range(first, first + 5)])
        predicted = rows[rows != IGNORE_INDEX]
        assert predicted.unique().numel() == predicted.numel() == 100
    assert one.rows.count == 20
    assert one.epochs(10) == 2.0


def test_windows_are_consecutive_tokens_on_a_ring() -> None:
    rows = torch.cat([sampler().batch(step).input_ids for step in range(5)])
    assert torch.equal(rows.diff(dim=1) % 101, torch.ones(20, 5, dtype=torch.int64))


def test_epochs_differ_in_order_and_in_where_windows_begin() -> None:
    first, second = (
        torch.cat([sampler().batch(s).input_ids for s in e]) for e in (range(5), range(5, 10))
    )
    assert set(first[:, 0].tolist()) != set(second[:, 0].tolist())
    assert not torch.equal(first.diff(dim=0)[:, 0], second.diff(dim=0)[:, 0])


def test_too_few_tokens_or_uneven_shares_are_errors() -> None:
    assert sampler(seq_len=101).batch(0).input_ids.shape == (4, 101)
    with pytest.raises(InputError, match="has 101 training tokens, fewer than one sequence of 102"):
        sampler(seq_len=102)
    with pytest.raises(InputError, match="batch_size 4 is not a multiple of the 3 processes"):
        sampler(world_size=3)
    with pytest.raises(InputError, match="the 2 rows of a process are not a multiple of 4 micro"):
        sampler(world_size=2).batch(0, 0, 4)


def test_with_a_document_mask_each_document_is_a_segment() -> None:
    rows = WindowRows(documents([4, 3, 5]), seq_len=6, seed=None, document_mask=True)
    batch = rows.read([0, 1])
    # The end token is the last thing a document predicts; again, it is what the next begins with.
    assert batch.input_ids.tolist() == [[0, 1, 2, 3, 0, 0], [0, 1, 2, 0, 0, 1]]
    assert batch.labels.tolist() == [[-100, 1, 2, 3, 0, -100], [-100, 1, 2, 0, -100, 1]]
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 5, 6, 10, 12]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 0, 1]]
    assert batch.targets == 8
    assert batch.inputs["input_ids"].shape == (1, 12)
    assert batch.inputs["max_seqlen"] == 6


def test_an_epoch_of_masked_windows_predicts_every_token_once() -> None:
    # 67 tokens and 8 that begin a document are 15 windows of 5, and nothing is left out.
    samples = documents([3, 30, 1, 7, 7, 2, 12, 5])
    rows = WindowRows(samples, seq_len=6, seed=0, document_mask=True)
    assert rows.count == 15
    for epoch in range(4):  # each starts elsewhere, some inside a document
        numbers = range(epoch * 15, (epoch + 1) * 15)
        batch = rows.read(numbers)
        predicted = batch.labels[batch.labels != IGNORE_INDEX]
        assert predicted.sort().values.tolist() == samples.tokens.sort().values.tolist()
        assert batch.targets == rows.targets(numbers) == 67
        assert [rows.targets([n]) for n in numbers] == [
            int((row != IGNORE_INDEX).sum()) for row in batch.labels
        ]


def test_packed_documents_begin_with_the_separator_and_are_not_predicted_across() -> None:
    rows = planned(documents([4, 3, 5]), seed=None)
    batch = rows.read([0, 1, 2])
    assert batch.input_ids[0].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert batch.labels[0].tolist() == [-100, 1, 2, 3, 4, 0, -100, -100]
    assert batch.targets == int((batch.labels != IGNORE_INDEX).sum()) == 12
    assert rows.targets([0, 1, 2]) == 12
    assert batch.tokens == 15


def test_an_epoch_of_packed_rows_predicts_every_token_once() -> None:
    samples = documents([3, 30, 1, 7, 7, 2, 12, 5])
    rows = planned(samples)
    for epoch in (0, 1):
        numbers = range(epoch * rows.count, (epoch + 1) * rows.count)
        batch = rows.read(numbers)
        predicted = batch.labels[batch.labels != IGNORE_INDEX]
        assert predicted.sort().values.tolist() == samples.tokens.sort().values.tolist()
        assert batch.targets == rows.targets(numbers) == 67
    assert not torch.equal(rows.read([0, 1, 2]).labels, rows.read(range(12, 15)).labels)


def test_targets_alone_are_predicted_and_padding_is_a_segment() -> None:
    samples = Samples(
        torch.tensor([5, 6, 7, 8, 9], dtype=torch.int32),
        torch.tensor([3, 5]),
        torch.tensor([0, 0, 1, 1, 1], dtype=torch.uint8),
    )
    batch = planned(samples, 6, seed=None).read([0])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 0]]
    assert batch.labels.tolist() == [[-100, -100, 7, -100, 9, -100]]
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert (batch.targets, batch.tokens) == (2, 5)


def test_rows_without_a_piece_are_padding() -> None:
    samples = documents([3])
    starts, lengths = torch.tensor([0]), torch.tensor([3])
    batch = assemble(samples, starts, lengths, torch.tensor([1]), shape=(2, 4), padding=9)
    assert batch.input_ids.tolist() == [[9, 9, 9, 9], [1, 2, 0, 9]]
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 8]


def test_a_mixture_keeps_its_proportions_and_every_part_its_order() -> None:
    parts = [windows(torch.arange(k, k + 400, dtype=torch.int32)) for k in (0, 1000, 2000)]
    rows = MixedRows(parts, [5, 3, 2], seed=0)
    batch = rows.read(range(1000))
    source = batch.input_ids[:, 0] // 1000
    assert source.bincount().tolist() == [500, 300, 200]
    early = rows.read(range(100)).input_ids[:, 0] // 1000
    assert (early.bincount() - torch.tensor([50, 30, 20])).abs().max() < 15
    # Each part is read in its own order, whatever lies between its rows.
    assert torch.equal(batch.input_ids[source == 1], parts[1].read(range(300)).input_ids)
    later = rows.read(range(1000, 2000)).input_ids
    assert torch.equal(later[later[:, 0] // 1000 == 2], parts[2].read(range(200, 400)).input_ids)
    assert rows.targets(range(1000)) == batch.targets == 5000


def test_a_mixture_may_hold_packed_and_whole_rows() -> None:
    rows = MixedRows([windows(), planned(documents([2, 1, 5]), 6)], [1, 1], seed=0)
    whole = rows.read(range(8))
    assert whole.cu_seqlens is not None
    lengths = whole.cu_seqlens.diff()
    assert int(lengths.sum()) == 48
    assert int(lengths.max()) == 6
    shares = [rows.read(range(4)), rows.read(range(4, 8))]
    assert sum(share.targets for share in shares) == whole.targets


def test_a_share_below_a_thousandth_is_refused() -> None:
    with pytest.raises(InputError, match=r"weight 0\.0001 is less than a thousandth of all"):
        MixedRows([windows(), windows()], [1, 0.0001], seed=0)


def test_another_process_maps_the_same_rows(tmp_path: Path) -> None:
    write_samples([Encoded(False, range(1, 50), [1] * 49), Encoded(True, [1, 2], [0, 1])], tmp_path)
    rows = planned(open_samples(tmp_path, "train"), 60)
    copy = pickle.loads(pickle.dumps(rows))
    assert_equal(rows.read([0]), copy.read([0]))
    assert len(pickle.dumps(rows._samples)) < 400  # a place, not the tokens
