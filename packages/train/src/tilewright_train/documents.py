"""Documents from files: jsonl with a "text" in every line, plain text, both also gzipped.

A plain text file is one document. Whatever cannot be read is an `InputError` that names the file
and the line; jsonl lines that are no document may be skipped and counted instead.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tilewright_train.errors import InputError

TEXT_ENDINGS = (".txt", ".md", ".rst", ".py")
"""What counts as plain text in a folder. A file that is named itself may end in anything."""

_REMEDY = 'mend the line, or skip such lines with "--on-bad-line skip"'


@dataclass
class SkippedLines:
    """The jsonl lines that were skipped."""

    count: int = 0
    """All of them."""
    examples: list[str] = field(default_factory=list)
    """«file:line: reason» of the first three."""

    def add(self, place: str) -> None:
        """Count one more line."""
        self.count += 1
        if len(self.examples) < 3:
            self.examples.append(place)


def find_files(path: Path) -> tuple[list[Path], list[Path]]:
    """The files of documents at `path`, and those in the folder that are none.

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
    read = [file for file in files if _is_jsonl(file) or _ending(file) in TEXT_ENDINGS]
    if not read:
        endings = ", ".join((".jsonl", *TEXT_ENDINGS))
        raise InputError(f"{path} holds no file that ends in {endings} (or .gz after that)")
    return read, [file for file in files if file not in set(read)]


def read_documents(
    file: Path, on_bad_line: Literal["error", "skip"], skipped: SkippedLines
) -> Iterator[str]:
    """The documents of one file, in order; empty ones are left out.

    Args:
        file: jsonl where its name says so, else plain text; UTF-8.
        on_bad_line: What to do with a line that is no JSON object with a string "text".
        skipped: Counts the lines that were skipped.

    Raises:
        InputError: A bad line, text that is not UTF-8, a damaged gzip file.
    """
    if not _is_jsonl(file):
        text = _decode(b"".join(_lines(file)), str(file))
        if text:
            yield text
        return
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        place = f"{file}:{number}"
        try:
            text = _text_of(line, place)
        except InputError as error:
            if on_bad_line == "error":
                raise InputError(f"{error}: {_REMEDY}") from None
            skipped.add(str(error))
            continue
        if text:
            yield text


def _text_of(line: bytes, place: str) -> str:
    """The document in one jsonl line."""
    try:
        record = json.loads(_decode(line, place))
    except json.JSONDecodeError as error:
        raise InputError(f"{place} is not JSON ({error.msg}, column {error.colno})") from None
    except ValueError as error:
        # What int() refuses: more digits than sys.get_int_max_str_digits(), 4,300.
        if isinstance(error, InputError):
            raise
        raise InputError(f"{place} holds a number that is too long") from None
    except RecursionError:
        raise InputError(f"{place} is not JSON that can be read (nested too deeply)") from None
    if not isinstance(record, dict):
        raise InputError(f'{place} is JSON, but not an object with a "text"')
    if "text" not in record:
        keys = ", ".join(sorted(record)[:5]) or "none"
        raise InputError(f'{place} has no "text" (its keys: {keys})')
    if not isinstance(record["text"], str):
        raise InputError(f'{place} has a "text" that is not a string')
    # JSON can spell half of a surrogate pair, which is no character and has no UTF-8 bytes.
    return record["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _lines(file: Path) -> Iterator[bytes]:
    """The lines of a file, unzipped where its name ends in .gz."""
    number = 0
    try:
        with gzip.open(file) if file.name.endswith(".gz") else file.open("rb") as stream:
            for line in stream:
                number += 1
                yield line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{file} is damaged after line {number}: {error}") from None


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f"{place}:{line}" if b"\n" in data.rstrip(b"\n") else place
        raise InputError(
            f"{where} is not UTF-8 text (byte {error.start}): convert it, or leave it out"
        ) from None


def _is_jsonl(file: Path) -> bool:
    return _ending(file) == ".jsonl"


def _ending(file: Path) -> str:
    """The suffix, before .gz."""
    return Path(file.name.removesuffix(".gz")).suffix.lower()
