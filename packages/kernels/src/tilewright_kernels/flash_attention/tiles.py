"""What the host decides alike for all kernels: tiles, heads at one time, and what Hopper's take."""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from torch import Tensor

from tilewright_kernels._launch import is_hopper, next_power_of_2
from tilewright_kernels.flash_attention.operands import describable

HOPPER_QUERIES = 64
"""More than so many are for Hopper's kernels, which have tiles of one size."""

AnyTile = TypeVar("AnyTile")

CACHED = 32 * 2**20
"""Bytes that programs which run at one time may read again and still find in L2.

TFLOP/s of the forward on an H200 at T = 4096, 16 heads of 128, by bytes of keys and values: 407;
with 16 MiB 402, 8 MiB 394, a head 374.
"""


class Tile(NamedTuple):
    """Queries by keys, and how the program is built; blocks are powers of two.

    PIECE is for float32 without tensor cores: so many numbers of a sum are multiplied at one time
    (`product`), and the program's own rows are read anew at each step. 0 is all, kept.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_stages: int
    num_warps: int
    PIECE: int = 0


def padded(width: int) -> int:
    """A head dimension as tiles have it: a power of two, and what tensor cores take at least."""
    return max(16, next_power_of_2(width))


def narrowest(tiles: Mapping[int, AnyTile], width: int) -> AnyTile:
    """The tile of the least head dimension that is at least this padded one."""
    return tiles[min(w for w in tiles if w >= width)]


def fitted(tile: Tile, len_q: int, len_k: int) -> Tile:
    """The tile, made smaller where sequences are short."""
    block_m, block_n = (
        min(block, padded(max(1, length)))
        for block, length in zip(tile[:2], (len_q, len_k), strict=True)
    )
    num_warps = tile.num_warps if (block_m, block_n) == tile[:2] else min(4, tile.num_warps)
    return tile._replace(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps)


def heads_together(bytes_per_head: int, heads: int) -> int:
    """Heads that are worked on at one time: what all their programs read stays in L2.

    Args:
        bytes_per_head: that its programs read again and again.
        heads: of all sequences. Not more of them, so that their tiles can be counted in int32.
    """
    return min(next_power_of_2(max(1, CACHED // max(1, bytes_per_head))), heads)


def hopper_width(q: Tensor, v: Tensor) -> int:
    """Columns of the tiles of Hopper's kernels."""
    return 64 if max(q.shape[-1], v.shape[-1]) <= 64 else 128


def hopper_takes(narrowest_head: int, q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> bool:
    """Whether the kernels for Hopper run on this GPU and take these tensors.

    Args:
        narrowest_head: dimension from which on tiles of 64 columns are worth it.
        q: [B, T, H, D].
        k: [B, T, K, D].
        v: [B, T, K, D_v].
        others: that are read by descriptor, like q or v.
    """
    widths = q.shape[3], v.shape[3]
    return (
        is_hopper(q.device)
        and q.element_size() == 2
        and narrowest_head <= min(widths)
        and max(widths) <= 128
        and describable(q, k, v, *others)
    )
