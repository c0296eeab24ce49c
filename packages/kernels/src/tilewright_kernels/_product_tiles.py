"""What gated and grouped products choose alike: the tile, by the sizes at hand, and the operands.

`matmul` has a ladder of its own, whose tiles also say in how many parts they are written.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tilewright_kernels._launch import next_power_of_2
from tilewright_kernels._operator import Operator
from tilewright_kernels._tf32 import rounded_to_tf32, tf32_is_allowed


class Tile(NamedTuple):
    """A tile of the result, the step along the sum, and how the program is built."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    num_stages: int
    num_warps: int


def fitted(tile: Tile, M: int, N: int, K: int) -> Tile:
    """The tile, made smaller where the matrices are; 16 is the least that tl.dot takes."""
    block_m, block_n, block_k = (
        min(block, max(16, next_power_of_2(max(size, 1))))
        for block, size in zip(tile[:3], (M, N, K), strict=True)
    )
    num_warps = tile.num_warps if block_m * block_n >= 64 * 64 else min(4, tile.num_warps)
    return tile._replace(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps)


def operands(operator: Operator, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, str]:
    """What tl.dot multiplies, and how: float32 as torch's switch says, rounded for tf32."""
    if a.dtype == torch.float32 and tf32_is_allowed():
        return rounded_to_tf32(operator, a), rounded_to_tf32(operator, b), "tf32"
    return a, b, "ieee"
