"""Which matrices an optimizer's parameters are made of, and which of them are iterated together.

A parameter of two dimensions is a matrix; one of three is a batch of them (experts); `split_sizes`
cuts each into blocks of rows (q, k and v, or gate and up, in one weight), which are matrices of
their own to Muon. All of this is arithmetic on shapes: a matrix is a place in memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Matrix(NamedTuple):
    """Part of a contiguous parameter.

    Attributes:
        parameter: index of the parameter.
        offset: elements before it in the parameter.
        rows: of the matrix.
        cols: of the matrix, and of the parameter: rows follow each other without a gap.
    """

    parameter: int
    offset: int
    rows: int
    cols: int


@dataclass(frozen=True)
class Batch:
    """Matrices of one shape or its transpose, iterated at once.

    Attributes:
        n: the smaller dimension.
        m: the larger one.
        wide: matrices of n x m.
        tall: matrices of m x n, iterated as their transposes, after the wide ones.
    """

    n: int
    m: int
    wide: tuple[Matrix, ...]
    tall: tuple[Matrix, ...]


def matrices_of(
    parameter: int, shape: Sequence[int], split_sizes: Sequence[int] | None
) -> Iterator[Matrix]:
    """The matrices of one parameter that have any elements, in the order in which they lie."""
    *experts, all_rows, cols = shape
    for expert in range(experts[0] if experts else 1):
        row = expert * all_rows
        for rows in split_sizes or (all_rows,):
            if rows * cols > 0:
                yield Matrix(parameter, row * cols, rows, cols)
            row += rows


def batches_of(matrices: Sequence[Matrix], most_elements: int) -> list[Batch]:
    """Matrices grouped by shape, in the order of first occurrence, then cut into batches.

    Args:
        matrices: to be grouped.
        most_elements: of a batch, unless a single matrix has more; batches of a shape are about
            equal.
    """
    groups: dict[tuple[int, int], tuple[list[Matrix], list[Matrix]]] = {}
    for matrix in matrices:
        n, m = sorted(matrix[2:])
        groups.setdefault((n, m), ([], []))[matrix.rows > matrix.cols].append(matrix)
    found = []
    for (n, m), (wide, tall) in groups.items():
        members = wide + tall
        most = max(1, most_elements // (n * m))
        count = -(-len(members) // most)
        for i in range(count):
            part = members[i * len(members) // count : (i + 1) * len(members) // count]
            found.append(
                Batch(
                    n,
                    m,
                    tuple(x for x in part if x.rows <= x.cols),
                    tuple(x for x in part if x.rows > x.cols),
                )
            )
    return found
