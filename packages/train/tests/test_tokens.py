"""Encoded sources in the cache: found again, keyed by what they depend on, never half there."""

import dataclasses
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tilewright_train.cache import default_cache, writable_cache
from tilewright_train.config import DataOptions
from tilewright_train.errors import InputError
from tilewright_train.record_files import SkippedLines
from tilewright_train.records import Conversation, Record
from tilewright_train.samples import Encoded
from tilewright_train.sources import FileSource, Reading, open_source
from tilewright_train.split import is_validation
from tilewright_train.tokenizer import decode, load_tokenizer, train_tokenizer
from tilewright_train.tokens import Encoding, load, prepare, prepare_tokenizer

OPTIONS = DataOptions(validation_fraction=0.1)
TOKENIZER = train_tokenizer(["the cat sat on a red mat today"] * 9, 300)


def source_of(path: Path) -> FileSource:
    source = open_source(str(path))
    assert isinstance(source, FileSource)
    return source


@pytest.fixture
def source(corpus_file: Path) -> FileSource:
    return source_of(corpus_file)


def test_both_splits_hold_their_documents_each_with_an_end(
    source: FileSource, tmp_path: Path
) -> None:
    folder, was_there = prepare(source, OPTIONS, TOKENIZER, tmp_path / "cache")
    assert not was_there
    encoded = load(folder)
    reading = Reading(validation_fraction=0.1, on_bad_line="error", skipped=SkippedLines())
    documents = [str(text) for _, text in source.records("text", reading)]
    for samples, side in ((encoded.train, False), (encoded.validation, True)):
        assert samples.tokens.dtype == torch.int32
        text = decode(TOKENIZER, samples.tokens.tolist())
        expected = [d for d in documents if is_validation(d, 0.1) is side]
        assert text.split("<|endoftext|>")[:-1] == expected
        parts = samples.tokens.split(samples.lengths.tolist())
        assert [decode(TOKENIZER, part.tolist()) for part in parts] == [
            f"{text}<|endoftext|>" for text in expected
        ]
    assert encoded.facts.train_tokens == encoded.train.tokens.numel()
    assert encoded.facts.train_samples == encoded.train.ends.numel()


def test_an_entry_is_found_again_and_is_the_same_when_made_anew(
    source: FileSource, tmp_path: Path
) -> None:
    first, _ = prepare(source, OPTIONS, TOKENIZER, tmp_path / "one")
    assert prepare(source, OPTIONS, TOKENIZER, tmp_path / "one") == (first, True)
    second, was_there = prepare(source, OPTIONS, TOKENIZER, tmp_path / "two")
    assert (second.name, was_there) == (first.name, False)
    for file in first.iterdir():
        assert (second / file.name).read_bytes() == file.read_bytes(), file.name


def test_other_data_tokenizers_or_settings_make_another_entry(
    source: FileSource, corpus_file: Path, tmp_path: Path
) -> None:
    def entry(**changed: object) -> Path:
        values = {"source": source, "options": OPTIONS, "tokenizer": TOKENIZER} | changed
        folder, was_there = prepare(cache=tmp_path / "cache", **values)  # pyrefly: ignore
        assert not was_there
        return folder

    first = entry()
    corpus_file.write_text(corpus_file.read_text() + '{"text": "one more"}\n')
    others = {
        entry(source=source_of(corpus_file)),
        entry(tokenizer=train_tokenizer(["the cat"] * 9, 290)),
        entry(options=DataOptions(validation_fraction=0.2)),
        entry(options=dataclasses.replace(OPTIONS, on_bad_line="skip")),
        entry(encoding=Encoding(settings={"template": "a"})),
        entry(encoding=Encoding(settings={"template": "b"})),
    }
    assert len({first, *others}) == 7
    # What does not decide on the tokens makes none: the time of a file, how rows are made.
    os.utime(corpus_file)
    options = dataclasses.replace(OPTIONS, packing="best_fit", workers=3, weights=(2.0,))
    assert prepare(source_of(corpus_file), options, TOKENIZER, tmp_path / "cache")[1]


def test_the_vocabulary_is_trained_once_on_all_sources(corpus_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("zebra crossing\n" * 40)
    sources = [source_of(corpus_file), source_of(other)]
    both = prepare_tokenizer(sources, OPTIONS, 300, tmp_path / "cache")
    written = both.stat().st_mtime_ns
    assert prepare_tokenizer(sources, OPTIONS, 300, tmp_path / "cache") == both
    assert both.stat().st_mtime_ns == written
    assert len(load_tokenizer(both).encode("zebra crossing").ids) < 8
    entries = {
        both,
        prepare_tokenizer(sources[:1], OPTIONS, 300, tmp_path / "cache"),
        prepare_tokenizer(sources, OPTIONS, 290, tmp_path / "cache"),
        prepare_tokenizer(sources, DataOptions(), 300, tmp_path / "cache"),
    }
    assert len(entries) == 4
    both.write_text("{")
    assert prepare_tokenizer(sources, OPTIONS, 300, tmp_path / "cache") == both
    load_tokenizer(both)


def test_other_records_may_be_encoded_with_targets(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    line = '{"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant"%s}]}\n'
    path.write_text("".join(line % f', "content": "mat {i}"' for i in range(20)))

    def encoder(
        tokenizer: Tokenizer, records: Iterator[tuple[bool, Record]], counts: "Counter[str]"
    ) -> Iterator[Encoded]:
        for side, record in records:
            assert isinstance(record, Conversation)
            question, answer = (tokenizer.encode(m.content).ids for m in record.messages)
            counts["turns"] += len(record.messages)
            yield Encoded(side, question + answer, [0] * len(question) + [1] * len(answer))

    encoding = Encoding(kind="conversation", encoder=encoder)
    folder, _ = prepare(source_of(path), OPTIONS, TOKENIZER, tmp_path / "cache", encoding)
    encoded = load(folder)
    assert encoded.facts.train_samples == 18
    assert encoded.facts.counts == {"turns": 40}
    assert encoded.train.targets is not None
    predicted = encoded.train.tokens[encoded.train.targets.bool()]
    assert decode(TOKENIZER, predicted.tolist()) == "".join(f"mat {i}" for i in range(18))


@pytest.mark.parametrize("damage", ["short", "missing", "facts"])
def test_an_entry_that_is_not_whole_is_made_again(
    source: FileSource, tmp_path: Path, damage: str
) -> None:
    folder, _ = prepare(source, OPTIONS, TOKENIZER, tmp_path)
    before = (folder / "train.tokens.int32").read_bytes()
    if damage == "short":
        (folder / "train.tokens.int32").write_bytes(before[:-4])
    elif damage == "missing":
        (folder / "validation.ends.int64").unlink()
    else:
        (folder / "facts.json").write_text("{")
    assert prepare(source, OPTIONS, TOKENIZER, tmp_path) == (folder, False)
    assert (folder / "train.tokens.int32").read_bytes() == before
    assert not list(tmp_path.glob(".partial-*"))


def test_changed_tokens_are_noticed(source: FileSource, tmp_path: Path) -> None:
    folder, _ = prepare(source, OPTIONS, TOKENIZER, tmp_path)
    data = bytearray((folder / "train.tokens.int32").read_bytes())
    data[100] ^= 1
    (folder / "train.tokens.int32").write_bytes(data)
    with pytest.raises(InputError, match="is damaged: remove it"):
        load(folder)


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\nbad\n')
    for make in (
        lambda: prepare(source_of(path), OPTIONS, TOKENIZER, tmp_path / "cache"),
        lambda: prepare_tokenizer([source_of(path)], OPTIONS, 300, tmp_path / "cache"),
    ):
        with pytest.raises(InputError, match=r"bad\.jsonl:2 is not JSON"):
            make()
    assert not list((tmp_path / "cache").iterdir())


def test_a_full_disk_is_named_with_a_remedy(source: FileSource, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    message = r"/cache cannot be written \(.*ile too large\): make room"
    try:
        with pytest.raises(OSError, match=message):
            prepare(source, OPTIONS, TOKENIZER, tmp_path / "cache")
        with pytest.raises(OSError, match=message):
            prepare_tokenizer([source], OPTIONS, 300, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "cache").iterdir())


def test_skipped_lines_are_remembered_with_the_entry(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("bad\n" + '{"text": "good text\\nof two lines"}\n' * 9)
    options = dataclasses.replace(OPTIONS, on_bad_line="skip")
    for was_there in (False, True):
        folder, found = prepare(source_of(path), options, TOKENIZER, tmp_path / "cache")
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


_STREAMED = """
import resource, sys
from pathlib import Path
from tilewright_train.batches import BatchSampler, WindowRows
from tilewright_train.config import DataOptions
from tilewright_train.sources import open_source
from tilewright_train import tokenizer
from tilewright_train.tokens import load, prepare, prepare_tokenizer

tokenizer._BATCH = 1 << 16  # characters: what is in memory at once depends on this alone
path, limit = Path(sys.argv[1]), int(sys.argv[2])

def anonymous():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["VmData"].split()[0]) * 1024

# Everything that is mapped privately counts: allocations, threads, but not the mapped shards.
resource.setrlimit(resource.RLIMIT_DATA, (anonymous() + limit,) * 2)
source, options = open_source(str(path)), DataOptions()
file = prepare_tokenizer([source], options, 300, path.parent / "cache")
folder, _ = prepare(source, options, tokenizer.load_tokenizer(file), path.parent / "cache")
samples = load(folder).train
tokens = samples.tokens
rows = WindowRows(samples, seq_len=128, seed=0, document_mask=True)
assert BatchSampler(rows, batch_size=8).batch(3).targets > 8 * 120
print(path.stat().st_size, 4 * tokens.numel())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc and RLIMIT_DATA")
def test_a_file_larger_than_the_memory_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    line = '{"text": "%s"}\n' % ("the cat sat on a red mat today and tomorrow. " * 40)
    limit = 10_000_000
    with path.open("w") as stream:
        for number in range(limit // len(line) + 1):
            stream.write(line.replace("today", f"{number} days ago"))
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _STREAMED, str(path), str(limit)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    size, tokens = map(int, done.stdout.split())
    assert size > limit
    assert tokens > limit // 4
