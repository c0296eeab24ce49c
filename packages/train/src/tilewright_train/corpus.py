"""A corpus: files in a fixed order, the hash of their bytes, and a split that depends on it alone.

Without `--data` the corpus is the Python standard library that lies beside the interpreter: its
.py files by path, tests left out. It differs between Python versions, so the version is recorded
and losses are compared only within one.
"""

import hashlib
import itertools
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tilewright_train.config import STDLIB
from tilewright_train.documents import SkippedLines, find_files, read_documents
from tilewright_train.errors import InputError

# Folders that are no part of the library's own text. site-packages holds whatever was installed.
_NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})

_FEW = 200  # With a share of 5 % by hash, 200 documents leave validation empty once in 28,000.


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The files of one corpus, and what identifies them."""

    name: str
    """«stdlib», or the name of the file or folder."""
    root: Path
    """The file itself, or the folder that holds all files."""
    files: tuple[Path, ...]
    """In the order in which they are read."""
    left_out: tuple[Path, ...]
    """Files of the folder that hold no documents."""
    size: int
    """Bytes of all files together."""
    sha256: str
    """Of the names (relative to the root) and the bytes of all files."""
    python_version: str | None
    """The interpreter's version if this is its library, for the library changes with it."""

    def documents(
        self, on_bad_line: Literal["error", "skip"], skipped: SkippedLines
    ) -> Iterator[str]:
        """All documents in order; see `read_documents`."""
        for file in self.files:
            yield from read_documents(file, on_bad_line, skipped)

    def describe(self) -> str:
        """One line for people."""
        what = f"Python {self.python_version}'s standard library" if self.python_version else ""
        files = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        out = f", {len(self.left_out)} others left out" if self.left_out else ""
        return f"{what or self.root}, {files}, {self.size / 1e6:.1f} MB{out}"


def open_corpus(data: str) -> Corpus:
    """Find the files of a corpus and hash them.

    Args:
        data: «stdlib», a file, or a folder.

    Raises:
        InputError: Nothing there, no file to read, or only empty files.
    """
    if data == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        files, left_out = standard_library_files(root), []
        version = platform.python_version()
    else:
        root, version = Path(data), None
        files, left_out = find_files(root)
    digest = hashlib.sha256()
    size = 0
    for file in files:
        content = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                content.update(block)
                size += len(block)
        name = file.relative_to(root).as_posix() if file != root else file.name
        digest.update(f"{name}\0{content.hexdigest()}\n".encode())
    if size == 0:
        raise InputError(f"{root} is empty: give --data something to read")
    return Corpus(
        name=STDLIB if data == STDLIB else root.name.split(".")[0] or "data",
        root=root,
        files=tuple(files),
        left_out=tuple(left_out),
        size=size,
        sha256=digest.hexdigest(),
        python_version=version,
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


def split(documents: Iterable[str], fraction: float) -> Iterator[tuple[bool, str]]:
    """Mark each document (or, of a small corpus, a part of one) for validation or training.

    With 200 documents or more, a document's own hash decides: equal documents fall on the same
    side, and adding documents moves none of the others. A smaller corpus gives the last `fraction`
    of its characters to validation, cut after the end of a line.

    Yields:
        (is for validation, text), in the order of the documents.

    Raises:
        InputError: A side is left empty.
    """
    stream = iter(documents)
    first = list(itertools.islice(stream, _FEW))
    if len(first) < _FEW:
        marked = _split_by_position(first, fraction)
    else:
        marked = ((is_validation(d, fraction), d) for d in itertools.chain(first, stream))
    sides = set()
    for side, text in marked:
        sides.add(side)
        yield side, text
    if not sides:
        raise InputError("the corpus holds no text: give --data something to read")
    if len(sides) < 2:
        side = "training" if sides == {True} else "validation"
        raise InputError(
            f"no text is left for {side}: give --data more text, or change --validation-fraction"
            f" {fraction:g}"
        )


def is_validation(text: str, fraction: float) -> bool:
    """Whether the hash of `text` lies in the lowest `fraction` of all hashes."""
    head = hashlib.sha256(text.encode()).digest()[:8]
    return int.from_bytes(head, "big") < fraction * 2**64


def _split_by_position(documents: list[str], fraction: float) -> Iterator[tuple[bool, str]]:
    """The last `fraction` of all characters is for validation."""
    boundary = round(sum(map(len, documents)) * (1 - fraction))
    position = 0
    for text in documents:
        inside = boundary - position
        cut = min(max(inside, 0), len(text))
        if 0 < cut < len(text):
            cut = text.rfind("\n", 0, cut) + 1 or cut
        for side, part in ((False, text[:cut]), (True, text[cut:])):
            if part:
                yield side, part
        position += len(text)
