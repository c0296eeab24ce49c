"""What a source holds and what identifies it."""

import platform
from pathlib import Path

import pytest

from tilewright_train.errors import InputError
from tilewright_train.record_files import SkippedLines
from tilewright_train.records import Conversation, Preference
from tilewright_train.sources import (
    FileSource,
    Reading,
    for_kind,
    open_source,
    standard_library_files,
)
from tilewright_train.split import is_validation
from tilewright_train.whole_sources import kind_of


def open_files(data: str) -> FileSource:
    source = open_source(data)
    assert isinstance(source, FileSource)
    return source


def reading(fraction: float = 0.5) -> Reading:
    return Reading(validation_fraction=fraction, on_bad_line="error", skipped=SkippedLines())


def test_the_standard_library_is_sorted_and_has_no_tests() -> None:
    corpus = open_files("stdlib")
    names = [file.relative_to(corpus.root).as_posix() for file in corpus.files]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any(set(name.split("/")[:-1]) & {"test", "tests", "idle_test"} for name in names)
    assert not any("site-packages" in name or "_sysconfigdata" in name for name in names)
    assert corpus.python_version == platform.python_version()
    assert corpus.size == sum(file.stat().st_size for file in corpus.files) > 1_000_000


def test_an_interpreter_without_sources_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").touch()
    with pytest.raises(InputError, match=r"holds no \.py files"):
        standard_library_files(tmp_path)


def test_the_hash_covers_names_and_bytes_but_not_the_place(tmp_path: Path) -> None:
    def corpus_hash(folder: str, files: dict[str, str]) -> str:
        for name, text in files.items():
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_text(text)
        return open_source(str(tmp_path / folder)).sha256

    first = corpus_hash("a", {"x.txt": "one", "y.txt": "two"})
    assert corpus_hash("b", {"x.txt": "one", "y.txt": "two"}) == first
    assert corpus_hash("c", {"x.txt": "one", "z.txt": "two"}) != first
    assert corpus_hash("d", {"x.txt": "onet", "y.txt": "wo"}) != first


def test_documents_come_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("plain")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    records = open_source(str(tmp_path)).records("text", reading())
    assert [text for _, text in records] == ["one", "two", "plain"]


def test_files_are_split_by_hash(tmp_path: Path) -> None:
    lines = [f"line {i}" for i in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    records = list(open_source(str(tmp_path)).records("text", reading(0.1)))
    assert records == [(is_validation(line, 0.1), line) for line in lines]


def test_conversations_and_pairs_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    turn = '[{"role": "user", "content": "%d"}]'
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"messages": {turn % i}, "chosen": "{i}", "rejected": "-"}}\n' for i in range(4))
    )
    source = open_source(str(tmp_path))
    for kind, cls in (("conversation", Conversation), ("preference", Preference)):
        records = list(source.records(kind, reading()))
        assert [type(record) for _, record in records] == [cls] * 4
        assert [side for side, _ in records] == [False, False, True, True]


def test_the_kind_is_that_of_the_first_line_that_is_not_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{\n{"messages": [{"role": "user", "content": "a"}]}\n')
    source = open_source(str(path))
    assert kind_of(source, "text", "skip") == "conversation"
    path.write_text("{\n")
    for on_bad_line in ("error", "skip"):
        with pytest.raises(InputError, match=r"a\.jsonl:1 is not JSON"):
            kind_of(source, "text", on_bad_line)


def test_plain_text_beside_records_is_left_out_of_a_folder(tmp_path: Path) -> None:
    """A README.md lies beside most data sets."""
    messages = '{"messages": [{"role": "user", "content": "%d"}]}\n'
    (tmp_path / "train.jsonl").write_text("".join(messages % i for i in range(9)))
    alone = open_source(str(tmp_path))
    (tmp_path / "README.md").write_text("Nine conversations.")
    whole = open_source(str(tmp_path))
    assert for_kind(whole, "text") is whole
    for kind in ("conversation", "preference"):
        source = for_kind(whole, kind)
        assert (source.sha256, source.size) == (alone.sha256, alone.size)
        assert source.describe().endswith("1 file, 0.0 MB, 1 others left out")
    assert len(list(for_kind(whole, "conversation").records("conversation", reading()))) == 9
    assert kind_of(whole, "text") == "conversation"
    (tmp_path / "train.jsonl").unlink()
    only = for_kind(open_source(str(tmp_path)), "conversation")
    with pytest.raises(InputError, match=r"README\.md is read as plain text, which"):
        list(only.records("conversation", reading()))


def test_empty_files_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(InputError, match=r"a\.txt is empty"):
        open_source(str(tmp_path / "a.txt"))
