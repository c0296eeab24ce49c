"""Sources as one piece, and what kind of records they hold: for commands that do not train."""

import hashlib
from collections.abc import Iterator
from typing import Any, Literal

from tilewright_train.errors import InputError
from tilewright_train.record_files import SkippedLines, read_records
from tilewright_train.records import Kind, Record
from tilewright_train.sources import FileSource, Reading, Source, for_kind

_KINDS: tuple[Kind, ...] = ("text", "conversation", "preference")


class WholeSource:
    """All records of a source, whatever its split, as its validation side."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.name, self.size = source.name, source.size
        self.sha256 = hashlib.sha256(f"whole {source.sha256}".encode()).hexdigest()

    def records(self, kind: Kind, reading: Reading) -> Iterator[tuple[bool, Record]]:
        """(True, record) of each, in order.

        Raises:
            InputError: The source cannot be read, or holds no such records.
        """
        found = False
        for record in _all_records(self._source, kind, reading):
            found = True
            yield True, record
        if not found:
            raise InputError(f"{self.name} holds no {kind}: give --data something to read")

    def describe(self) -> str:
        """One line for people."""
        return self._source.describe()

    def facts(self) -> dict[str, Any]:
        """As of the source."""
        return self._source.facts()


def kind_of(
    source: Source, preferred: Kind, on_bad_line: Literal["error", "skip"] = "error"
) -> Kind:
    """What the first record of a source is.

    Args:
        source: Built-in ones hold all kinds, and are taken as the preferred one.
        preferred: Where a record is of several kinds.
        on_bad_line: «skip» to look at the first record of any kind, «error» at the first line.

    Raises:
        InputError: It is of none; the message is that of the preferred kind.
    """
    told = for_kind(source, "conversation")  # a text beside files of records says nothing of them
    refused: InputError | None = None
    for kind in (preferred, *(k for k in _KINDS if k != preferred)):
        skipped = SkippedLines()
        reading = Reading(validation_fraction=0.5, on_bad_line=on_bad_line, skipped=skipped)
        try:
            first = next(iter(_all_records(told, kind, reading)), None)
        except InputError as error:
            refused = refused or error
            continue
        if first is not None or not skipped.count:
            return kind
        refused = refused or InputError(skipped.examples[0])
    assert refused is not None
    raise refused


def _all_records(source: Source, kind: Kind, reading: Reading) -> Iterator[Record]:
    if not isinstance(source, FileSource):
        for _, record in source.records(kind, reading):
            yield record
        return
    for file in source.files:
        yield from read_records(file, kind, reading.on_bad_line, reading.skipped)
