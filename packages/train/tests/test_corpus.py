"""What a corpus holds, what identifies it, and a split that depends on the documents alone."""

import platform
from pathlib import Path

import pytest

from tilewright_train.corpus import is_validation, open_corpus, split, standard_library_files
from tilewright_train.documents import SkippedLines
from tilewright_train.errors import InputError

MANY = [f"document {i} " * (i % 7 + 1) for i in range(1000)]


def test_the_standard_library_is_sorted_and_has_no_tests() -> None:
    corpus = open_corpus("stdlib")
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
        return open_corpus(str(tmp_path / folder)).sha256

    first = corpus_hash("a", {"x.txt": "one", "y.txt": "two"})
    assert corpus_hash("b", {"x.txt": "one", "y.txt": "two"}) == first
    assert corpus_hash("c", {"x.txt": "one", "z.txt": "two"}) != first
    assert corpus_hash("d", {"x.txt": "onet", "y.txt": "wo"}) != first


def test_documents_come_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("plain")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    corpus = open_corpus(str(tmp_path))
    assert list(corpus.documents("error", SkippedLines())) == ["one", "two", "plain"]


def test_empty_files_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(InputError, match=r"a\.txt is empty"):
        open_corpus(str(tmp_path / "a.txt"))


def test_a_large_corpus_is_split_by_the_hash_of_each_document() -> None:
    marked = list(split(MANY, 0.1))
    assert [text for _, text in marked] == MANY
    assert marked == [(is_validation(text, 0.1), text) for text in MANY]
    assert 60 < sum(side for side, _ in marked) < 140
    # Neither order nor company matters.
    assert {t: s for s, t in split(reversed(MANY[:500]), 0.1)} == {
        text: side for side, text in marked[:500]
    }


def test_the_hash_does_not_depend_on_the_process() -> None:
    assert [i for i in range(60) if is_validation(f"document {i}", 0.1)] == [21, 22, 51, 55, 59]


@pytest.mark.parametrize("documents", [["a" * 95 + "\n" + "b" * 104], ["x" * 100] * 20])
def test_a_small_corpus_gives_its_last_part(documents: list[str]) -> None:
    marked = list(split(documents, 0.5))
    assert "".join(text for _, text in marked) == "".join(documents)
    sides = [side for side, _ in marked]
    assert sides == sorted(sides)
    held_out = "".join(text for side, text in marked if side)
    assert held_out == ("b" * 104 if len(documents) == 1 else "x" * 1000)


def test_a_side_without_text_is_an_error() -> None:
    with pytest.raises(InputError, match="no text is left for training"):
        list(split(["a"], 0.5))
    with pytest.raises(InputError, match="holds no text"):
        list(split([], 0.5))
    with pytest.raises(InputError, match="no text is left for validation"):
        list(split(["alike"] * 300, 0.1))
