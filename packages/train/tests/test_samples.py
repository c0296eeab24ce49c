"""Shards: what is written comes back, mapped, in parts and with targets."""

from pathlib import Path

import pytest
import torch

from tilewright_train import samples
from tilewright_train.samples import (
    Encoded,
    have_sizes,
    open_samples,
    sha256_of,
    targets_before,
    write_samples,
)


def test_samples_come_back_with_their_ends_and_targets(tmp_path: Path) -> None:
    counts = write_samples(
        [
            Encoded(False, [1, 2], [0, 1], is_last=False),
            Encoded(False, [3], [1]),
            Encoded(True, [9], [1]),
            Encoded(False, [4, 5], [0, 1]),
        ],
        tmp_path,
    )
    assert counts == {
        "train_tokens": 5, "train_samples": 2, "validation_tokens": 1, "validation_samples": 1,
    }  # fmt: skip
    train = open_samples(tmp_path, "train")
    assert train.tokens.tolist() == [1, 2, 3, 4, 5]
    assert train.tokens.dtype == torch.int32
    assert train.ends.tolist() == [3, 5]
    assert train.lengths.tolist() == [3, 2]
    assert train.targets is not None
    assert train.targets.tolist() == [0, 1, 1, 0, 1]
    assert have_sizes(tmp_path, counts)


def test_texts_have_no_targets_and_a_side_may_be_empty(tmp_path: Path) -> None:
    counts = write_samples([Encoded(False, [1, 2])], tmp_path)
    assert open_samples(tmp_path, "train").targets is None
    assert open_samples(tmp_path, "validation").tokens.numel() == 0
    assert have_sizes(tmp_path, counts)


@pytest.mark.parametrize("file", ["train.tokens.int32", "train.ends.int64", "train.targets.uint8"])
def test_a_file_of_another_size_or_content_is_noticed(tmp_path: Path, file: str) -> None:
    counts = write_samples([Encoded(False, [1, 2], [0, 1])], tmp_path)
    before = sha256_of(tmp_path)
    data = bytearray((tmp_path / file).read_bytes())
    data[0] ^= 1
    (tmp_path / file).write_bytes(data)
    assert have_sizes(tmp_path, counts)
    assert sha256_of(tmp_path) != before
    (tmp_path / file).write_bytes(data[:-1])
    assert not have_sizes(tmp_path, counts)


def test_targets_are_counted_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    targets = torch.randint(2, (101,), dtype=torch.uint8)
    places = torch.tensor([0, 0, 1, 9, 10, 11, 20, 20, 57, 100, 101, 101])
    expected = [int(targets[:place].sum()) for place in places]
    for at_once in (1, 10, 101, 1000):  # parts that end at a place, before it, with the split
        monkeypatch.setattr(samples, "_COUNTED", at_once)
        assert targets_before(targets, places).tolist() == expected
