"""Tiles of the two kernels, and which operands tensor descriptors can describe."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._product_tiles import Tile, fitted
from tilewright_kernels._triton import HAS_TRITON

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

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
    return fitted(POINTER_TILES[element_size], M, N, K)


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
