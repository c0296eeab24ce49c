"""How large a launch is: tiles of rows, and programs for a persistent grid."""

from functools import cache
from typing import NamedTuple

import torch


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


class RowTile(NamedTuple):
    """A tile of whole rows: ROWS x BLOCK_N elements, both powers of two."""

    ROWS: int
    BLOCK_N: int
    num_warps: int


@cache
def row_tile(width: int, *, elements: int, elements_per_thread: int) -> RowTile:
    """Tile for rows of `width` elements, one row at least.

    Args:
        width: elements in a row.
        elements: rows narrower than this share a tile until it is full; the loads of one program
            then keep enough bytes in flight.
        elements_per_thread: how many a thread holds; decides the number of warps, 1 to 32.
    """
    block_n = next_power_of_2(width)
    rows = max(1, elements // block_n)
    num_warps = max(1, min(32, rows * block_n // (32 * elements_per_thread)))
    return RowTile(rows, block_n, num_warps)


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether kernels in Gluon that are written for Hopper run there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_programs(device: torch.device, *, per_sm: int) -> int:
    """Programs of a persistent launch: `per_sm` on each multiprocessor, 4 in the interpreter."""
    return per_sm * _multiprocessors(device) if device.type == "cuda" else 4
