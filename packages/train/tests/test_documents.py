"""jsonl and text, plain and gzipped; what cannot be read is named with file and line."""

import gzip
import json
from pathlib import Path
from typing import Literal

import pytest

from tilewright_train.documents import SkippedLines, find_files, read_documents
from tilewright_train.errors import InputError

GOOD = '{"text": "one"}\n\n{"text": "", "id": 1}\n{"text": "two\\nlines", "id": 2}\n'


def read(
    path: Path, on_bad_line: Literal["error", "skip"] = "error"
) -> tuple[list[str], SkippedLines]:
    skipped = SkippedLines()
    return list(read_documents(path, on_bad_line, skipped)), skipped


def write(path: Path, data: bytes | str) -> Path:
    data = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "A.JSONL"])
def test_jsonl_gives_the_texts_in_order_without_empty_ones(tmp_path: Path, name: str) -> None:
    assert read(write(tmp_path / name, GOOD))[0] == ["one", "two\nlines"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a", "a.weird"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    assert read(write(tmp_path / name, "\ufeffé\nb"))[0] == ["é\nb"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'text': 1}", r"is not JSON \(Expecting property name"),
        ('"text"', 'is JSON, but not an object with a "text"'),
        ('{"txt": "x"}', r'has no "text" \(its keys: txt\)'),
        ('{"text": 3}', 'has a "text" that is not a string'),
        ("[" * 100_000, "is not JSON"),
        ('{"text": "x", "id": ' + "9" * 4301 + "}", "holds a number that is too long"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", GOOD + line + "\n" + GOOD)
    with pytest.raises(InputError, match=reason) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:5 ")
    assert "--on-bad-line skip" in str(caught.value)


def test_bad_lines_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "".join(f"bad\n{GOOD}" for _ in range(5)))
    texts, skipped = read(path, "skip")
    assert texts == ["one", "two\nlines"] * 5
    assert skipped.count == 5
    assert len(skipped.examples) == 3
    assert skipped.examples[1].startswith(f"{path}:6 is not JSON")


def test_a_number_that_is_too_long_can_be_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "x", "id": ' + "9" * 4301 + "}\n" + GOOD)
    texts, skipped = read(path, "skip")
    assert (texts, skipped.count) == (["one", "two\nlines"], 1)


def test_half_a_surrogate_pair_becomes_a_character_that_utf8_has(tmp_path: Path) -> None:
    (text,), _ = read(write(tmp_path / "a.jsonl", '{"text": "a\\ud800b \\ud83d\\ude00"}'))
    assert text == "a\ufffdb \U0001f600"
    text.encode()


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.txt:2 is not UTF-8 text \(byte 5\)"):
        read(write(tmp_path / "a.txt", b"fine\n\xff\nfine\n"))
    with pytest.raises(InputError, match=r"a\.jsonl:2 is not UTF-8 text"):
        read(write(tmp_path / "a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n'))


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(GOOD.encode() * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "plain.jsonl.gz").write_bytes(GOOD.encode())
    for name in ("cut", "plain"):
        with pytest.raises(InputError, match=rf"{name}\.jsonl\.gz is damaged after line \d+"):
            read(tmp_path / f"{name}.jsonl.gz")


def test_a_folder_is_searched_in_sorted_order_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.jsonl", "a/y.txt.gz", "c.png", ".hidden/x.txt", ".x.txt", "d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files, left_out = find_files(tmp_path)
    assert [f.relative_to(tmp_path).as_posix() for f in files] == [
        "a/y.txt.gz", "a/z.jsonl", "b.txt", "d.md",
    ]  # fmt: skip
    assert left_out == [tmp_path / "c.png"]


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        find_files(tmp_path / "no")
    with pytest.raises(InputError, match=r"holds no file that ends in \.jsonl"):
        find_files(tmp_path)


def test_all_of_json_is_read(tmp_path: Path) -> None:
    texts = ["tab\t", 'quote"', "\u2028", "\x00", "日本"]
    lines = "".join(
        json.dumps({"text": t}, ensure_ascii=i % 2 == 0) + "\n" for i, t in enumerate(texts)
    )
    assert read(write(tmp_path / "a.jsonl", lines))[0] == texts
