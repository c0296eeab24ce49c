"""Tiles of the two kernels, and which operands tensor descriptors can describe."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright_kernels._launch import next_power_of_2
from tilewright_kernels._operator import Operator
from tilewright_kernels._tf32 import rounded_to_tf32, tf32_is_allowed
from tilewright_kernels._triton import HAS_TRITON

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor


class Tile(NamedTuple):
    """A tile of the result, the step along K, and how the program is built."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    num_stages: int
    num_warps: int


POINTER_TILES = {
    2: Tile(128, 64, 64, 8, 3, 8),
    4: Tile(64, 64, 32, 8, 3, 8),
    8: Tile(32, 32, 16, 8, 2, 4),
}
"""Of the kernels that read through pointers, by bytes of an element.

Two accumulators of 128 x 128, or the epilogue of one, take more registers than there are.
"""


def tile_for(M: int, N: int, K: int, element_size: int) -> Tile:
    """The pointer kernels' tile, made smaller where the matrices are."""
    tile = POINTER_TILES[element_size]
    block_m, block_n, block_k = (
        min(block, max(16, next_power_of_2(size)))
        for block, size in zip(tile[:3], (M, N, max(K, 1)), strict=True)
    )
    num_warps = tile.num_warps if block_m * block_n >= 64 * 64 else min(4, tile.num_warps)
    return tile._replace(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps)


SHARED_MEMORY = 227 * 1024
"""Bytes that a program of the descriptor kernels may need. GPUs with less (Ampere and Ada, and the
Blackwell of workstations) read through pointers; the interpreter has all it wants."""


@cache
def has_room(device: torch.device) -> bool:
    """Whether the buffers of the descriptor kernels fit there."""
    if device.type != "cuda":
        return True
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin >= SHARED_MEMORY


def describable(x: Tensor, *others: Tensor | None) -> bool:
    """Whether all can have tensor descriptors, and are of 16-bit numbers, where there is room.

    A descriptor wants adjacent rows of elements, 16 bytes at least, at multiples of 16 bytes.
    """
    return (
        x.element_size() == 2
        and has_room(x.device)
        and all(
            t is None
            or (
                t.stride(1) == 1
                and t.data_ptr() % 16 == 0
                and t.stride(0) % 8 == 0
                and t.stride(0) >= t.shape[1] >= 8
            )
            for t in (x, *others)
        )
    )


def describe(x: Tensor | None, block: list[int]) -> Any:
    """A tensor descriptor for tiles of this shape."""
    return None if x is None else TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def operands(operator: Operator, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, str]:
    """What tl.dot multiplies, and how: float32 as torch's switch says, rounded for tf32."""
    if a.dtype == torch.float32 and tf32_is_allowed():
        return rounded_to_tf32(operator, a), rounded_to_tf32(operator, b), "tf32"
    return a, b, "ieee"
