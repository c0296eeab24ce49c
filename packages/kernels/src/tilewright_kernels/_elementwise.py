"""The walk that all element-wise kernels share: tiles over one long row, or over rows in place.

Contiguous tensors, whatever their shape, are one row of all their elements: no tile is cut short
but the last. Where a tensor has gaps between its rows (slices, halves of a packed tensor), the
tiles follow the rows and nothing is copied.
"""

from typing import NamedTuple

import torch

from tilewright_kernels._launch import cdiv, row_tile
from tilewright_kernels._operator import as_rows
from tilewright_kernels._triton import tl, triton

BLOCK = 1024
"""Elements of a program, unless it has more to compute."""

ROW_BLOCK = 512
"""Widest tile of rows. Nothing is reduced along a row, so wide rows are cut into several tiles;
narrow ones fit any width with little left over."""

LARGE = 2**22
"""Elements from which on there are several programs for every place on the device."""


def as_walked(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of one shape as [1, numel] where all are contiguous, else as [rows, N]."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(1, -1) for t in tensors]
    return [as_rows(t, t.shape[-1]) for t in tensors]


class Tile(NamedTuple):
    """A tile of ROWS x BLOCK_N elements; FLAT where there is but one row."""

    FLAT: bool
    ROWS: int
    BLOCK_N: int
    num_warps: int


def tiles(
    num_rows: int, width: int, *, elements: int = BLOCK, elements_per_thread: int = 8
) -> tuple[tuple[int], Tile]:
    """Grid and tile over [num_rows, width].

    Where there is much to do, twice as many elements a thread share the instructions that are not
    about elements: gelu runs at 1.01 of the copy speed with 16, at 0.95 with 8 (H200, bfloat16).
    Where all programs run at once, few are done sooner; and where the width is no multiple of 16,
    loads with a mask take registers. Warps that come alone, or 512 elements a program, start too
    slowly: relu runs at 0.80, dropout at 0.81. Rows of 1408 in blocks of 512 run at 1.05, of 1024
    at 1.01.

    Args:
        num_rows: rows; 1 is the flat walk.
        width: columns.
        elements: of a program.
        elements_per_thread: at the least.
    """
    flat = num_rows == 1
    if num_rows * width >= LARGE and width % 16 == 0:
        elements_per_thread *= 2
    tile = row_tile(
        min(width, elements if flat else ROW_BLOCK),
        elements=1 if flat else elements,
        elements_per_thread=elements_per_thread,
    )
    return (cdiv(num_rows, tile.ROWS) * cdiv(width, tile.BLOCK_N),), Tile(flat, *tile)


@triton.jit
def tile_of_program(
    num_rows, n_cols, FLAT: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Rows [ROWS, 1] and columns [1, BLOCK_N] of this program's tile, int64, its mask, and whether
    the tile is full: without a mask, loads are wide whatever n_cols is.

    Neighbours in the launch are neighbours in a row: what runs at one time lies close in memory.
    One long row needs no division, which takes as many instructions as some activations.
    """
    if FLAT:
        row, col = tl.program_id(0) * 0, tl.program_id(0)
    else:
        col_tiles = tl.cdiv(n_cols, BLOCK_N)
        row, col = tl.program_id(0) // col_tiles, tl.program_id(0) % col_tiles
    row, col = row.to(tl.int64), col.to(tl.int64)
    rows = (row * ROWS + tl.arange(0, ROWS))[:, None]
    cols = (col * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    full = ((row + 1) * ROWS <= num_rows) & ((col + 1) * BLOCK_N <= n_cols)
    return rows, cols, (rows < num_rows) & (cols < n_cols), full


@triton.jit
def load(pointers, mask, full):
    """A tile, without looking at the mask where the tile is full."""
    return tl.load(pointers) if full else tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store(pointers, tile, mask, full):
    """Write a tile, without looking at the mask where the tile is full."""
    if full:
        tl.store(pointers, tile)
    else:
        tl.store(pointers, tile, mask=mask)
