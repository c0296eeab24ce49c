"""Which tensors one launch may take: those alike, column by column, in device and dtype."""

from collections.abc import Iterator, Sequence
from itertools import compress
from operator import attrgetter
from typing import Any

from torch import Tensor

_TRAITS = attrgetter("device", "dtype", "layout")
_DTYPE_AND_LAYOUT = attrgetter("dtype", "layout")

Columns = Sequence[list[Tensor]]
Kind = tuple[Any, ...]
"""(device, dtype, layout) of each column."""


def by_kind(
    columns: Columns, others: Sequence[list[Any]] = ()
) -> Iterator[tuple[Kind, list[list[Any]]]]:
    """Split columns into rows of one kind, in the order in which kinds first occur.

    Args:
        columns: lists of one length, whose traits make the kind; row i belongs to parameter i.
        others: lists that are split along with them; empty ones stay empty.

    Yields:
        A kind, and the columns and others of its rows.
    """
    everything: list[list[Any]] = [*columns, *others]
    if not columns[0]:
        return
    if all(map(_is_alike, columns)):
        yield tuple(_TRAITS(column[0]) for column in columns), everything
        return
    kinds = list(zip(*(map(_TRAITS, column) for column in columns), strict=True))
    for kind in dict.fromkeys(kinds):
        chosen = [k == kind for k in kinds]
        yield kind, [list(compress(column, chosen)) for column in everything]


def _is_alike(column: list[Tensor]) -> bool:
    """Whether all have one device, dtype and layout; numbers compare faster than devices."""
    return (
        len(set(map(_DTYPE_AND_LAYOUT, column))) == 1
        and len(set(map(Tensor.get_device, column))) == 1
    )
