"""How the products of groups are launched: through the accelerator on Hopper, else by pointers."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv, is_hopper, next_power_of_2, num_programs
from tilewright_kernels._operator import Operator, accumulator
from tilewright_kernels._product_tiles import Tile, fitted, operands
from tilewright_kernels.grouped_mm.blocks import most_blocks, row_blocks
from tilewright_kernels.grouped_mm.pointers import (
    clear_rows_kernel,
    grouped_rows_kernel,
    grouped_sums_kernel,
)

POINTER_TILES = {
    2: Tile(128, 128, 64, 8, 3, 8),
    4: Tile(64, 64, 32, 8, 3, 8),
    8: Tile(32, 32, 16, 8, 2, 4),
}
"""By bytes of an element."""

HOPPER_BLOCK_M = 128
"""Rows of a tile of Hopper's kernels."""

HOPPER_OPTIONS: dict[str, Any] = {
    "EPILOGUE_REGISTERS": 104, "BLOCK_K": 64, "GROUP_M": 8, "STAGES": 3, "num_warps": 8,
    "maxnreg": 168,
}  # fmt: skip
"""As `gated_mlp._hopper` has measured them; groups of 16 rows of tiles make no difference."""

ROWS = 32
"""Rows of a part of a tile that the writing warps take at a time."""


@cache
def tile_for(M: int, N: int, K: int, element_size: int) -> Tile:
    """The pointer kernels' tile, made smaller where the matrices are."""
    return fitted(POINTER_TILES[element_size], M, N, K)


def pointer_options(tile: Tile, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """What all pointer kernels want to know."""
    return {
        "ACC": accumulator(dtype), "PRECISION": precision, "NUM_STAGES": tile.num_stages,
        **tile._asdict(),
    }  # fmt: skip


def hopper_can(*tensors: Tensor | None) -> bool:
    """Whether descriptors can describe all of them: 16 bits, on Hopper, rows in 16-byte units."""
    return all(t is None or (is_hopper(t.device) and describable(t)) for t in tensors)


def describable(x: Tensor) -> bool:
    """Whether rows of 16-bit numbers are adjacent and begin at multiples of 16 bytes."""
    return (
        x.element_size() == 2
        and x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and x.shape[-1] % 8 == 0
        and x.numel() > 0
        and max(x.shape) < 2**31
        and all(stride > 0 and stride % 8 == 0 for stride in x.stride()[:-1])
    )


def hopper_programs(device: torch.device, tiles: int) -> int:
    """Programs of a persistent launch with at most so many tiles."""
    return min(tiles, num_programs(device, per_sm=1))


def with_rows(x: Tensor) -> Tensor:
    """x itself if its rows are adjacent in memory, else a copy."""
    return x if x.stride(-1) == 1 and x.stride(-2) >= x.shape[-1] else x.contiguous()


def launch_rows(
    operator: Operator, a: Tensor, b: Tensor, offs: Tensor, out: Tensor,
    blocks: dict[int, Tensor] | None = None,
) -> None:  # fmt: skip
    """out[r] = a[r] · b[g] for the rows r of each group g; no others are written.

    Args:
        operator: whose launch it is.
        a: [R, K], any strides.
        b: [G, K, N], any strides.
        offs: [G] int32, contiguous: end of each group's rows.
        out: [R, N], contiguous.
        blocks: tables of row blocks by BLOCK_M that belong to offs, or None; added to.
    """
    (R, K), (G, _, N) = a.shape, b.shape
    if R == 0 or N == 0 or G == 0:
        return
    if K == 0:
        out.zero_()
        return
    blocks = {} if blocks is None else blocks
    if is_hopper(a.device) and a.element_size() == 2:
        rows = with_rows(a)
        b_rows = _flat_rows(b)
        transposed = b_rows is not None
        b_described = b if b_rows is None else b_rows
        if hopper_can(rows, b_described, out):
            # Imported here: Gluon is there where Triton is, and this file must not need it.
            from tilewright_kernels._hopper import describe
            from tilewright_kernels.grouped_mm.hopper_rows import grouped_rows_hopper_kernel

            table = table_of(operator, blocks, offs, R, HOPPER_BLOCK_M)
            block_k = HOPPER_OPTIONS["BLOCK_K"]
            b_block = [128, block_k] if transposed else [1, block_k, 256]
            tiles = most_blocks(R, G, HOPPER_BLOCK_M) * cdiv(N, 256)
            operator.launch(
                grouped_rows_hopper_kernel, (hopper_programs(a.device, tiles),),
                describe(rows, [HOPPER_BLOCK_M, block_k]), describe(b_described, b_block),
                describe(out, [HOPPER_BLOCK_M, 64]), out, table, N, K, N,
                TRANSPOSED=transposed, ROWS=ROWS, **HOPPER_OPTIONS,
            )  # fmt: skip
            return
    a, b, precision = operands(operator, a, b)
    tile = tile_for(R, N, K, a.element_size())
    table = table_of(operator, blocks, offs, R, tile.BLOCK_M)
    operator.launch(
        grouped_rows_kernel, (most_blocks(R, G, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N),),
        a, b, out, table, N, K, *a.stride(), *b.stride(), *out.stride(),
        **pointer_options(tile, a.dtype, precision),
    )  # fmt: skip


def launch_sums(operator: Operator, a: Tensor, b: Tensor, offs: Tensor, out: Tensor) -> None:
    """out[g] = Σ a[r]ᵀ · b[r] over the rows r of each group g.

    Args:
        operator: whose launch it is.
        a: [R, M], any strides.
        b: [R, N], any strides.
        offs: [G] int32, contiguous: end of each group's rows.
        out: [G, M, N], contiguous.
    """
    G, M, N = out.shape
    if out.numel() == 0:
        return
    if a.shape[0] == 0:
        out.zero_()
        return
    if is_hopper(a.device) and a.element_size() == 2:
        a_rows, b_rows = with_rows(a), with_rows(b)
        if hopper_can(a_rows, b_rows, out):
            from tilewright_kernels._hopper import describe
            from tilewright_kernels.grouped_mm.hopper_sums import grouped_sums_hopper_kernel

            block_k = HOPPER_OPTIONS["BLOCK_K"]
            tiles = G * cdiv(M, HOPPER_BLOCK_M) * cdiv(N, 256)
            operator.launch(
                grouped_sums_hopper_kernel, (hopper_programs(a.device, tiles),),
                describe(a_rows, [block_k, HOPPER_BLOCK_M]), describe(b_rows, [block_k, 256]),
                describe(out, [1, HOPPER_BLOCK_M, 64]), offs, G, M, N, **HOPPER_OPTIONS,
            )  # fmt: skip
            return
    a, b, precision = operands(operator, a, b)
    tile = tile_for(M, N, a.shape[0], a.element_size())
    operator.launch(
        grouped_sums_kernel, (G * cdiv(M, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N),),
        a, b, out, offs, M, N, *a.stride(), *b.stride(), *out.stride(),
        **pointer_options(tile, a.dtype, precision),
    )  # fmt: skip


def launch_clear(operator: Operator, out: Tensor, offs: Tensor) -> None:
    """Zeros in the rows of out [R, N] that are no group's."""
    if out.numel() == 0:
        return
    if offs.shape[0] == 0:
        out.zero_()
        return
    R, N = out.shape
    block_n = min(1024, next_power_of_2(N))
    operator.launch(
        clear_rows_kernel, (num_programs(out.device, per_sm=1),),
        out, offs, offs.shape[0], R, N, *out.stride(), ROWS=4, BLOCK_N=block_n,
    )  # fmt: skip


def table_of(
    operator: Operator, blocks: dict[int, Tensor], offs: Tensor, rows: int, block_m: int
) -> Tensor:
    """The table for blocks of block_m rows, made once."""
    if block_m not in blocks:
        blocks[block_m] = row_blocks(operator, offs, rows, block_m)
    return blocks[block_m]


def _flat_rows(b: Tensor) -> Tensor | None:
    """b [G, K, N], whose rows of K are adjacent, as [G · N, K]; None if it does not lie so."""
    rows = b.mT
    if rows.stride(-1) != 1 or rows.stride(-2) < rows.shape[-1]:
        return None
    if rows.shape[0] > 1 and rows.stride(0) != rows.shape[1] * rows.stride(1):
        return None
    return rows.flatten(0, 1)
