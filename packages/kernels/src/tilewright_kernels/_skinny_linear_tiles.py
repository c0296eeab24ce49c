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
    """How many programs share K on Hopper, and the rings that each of them fills.

    Attributes:
        SPLITS: programs that share K.
        STAGES: buffers of weights.
        PIECES: of 64 columns, in a buffer.
        X_STAGES: buffers of x.
    """

    SPLITS: int
    STAGES: int
    PIECES: int
    X_STAGES: int


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


# Hopper, up to 32 rows: rows of W at most (both halves counted), K at most -> rings. Microseconds
# of a whole step of a 0.5 B decoder, 32 sequences of 256 tokens, H200 (16 layers, of which each has
# one such product), with norms handed on and the other rings about as they are here:
#     4608, 1536      (1, 6, 2, 6) 635, (1, 4, 4, 4) 639, (1, 12, 2, 4) 647, (3, 2, 4, 2) 677
#     1536, 1536      (2, 3, 4, 3) 618, (1, 4, 4, 4) 635, (4, 3, 2, 3) 664
#     2 · 4096, 1536  (1, 8, 2, 12) 639, (1, 4, 4, 4) 640, (1, 8, 1, 8) 646, (1, 2, 4, 2) 659
#     1536, 4096      (2, 8, 2, 8) 618, (4, 4, 4, 4) 635, (4, 4, 2, 4) 646, (8, 2, 4, 2) 665
#     32768, 1536     all from (1, 3, 2, 3) to (1, 4, 4, 4) 640 to 641
# A buffer is asked for again when the step after its own is multiplied, so two of them leave a
# copy's latency in every step.
HOPPER_TILES: dict[int, dict[int, HopperTile]] = {
    2048: {2048: HopperTile(2, 3, 4, 3), 2**31: HopperTile(2, 8, 2, 8)},
    6144: {2048: HopperTile(1, 6, 2, 6), 2**31: HopperTile(3, 2, 4, 2)},
    12288: {2048: HopperTile(1, 8, 2, 12), 2**31: HopperTile(1, 2, 4, 2)},
    2**31: {2**31: HopperTile(1, 3, 2, 3)},
}

# More rows, of which a buffer has room for fewer: programs that share K.
HOPPER_SPLITS: dict[int, dict[int, int]] = {
    2048: {2048: 4, 2**31: 8},
    6144: {2**31: 3},
    2**31: {2**31: 1},
}


@cache
def hopper_tile(n: int, k: int, gated: bool, block_m: int) -> HopperTile:
    """For several rows in 16 bits."""
    rows = n * (2 if gated else 1)
    if block_m <= 32:
        by_k = HOPPER_TILES[min(most for most in HOPPER_TILES if most >= rows)]
        tile = by_k[min(most for most in by_k if most >= k)]
        return tile._replace(SPLITS=min(tile.SPLITS, cdiv(k, 256)))
    splits = HOPPER_SPLITS[min(most for most in HOPPER_SPLITS if most >= rows)]
    return HopperTile(min(splits[min(most for most in splits if most >= k)], cdiv(k, 128)), 3, 2, 3)
