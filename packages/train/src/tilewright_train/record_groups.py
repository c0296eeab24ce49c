"""Conversations and pairs in groups that are encoded together, so that all cores have work."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tilewright_train.errors import InputError
from tilewright_train.records import Record, text_of

REFUSED = "refused_by_template"
"""Counts records that were skipped because the template raises on them."""

# A group ends where it has so many of either: memory does not depend on how long records are.
_RECORDS = 1000
_CHARACTERS = 1 << 22

R = TypeVar("R", bound=Record)


def groups(
    records: Iterable[tuple[bool, R]],
    counts: "Counter[str]",
    render: Callable[[R], object] | None = None,
) -> Iterator[list[tuple[bool, R]]]:
    """Marked records in order, a group at a time.

    Args:
        records: (mark, record); the mark is handed through.
        counts: Counts what is skipped, as `REFUSED`.
        render: What the template makes of a record, to skip those on which it raises; None to skip
            none.
    """
    group: list[tuple[bool, R]] = []
    characters = 0
    for mark, record in records:
        if render is not None and not _is_rendered(render, record):
            counts[REFUSED] += 1
            continue
        group.append((mark, record))
        characters += len(text_of(record))
        if len(group) >= _RECORDS or characters >= _CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _is_rendered(render: Callable[[R], object], record: R) -> bool:
    try:
        render(record)
    except InputError:
        return False
    return True
