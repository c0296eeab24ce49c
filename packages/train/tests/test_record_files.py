"""jsonl, parquet and text, plain and packed; what cannot be read is named with file and line."""

import gzip
import json
import random
import sys
import tracemalloc
from pathlib import Path
from typing import Literal

import pytest

from tilewright_train.errors import InputError
from tilewright_train.record_files import SkippedLines, find_files, read_records
from tilewright_train.records import Conversation, Kind, Message, Record

GOOD = '{"text": "one"}\n\n{"text": "", "id": 1}\n{"text": "two\\nlines", "id": 2}\n'


def read(
    path: Path, on_bad_line: Literal["error", "skip"] = "error", kind: Kind = "text"
) -> tuple[list[Record], SkippedLines]:
    skipped = SkippedLines()
    return list(read_records(path, kind, on_bad_line, skipped)), skipped


def packed(path: Path, data: bytes) -> bytes:
    if path.suffix == ".zst":
        return pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    return gzip.compress(data) if path.suffix == ".gz" else data


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(packed(path, data.encode() if isinstance(data, str) else data))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "A.JSONL"])
def test_jsonl_gives_the_texts_in_order_without_empty_ones(tmp_path: Path, name: str) -> None:
    assert read(write(tmp_path / name, GOOD))[0] == ["one", "two\nlines"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a", "a.weird"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    assert read(write(tmp_path / name, "\ufeffé\nb"))[0] == ["é\nb"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'text': 1}", r"is not JSON \(Expecting property name"),
        ('"text"', 'is JSON, but not an object with a "text"'),
        ('{"txt": "x"}', r'has no "text" \(its keys: txt\)'),
        ('{"text": "a\x00b"}', r"is not JSON \(Invalid control character at, column 12\)"),
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
    for name in (
        "b.txt",
        "a/z.jsonl",
        "a/y.txt.gz",
        "a/x.parquet",
        "e.jsonl.zst",
        "c.png",
        ".hidden/x.txt",
        ".x.txt",
        "d.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files, left_out = find_files(tmp_path)
    assert [f.relative_to(tmp_path).as_posix() for f in files] == [
        "a/x.parquet", "a/y.txt.gz", "a/z.jsonl", "b.txt", "d.md", "e.jsonl.zst",
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


def test_line_ends_and_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n"))[0] == ["one\ntwo\n"]
    for blank in (b"", b"\r\n", b" \n\n"):
        path = write(tmp_path / "b.jsonl", b"\xef\xbb\xbf" + blank + b'{"text": "one"}\n')
        assert read(path)[0] == ["one"]
    lines = b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two\\r\\n"}\r\n'
    assert read(write(tmp_path / "a.jsonl", lines))[0] == ["one", "two\r\n"]


def test_a_nul_byte_in_plain_text_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.txt:2 holds a NUL byte.*: convert it"):
        read(write(tmp_path / "a.txt", b"fine\nno\0t\n"))


def test_a_line_of_ten_megabytes_is_read(tmp_path: Path) -> None:
    long = "word " * 2_000_000
    path = write(tmp_path / "a.jsonl", json.dumps({"text": long}) + "\n" + GOOD)
    assert read(path)[0] == [long, "one", "two\nlines"]


def test_a_line_beyond_the_limit_is_not_taken_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tilewright_train.record_files.LINE_LIMIT", 1 << 20)
    path = write(tmp_path / "a.jsonl", GOOD + '{"text": "' + "x" * 3_500_000 + '"}\n' + GOOD)
    with pytest.raises(InputError, match=r"a\.jsonl:5 is longer than 1 MiB: mend it, or skip"):
        read(path)
    texts, skipped = read(path, "skip")
    assert texts == ["one", "two\nlines"] * 2
    assert skipped.examples == [f"{path}:5 is longer than 1 MiB"]


def test_bad_conversations_are_named_with_file_and_line(tmp_path: Path) -> None:
    lines = '{"messages": []}\n{"messages": [{"role": "user", "content": "hi"}]}\n'
    path = write(tmp_path / "a.jsonl", lines)
    with pytest.raises(InputError, match=r'a\.jsonl:1 has "messages" without a message: mend it'):
        read(path, kind="conversation")
    records, skipped = read(path, "skip", "conversation")
    assert records == [Conversation((Message("user", "hi"),))]
    assert skipped.count == 1


def test_plain_text_holds_no_conversations(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"is read as plain text, which holds no conversation: give --data \.jsonl"
    ):
        read(write(tmp_path / "a.txt", "hi"), kind="conversation")


def test_a_zstd_file_of_several_frames_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packed(path, GOOD.encode()) + packed(path, b"") + packed(path, GOOD.encode()))
    assert read(path)[0] == ["one", "two\nlines"] * 2


def test_what_unpacks_to_far_more_than_it_is_stays_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of 131 MB in 4 KB."""
    pytest.importorskip("zstandard")
    monkeypatch.setattr("tilewright_train.record_files.LINE_LIMIT", 1 << 20)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(repeated(b"a", 1000) + packed(path, b"\n" + GOOD.encode()))
    tracemalloc.start()
    texts, skipped = read(path, "skip")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert texts == ["one", "two\nlines"]
    assert skipped.examples == [f"{path}:1 is longer than 1 MiB"]
    assert 1e6 < peak < 40e6


@pytest.mark.parametrize("name", ["a.txt.zst", "a.md.gz"])
def test_packed_text_that_is_far_larger_than_its_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("tilewright_train.record_files.LINE_LIMIT", 3 << 20)
    pytest.importorskip("zstandard")
    path = tmp_path / name
    path.write_bytes(repeated(b"a", 40) if name.endswith(".zst") else gzip.compress(bytes(5 << 20)))
    with pytest.raises(InputError, match=rf"{name} unpacks to more than 3 MiB, 100 times its size"):
        read(path)
    # What is not so much smaller packed is one document, however long its lines are.
    text = random.Random(0).randbytes(2 << 20).hex()
    assert read(write(path, text)) == ([text], SkippedLines())


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_text_of_short_lines_takes_no_more_memory_than_one_of_long_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A `bytes` a line would be 146 MB of these 8, which are 2 KB as .zst."""
    text = "a\n" * (4 << 20)
    path = write(tmp_path / name, text)
    tracemalloc.start()
    texts, _ = read(path)
    _, peak = tracemalloc.get_traced_memory()
    assert texts == [text]
    assert peak < 60e6  # the bytes, the text, and of .zst two pieces of 8 MB
    # Beyond the bound, of lines all the same, it is refused as soon as that is known.
    monkeypatch.setattr("tilewright_train.record_files.LINE_LIMIT", 3 << 20)
    if name != "a.txt":
        tracemalloc.reset_peak()
        with pytest.raises(InputError, match=rf"{name} unpacks to more than 3 MiB, 100 times its"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 60e6
    tracemalloc.stop()


def test_a_zstd_file_that_asks_for_a_large_window_is_refused(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    options = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=False)
    packer = zstandard.ZstdCompressor(compression_params=options).compressobj()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packer.compress(GOOD.encode()) + packer.flush())
    with pytest.raises(InputError, match=r"takes more than 128 MiB to unpack: pack it again"):
        read(path)


def repeated(byte: bytes, blocks: int) -> bytes:
    """A frame of zstd: so many blocks of 128 KiB that repeat one byte, 4 bytes each."""
    sizes = ((1 << 17) << 3 | 1 << 1 | (number == blocks - 1) for number in range(blocks))
    return b"\x28\xb5\x2f\xfd\x00\x38" + b"".join(s.to_bytes(3, "little") + byte for s in sizes)


def test_a_damaged_zstd_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    whole = packed(path, GOOD.encode() * 1000)
    for data in (whole[:-5], whole[:-3] + b"abc", GOOD.encode()):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"a\.jsonl\.zst is damaged"):
            read(path)


def test_parquet_gives_its_rows_and_names_bad_ones(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def table(name: str, **columns: list) -> Path:
        parquet.write_table(pyarrow.table(columns), tmp_path / name, row_group_size=300)
        return tmp_path / name

    texts = [f"text {i}" for i in range(700)]
    assert read(table("a.parquet", text=texts, id=list(range(700))))[0] == texts
    path = table("b.parquet", text=["one", None, "", "two"])
    with pytest.raises(InputError, match=r"b\.parquet:2 has no \"text\" \(its keys: none\): mend"):
        read(path)
    assert read(path, "skip")[0] == ["one", "two"]
    turns = [[{"role": "user", "content": f"{i}"}] for i in range(3)]
    records, _ = read(table("c.parquet", messages=turns), kind="conversation")
    assert records == [Conversation((Message("user", f"{i}"),)) for i in range(3)]
    (tmp_path / "d.parquet").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"d\.parquet is damaged after row 0"):
        read(tmp_path / "d.parquet")


@pytest.mark.parametrize(
    ("module", "name"), [("pyarrow", "a.parquet"), ("zstandard", "a.jsonl.zst")]
)
def test_a_module_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    for missing in (module, "compression"):
        monkeypatch.setitem(sys.modules, missing, None)
    (tmp_path / name).touch()
    with pytest.raises(
        InputError, match=rf"install {module}, as in pip install \"tilewright-train"
    ):
        read(tmp_path / name)
