"""Which records are kept for validation: decided by each record's own hash.

Equal records fall on the same side, and adding records moves none of the others.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator

from tilewright_train.errors import InputError
from tilewright_train.records import Record, text_of

_FEW = 200  # With a share of 5 % by hash, 200 records leave validation empty once in 28,000.


def split(records: Iterable[Record], fraction: float) -> Iterator[tuple[bool, Record]]:
    """Mark each record (or, of a few texts, a part of one) for validation or training.

    With 200 records or more, a record's own hash decides. Fewer give their last `fraction` to
    validation: of texts, the last characters of all, cut after the end of a line; of conversations
    and pairs, the last ones, at least one.

    Yields:
        (is for validation, record), in the order of the records.

    Raises:
        InputError: A side is left empty.
    """
    stream = iter(records)
    first = list(itertools.islice(stream, _FEW))
    if len(first) == _FEW:
        marked = ((is_validation(r, fraction), r) for r in itertools.chain(first, stream))
    else:
        marked = _split_by_position(first, fraction)
    sides = set()
    for side, record in marked:
        sides.add(side)
        yield side, record
    check_sides(sides, fraction)


def check_sides(sides: set[bool], fraction: float) -> None:
    """Refuse a split with an empty side.

    Raises:
        InputError: Training or validation, or both, are missing among `sides`.
    """
    if not sides:
        raise InputError("the corpus holds no text: give --data something to read")
    if len(sides) < 2:
        side = "training" if sides == {True} else "validation"
        raise InputError(
            f"no text is left for {side}: give --data more text, or change --validation-fraction"
            f" {fraction:g}"
        )


def is_validation(record: Record, fraction: float) -> bool:
    """Whether the hash of what `record` says lies in the lowest `fraction` of all hashes."""
    head = hashlib.sha256(text_of(record).encode()).digest()[:8]
    return int.from_bytes(head, "big") < fraction * 2**64


def _split_by_position(records: list[Record], fraction: float) -> Iterator[tuple[bool, Record]]:
    texts = [record for record in records if isinstance(record, str)]
    if len(texts) == len(records):
        yield from _split_texts(texts, fraction)
        return
    kept = max(1, round(len(records) * fraction))
    for number, record in enumerate(records):
        yield number >= len(records) - kept, record


def _split_texts(documents: list[str], fraction: float) -> Iterator[tuple[bool, str]]:
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
