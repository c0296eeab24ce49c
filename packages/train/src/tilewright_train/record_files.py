"""Records from files: jsonl, parquet and plain text, the first and last also as .gz or .zst.

A plain text file is one document; a line of jsonl or a row of parquet is one record. Files are read
a line, or a batch of rows, at a time. Whatever cannot be read is an `InputError` that names the
file and the line; lines and rows that are no record may be skipped and counted instead.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tilewright_train.errors import InputError
from tilewright_train.records import Kind, Record, parse_record
from tilewright_train.zstd import open_zstd

TEXT_ENDINGS = (".txt", ".md", ".rst", ".py")
"""What counts as plain text in a folder. A file that is named itself may end in anything."""

LINE_LIMIT = 1 << 28
"""Bytes that a line of jsonl may have, 256 MiB: its record has to fit in memory. Packed plain text,
which is one record too, may have more if its file is not far smaller."""

_PACKED = (".gz", ".zst")
_REMEDY = 'mend it, or skip such lines with "--on-bad-line skip"'
_ROWS, _ROW_BYTES = 256, 1 << 24  # of parquet that are in memory at once
_PIECE = 1 << 20  # bytes at a time, of plain text and of the rest of a line that is too long
_DENSEST = 100  # times its packed size; zstd -19 packs this library's own texts 5 times
_DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)
_COLUMNS = ("text", "messages", "conversations", "prompt", "chosen", "rejected")


@dataclass
class SkippedLines:
    """The lines of jsonl and rows of parquet that were skipped."""

    count: int = 0
    """All of them."""
    examples: list[str] = field(default_factory=list)
    """«file:line reason» of the first three."""

    def add(self, place: str) -> None:
        """Count one more line."""
        self.count += 1
        if len(self.examples) < 3:
            self.examples.append(place)


def find_files(path: Path) -> tuple[list[Path], list[Path]]:
    """The files of records at `path`, and those in the folder that are none.

    Args:
        path: A file, or a folder that is searched through all its subfolders. Names that begin
            with a dot are passed over.

    Returns:
        Files to read and files left out, each sorted by path.

    Raises:
        InputError: Nothing there, or a folder without a file to read.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist: give --data a file or a folder")
    if path.is_file():
        return [path], []
    inside = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    files = [path / f for f in sorted(inside) if not any(part.startswith(".") for part in f.parts)]
    read = [file for file in files if _ending(file) in (".jsonl", ".parquet", *TEXT_ENDINGS)]
    if not read:
        endings = ", ".join((".jsonl", ".parquet", *TEXT_ENDINGS))
        raise InputError(f"{path} holds no file that ends in {endings} (or .gz or .zst after that)")
    return read, [file for file in files if file not in set(read)]


def is_plain_text(file: Path) -> bool:
    """Whether `read_records` takes a file for one document."""
    return _ending(file) not in (".jsonl", ".parquet")


def read_records(
    file: Path, kind: Kind, on_bad_line: Literal["error", "skip"], skipped: SkippedLines
) -> Iterator[Record]:
    """The records of one file, in order; empty texts are left out.

    Args:
        file: jsonl or parquet where its name says so, else plain text; UTF-8. A byte-order mark is
            dropped, and plain text ends its lines with a line feed whatever the file does.
        kind: What a record has to be. Plain text holds no conversations and no preference pairs.
        on_bad_line: What to do with a line or row that is no such record.
        skipped: Counts the lines that were skipped.

    Raises:
        InputError: A bad line, text that is not UTF-8 or holds a NUL byte, a damaged archive, a
            module that reads the file is not installed.
    """
    if is_plain_text(file):
        if kind != "text":
            raise InputError(
                f"{file} is read as plain text, which holds no {kind}: give --data .jsonl, an"
                " object a line, or .parquet (of one JSON array, jq -c '.[]' makes lines)"
            )
        text = _plain_text(file)
        if text:
            yield text
        return
    rows = _parquet_rows(file) if _ending(file) == ".parquet" else _json_lines(file)
    for place, row in rows:
        try:
            record = _parse(row, kind, place)
        except InputError as error:
            if on_bad_line == "error":
                raise InputError(f"{error}: {_REMEDY}") from None
            skipped.add(str(error))
            continue
        if record != "":
            yield record


def _parse(row: bytes | dict[str, Any], kind: Kind, place: str) -> Record:
    value = _json(row, place) if isinstance(row, bytes) else row
    try:
        return parse_record(value, kind)
    except InputError as error:
        raise InputError(f"{place} {error}") from None


def _json(line: bytes, place: str) -> Any:
    if len(line) > LINE_LIMIT:
        raise InputError(f"{place} is longer than {LINE_LIMIT >> 20} MiB")
    try:
        return json.loads(_decode(line, place))
    except json.JSONDecodeError as error:
        raise InputError(f"{place} is not JSON ({error.msg}, column {error.colno})") from None
    except ValueError as error:
        # What int() refuses: more digits than sys.get_int_max_str_digits(), 4,300.
        if isinstance(error, InputError):
            raise
        raise InputError(f"{place} holds a number that is too long") from None
    except RecursionError:
        raise InputError(f"{place} is not JSON that can be read (nested too deeply)") from None


def _plain_text(file: Path) -> str:
    most = max(LINE_LIMIT, _DENSEST * file.stat().st_size)
    data = _unpacked(file, most)
    if (at := data.find(b"\0")) >= 0:
        line = data.count(b"\n", 0, at) + 1
        raise InputError(
            f"{file}:{line} holds a NUL byte, so it is no UTF-8 text (UTF-16 or binary?): convert"
            " it, or leave it out"
        )
    return _decode(data, str(file)).replace("\r\n", "\n")


def _json_lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """(place, line) of every line that is not blank."""
    for number, line in enumerate(_lines(file), start=1):
        if line.removeprefix(codecs.BOM_UTF8).strip():
            yield f"{file}:{number}", line


def _parquet_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every row; only the columns that records are made of are read."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(
            f'{file} is parquet: install pyarrow, as in pip install "tilewright-train[parquet]"'
        ) from None
    number = 0
    try:
        # Mapped: read, a group of rows would be in memory as a whole, and a file may be one group.
        with parquet.ParquetFile(file, memory_map=True) as table:
            columns = [name for name in table.schema_arrow.names if name in _COLUMNS]
            for batch in table.iter_batches(batch_size=_rows(table.metadata), columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    # A column that other rows of the file have is null in this one.
                    yield f"{file}:{number}", {k: v for k, v in row.items() if v is not None}
    except MemoryError:  # of pyarrow too, which is an ArrowException
        raise
    except (ArrowException, OSError) as error:
        raise InputError(f"{file} is damaged after row {number}: {error}") from None


def _rows(metadata: Any) -> int:
    """How many rows to read at once: fewer where they are long."""
    groups = range(metadata.num_row_groups)
    size = sum(metadata.row_group(number).total_byte_size for number in groups)
    return max(1, min(_ROWS, _ROW_BYTES * metadata.num_rows // max(1, size)))


def _unpacked(file: Path, most: int) -> bytearray:
    """All of a file, in one piece however short its lines are: a `bytes` of each takes 33 more."""
    data = bytearray()
    try:
        with _open(file) as stream:
            while piece := stream.read1(_PIECE):
                data += piece
                if len(data) > most:
                    raise InputError(
                        f"{file} unpacks to more than {most >> 20} MiB, {_DENSEST} times its size:"
                        " unpack it, or leave it out"
                    )
    except _DAMAGED as error:
        lines = data.count(b"\n")
        raise InputError(f"{file} is damaged after line {lines}: {error}") from None
    return data


def _lines(file: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked where its name says so; each at most LINE_LIMIT + 1 bytes.

    The rest of a longer one is passed over.
    """
    number = 0
    try:
        with _open(file) as stream:
            while line := stream.readline(LINE_LIMIT + 1):
                number += 1
                yield line
                is_cut = len(line) > LINE_LIMIT
                while is_cut and line and not line.endswith(b"\n"):
                    line = stream.readline(_PIECE)
    except _DAMAGED as error:
        raise InputError(f"{file} is damaged after line {number}: {error}") from None


def _open(file: Path) -> io.BufferedIOBase:
    if file.name.endswith(".gz"):
        return gzip.open(file)
    return open_zstd(file) if file.name.endswith(".zst") else file.open("rb")


def _decode(data: bytes | bytearray, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f"{place}:{line}" if b"\n" in data.rstrip(b"\n") else place
        raise InputError(
            f"{where} is not UTF-8 text (byte {error.start}): convert it, or leave it out"
        ) from None


def _ending(file: Path) -> str:
    """The suffix, before .gz or .zst."""
    name = file.name
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix.lower()
