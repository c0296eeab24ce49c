"""How `skinny_linear` shares its weights among programs: by the shape of W, from measurements."""

from functools import cache
from typing import NamedTuple

from tilewright_kernels._launch import cdiv, next_power_of_2

MAX_SPLITS = 8


class RowTile(NamedTuple):
    """Weights that a program of one row reads at a time."""

    BLOCK_N: int
    BLOCK_K: int
    num_warps: int


class RowsTile(NamedTuple):
    """Weights that a program of several rows reads at a time, and how many programs share K."""

    BLOCK_N: int
    BLOCK_K: int
    SPLITS: int
    num_warps: int


class HopperTile(NamedTuple):
    """How many programs share K on Hopper, and the ring that each of them fills."""

    SPLITS: int
    STAGES: int
    PIECES: int


# One row, elements of 16 bits: rows of W at most (both halves counted), tile. Microseconds a
# product on an H200, in a graph with launches that overlap, for (out, in):
#     4608, 1536     (8, 512, 4) 5.0, whole K 6.0
#     2 · 4096, 1536 (4, 512, 1) 6.5, (8, 512, 2) 6.8, whole K 9.1
#     1536, 1536     (8, 2048, 8) 2.5, 512 of K 3.3
#     1536, 4096     (4, 4096, 8) 4.3, 1024 of K 5.5
#     32768, 1536    (4, 512, 2) 24.6, whole K 27.9
ROW_TILES: dict[int, RowTile] = {
    2048: RowTile(8, 4096, 8),
    6144: RowTile(8, 512, 4),
    12288: RowTile(4, 512, 1),
    2**31: RowTile(4, 512, 2),
}


@cache
def row_tile(n: int, k: int, element_size: int, gated: bool) -> RowTile:
    """For one row. BLOCK_N counts rows of the result, the table rows of the tile."""
    tile = ROW_TILES[min(rows for rows in ROW_TILES if rows >= n * (2 if gated else 1))]
    block_k = min(tile.BLOCK_K * 2 // max(2, element_size), next_power_of_2(k))
    height = tile.BLOCK_N if block_k <= 2048 else tile.BLOCK_N * 2048 // block_k
    return RowTile(max(1, height // (2 if gated else 1)), block_k, tile.num_warps)


@cache
def rows_tile(n: int, k: int, element_size: int, gated: bool, programs: int) -> RowsTile:
    """For several rows: as many programs as run at one time, or nearly.

    Microseconds on an H200 for 32 rows, and of rms_norm, cuBLAS and a sum one by one: 4608, 1536
    8.0 and 8.2; 1536, 1536 4.8 and 6.9; 1536, 4096 7.3 and 10.1; 32768, 1536 30.4 and 29.6.
    """
    rows = n * (2 if gated else 1)
    if element_size > 2:  # no tensor cores, and products that are unrolled: small ones
        splits = max(1, min(MAX_SPLITS, programs // cdiv(rows, 32), cdiv(k, 64)))
        return RowsTile(16 if gated else 32, 32, splits, 4)
    many = cdiv(rows, 64) >= 2 * programs
    block_k = max(16, min(128 if many else 512, next_power_of_2(k)))
    splits = 1 if many else min(MAX_SPLITS, cdiv(k, block_k))
    height = 64 if cdiv(rows, 64) * splits >= programs else 32
    return RowsTile(
        height // (2 if gated else 1), block_k, splits, max(4, height * block_k // 4096)
    )


# Hopper, several rows: rows of W at most (both halves counted), K at most -> programs that share K.
# Microseconds of a whole step of a 0.5 B decoder, 32 sequences of 256 tokens, H200 (16 layers, of
# which each has one such product): 4608, 1536 by 1, 2, 3 programs 837, 812, 799, and with the
# kernel for all GPUs 801; 2 · 4096, 1536 by 1 and 2 799 and 800.
HOPPER_SPLITS: dict[int, dict[int, int]] = {
    2048: {2048: 4, 2**31: 8},
    6144: {2**31: 3},
    2**31: {2**31: 1},
}


@cache
def hopper_tile(n: int, k: int, gated: bool, block_m: int) -> HopperTile:
    """For several rows in 16 bits: a ring of 96 KiB or less, two on a multiprocessor.

    A step of 256 columns costs one wait and one copy each of W and x; steps of 128 are for what is
    shared by four, so that each has as many, and for more rows than 32.
    """
    rows = n * (2 if gated else 1)
    by_k = HOPPER_SPLITS[min(most for most in HOPPER_SPLITS if most >= rows)]
    splits = by_k[min(most for most in by_k if most >= k)]
    if block_m <= 32 and splits != 4:
        return HopperTile(min(splits, cdiv(k, 256)), 2, 4)
    return HopperTile(min(splits, cdiv(k, 128)), 3, 2)
