"""The cache of encoded corpora: found again, keyed by what it depends on, never half there."""

import dataclasses
import resource
from pathlib import Path

import pytest
import torch

from tilewright_train.config import DataOptions
from tilewright_train.corpus import Corpus, is_validation, open_corpus
from tilewright_train.documents import SkippedLines
from tilewright_train.errors import InputError
from tilewright_train.tokenizer import decode
from tilewright_train.tokens import default_cache, load, prepare, writable_cache

OPTIONS = DataOptions(validation_fraction=0.1)


@pytest.fixture
def corpus(corpus_file: Path) -> Corpus:
    return open_corpus(str(corpus_file))


def test_both_splits_hold_their_documents_each_with_an_end(corpus: Corpus, tmp_path: Path) -> None:
    folder, was_there = prepare(corpus, OPTIONS, 300, tmp_path / "cache")
    assert not was_there
    tokens = load(folder)
    documents = list(corpus.documents("error", SkippedLines()))
    for split, side in ((tokens.train, False), (tokens.validation, True)):
        assert split.dtype == torch.int32
        text = decode(tokens.tokenizer, split.tolist())
        assert text.split("<|endoftext|>")[:-1] == [
            d for d in documents if is_validation(d, 0.1) is side
        ]
    assert tokens.facts.train_tokens == tokens.train.numel()
    assert tokens.facts.vocab_size == tokens.tokenizer.get_vocab_size()


def test_the_entry_is_found_again_and_is_the_same_when_made_anew(
    corpus: Corpus, tmp_path: Path
) -> None:
    first, _ = prepare(corpus, OPTIONS, 300, tmp_path / "one")
    assert prepare(corpus, OPTIONS, 300, tmp_path / "one") == (first, True)
    second, was_there = prepare(corpus, OPTIONS, 300, tmp_path / "two")
    assert (second.name, was_there) == (first.name, False)
    for file in first.iterdir():
        assert (second / file.name).read_bytes() == file.read_bytes(), file.name


def test_other_options_or_other_data_make_another_entry(corpus: Corpus, tmp_path: Path) -> None:
    changed = dataclasses.replace(corpus, sha256="0" * 64)
    entries = {
        prepare(corpus, OPTIONS, 300, tmp_path)[0],
        prepare(corpus, OPTIONS, 290, tmp_path)[0],
        prepare(corpus, DataOptions(validation_fraction=0.2), 300, tmp_path)[0],
        prepare(corpus, dataclasses.replace(OPTIONS, on_bad_line="skip"), 300, tmp_path)[0],
        prepare(changed, OPTIONS, 300, tmp_path)[0],
    }
    assert len(entries) == 5


@pytest.mark.parametrize("damage", ["short", "missing", "facts"])
def test_an_entry_that_is_not_whole_is_made_again(
    corpus: Corpus, tmp_path: Path, damage: str
) -> None:
    folder, _ = prepare(corpus, OPTIONS, 300, tmp_path)
    before = (folder / "train.int32").read_bytes()
    if damage == "short":
        (folder / "train.int32").write_bytes(before[:-4])
    elif damage == "missing":
        (folder / "validation.int32").unlink()
    else:
        (folder / "facts.json").write_text("{")
    assert prepare(corpus, OPTIONS, 300, tmp_path) == (folder, False)
    assert (folder / "train.int32").read_bytes() == before
    assert not list(tmp_path.glob(".partial-*"))


def test_changed_tokens_are_noticed(corpus: Corpus, tmp_path: Path) -> None:
    folder, _ = prepare(corpus, OPTIONS, 300, tmp_path)
    data = bytearray((folder / "train.int32").read_bytes())
    data[100] ^= 1
    (folder / "train.int32").write_bytes(data)
    with pytest.raises(InputError, match="is damaged: remove it"):
        load(folder)


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\nbad\n')
    with pytest.raises(InputError, match=r"bad\.jsonl:2 is not JSON"):
        prepare(open_corpus(str(path)), OPTIONS, 300, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("limit", [100, 20_000])
def test_a_full_disk_is_named_with_a_remedy(corpus: Corpus, tmp_path: Path, limit: int) -> None:
    """The tokenizer does not fit, or only the tokens do not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            OSError, match=r"/cache cannot be written \(.*ile too large\): make room"
        ):
            prepare(corpus, OPTIONS, 300, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "cache").iterdir())


def test_skipped_lines_are_remembered_with_the_entry(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("bad\n" + '{"text": "good text\\nof two lines"}\n' * 9)
    options = dataclasses.replace(OPTIONS, on_bad_line="skip")
    for was_there in (False, True):
        folder, found = prepare(open_corpus(str(path)), options, 300, tmp_path / "cache")
        facts = load(folder).facts
        assert found is was_there
        assert facts.skipped_lines == 1
        assert facts.skipped_examples[0].startswith(f"{path}:1 is not JSON")


def test_the_cache_is_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "tilewright"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "tilewright"


def test_a_cache_that_cannot_be_written_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert writable_cache(tmp_path / "file" / "cache", tmp_path / "other") == tmp_path / "other"
    assert writable_cache(tmp_path / "cache", tmp_path / "other") == tmp_path / "cache"
