"""Where records come from: files, the Python standard library, or the built-in stories.

A source has a fixed order, a hash of everything that it holds, and a split that depends on its
records alone. The standard library that lies beside the interpreter differs between Python
versions, so the version is recorded and losses are compared only within one; the stories are the
same on all of them.
"""

import dataclasses
import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from tilewright_train.config import STDLIB, STORIES
from tilewright_train.errors import InputError
from tilewright_train.record_files import SkippedLines, find_files, is_plain_text, read_records
from tilewright_train.records import Kind, Record
from tilewright_train.split import split

# Folders that are no part of the library's own text. site-packages holds whatever was installed.
_NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})


class Source(Protocol):
    """Records in a fixed order, some of them for validation."""

    @property
    def name(self) -> str:
        """«stdlib», «stories», or the name of the file or folder without its ending."""
        ...

    @property
    def size(self) -> int:
        """Bytes, about."""
        ...

    @property
    def sha256(self) -> str:
        """Of everything that decides on the records."""
        ...

    def records(self, kind: Kind, reading: "Reading") -> Iterator[tuple[bool, Record]]:
        """(is for validation, record) in order, again at every call.

        Raises:
            InputError: The source cannot be read, holds other records, or leaves a side empty.
        """
        ...

    def describe(self) -> str:
        """One line for people."""
        ...

    def facts(self) -> dict[str, Any]:
        """What run.json says of it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How records are read and split, and what was skipped on the way."""

    validation_fraction: float
    """Share of the records that is kept for validation."""
    on_bad_line: Literal["error", "skip"]
    """What to do with a line that is no record."""
    skipped: SkippedLines
    """Counts such lines."""


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """The files of one folder, or one file."""

    name: str
    """«stdlib», or the name of the file or folder."""
    root: Path
    """The file itself, or the folder that holds all files."""
    files: tuple[Path, ...]
    """In the order in which they are read."""
    left_out: tuple[Path, ...]
    """Files of the folder that hold no records."""
    contents: tuple[tuple[int, str], ...]
    """Of each file, its bytes and their SHA-256."""
    python_version: str | None
    """The interpreter's version if this is its library, for the library changes with it."""

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(size for size, _ in self.contents)

    @property
    def sha256(self) -> str:
        """Of the names (relative to the root) and the bytes of all files."""
        digest = hashlib.sha256()
        for file, (_, content) in zip(self.files, self.contents, strict=True):
            name = file.relative_to(self.root).as_posix() if file != self.root else file.name
            digest.update(f"{name}\0{content}\n".encode())
        return digest.hexdigest()

    def records(self, kind: Kind, reading: Reading) -> Iterator[tuple[bool, Record]]:
        """See `Source`; the split is that of `split`."""
        everything = (
            record
            for file in self.files
            for record in read_records(file, kind, reading.on_bad_line, reading.skipped)
        )
        return split(everything, reading.validation_fraction)

    def describe(self) -> str:
        """One line for people."""
        what = f"Python {self.python_version}'s standard library" if self.python_version else ""
        files = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        out = f", {len(self.left_out)} others left out" if self.left_out else ""
        return f"{what or self.root}, {files}, {self.size / 1e6:.1f} MB{out}"

    def facts(self) -> dict[str, Any]:
        """What run.json says of it."""
        return {
            "name": self.name,
            "root": str(self.root),
            "files": len(self.files),
            "bytes": self.size,
            "sha256": self.sha256,
            "python_version": self.python_version,
        }


def open_source(data: str) -> Source:
    """Find a source; files are hashed.

    Args:
        data: «stdlib», «stories», a file, or a folder.

    Returns:
        All that it holds; see `for_kind` for records of one kind.

    Raises:
        InputError: Nothing there, no file to read, or only empty files.
    """
    if data == STORIES:
        from tilewright_train.stories import StoriesSource

        return StoriesSource()
    if data == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        files, left_out = standard_library_files(root), []
        version = platform.python_version()
    else:
        root, version = Path(data), None
        files, left_out = find_files(root)
    contents = []
    for file in files:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        contents.append((file.stat().st_size, content))
    source = FileSource(
        name=STDLIB if data == STDLIB else root.name.split(".")[0] or "data",
        root=root,
        files=tuple(files),
        left_out=tuple(left_out),
        contents=tuple(contents),
        python_version=version,
    )
    if source.size == 0:
        raise InputError(f"{root} is empty: give --data something to read")
    return source


def for_kind(source: Source, kind: Kind) -> Source:
    """A source without what cannot hold records of a kind.

    Plain text holds neither conversations nor pairs. In a folder it is left out where other files
    are there, for a README.md lies beside most data sets; a folder of plain text alone is kept, and
    refused when it is read.
    """
    if not isinstance(source, FileSource) or kind == "text":
        return source
    both = list(zip(source.files, source.contents, strict=True))
    read = [(file, content) for file, content in both if not is_plain_text(file)]
    if not read or len(read) == len(both):
        return source
    plain = (file for file, _ in both if is_plain_text(file))
    return dataclasses.replace(
        source,
        files=tuple(file for file, _ in read),
        contents=tuple(content for _, content in read),
        left_out=tuple(sorted((*source.left_out, *plain))),
    )


def standard_library_files(root: Path) -> list[Path]:
    """The library's own .py files below `root`, sorted by path.

    Raises:
        InputError: There are none, as in an interpreter that ships its library compiled.
    """
    files = [
        file
        for file in root.rglob("*.py")
        if not _NOT_LIBRARY.intersection(file.relative_to(root).parent.parts)
        # Written when the interpreter was built: it holds the paths of that machine.
        and not file.name.startswith("_sysconfigdata")
    ]
    if not files:
        raise InputError(f"{root} holds no .py files: give --data a text of your own")
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())
