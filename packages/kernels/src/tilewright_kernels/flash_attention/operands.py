"""How q, k and v reach the kernels of the forward: by tensor descriptor where they can have one."""

from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv
from tilewright_kernels._tf32 import tf32_is_allowed
from tilewright_kernels._triton import HAS_TRITON

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor


def sources(
    tensors: tuple[Tensor, ...], rows: tuple[int, ...], widths: tuple[int, ...]
) -> tuple[tuple[Any, ...], bool]:
    """Descriptors of [B, T, H, D] tensors where all can have one, else the tensors themselves.

    Args:
        tensors: with adjacent columns.
        rows: of the tiles that are read of each.
        widths: of the tiles, powers of two; columns past a tensor's own are read as zeros.

    Returns:
        What the kernel gets, and whether it is descriptors: of [B, H, T, D], blocks of one head.
    """
    if not describable(*tensors):
        return tensors, False
    described = zip(tensors, rows, widths, strict=True)
    return tuple(_describe(x, row, width) for x, row, width in described), True


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Those of the batch, the rows and the heads, one tensor after another."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def strides_of(x: Tensor | None) -> tuple[int, ...]:
    """Those of a number a query, [B, H, T]; zeros for what there is not."""
    return (0, 0, 0) if x is None else x.stride()


def dot_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: it matters for float32 alone, and is torch's setting."""
    tf32 = dtype == torch.float32 and tf32_is_allowed()
    return "tf32" if tf32 else "ieee"


def describable(*tensors: Tensor) -> bool:
    """Whether all can have a descriptor: rows of [B, T, H, D] at multiples of 16 bytes."""
    return all(map(_describable, tensors))


def _describable(x: Tensor) -> bool:
    unit = 16 // x.element_size()
    return (
        x.dtype != torch.float64
        and x.numel() > 0
        and x.stride(3) == 1
        and x.shape[3] >= unit
        and x.data_ptr() % 16 == 0
        and all(
            n == 1 or (stride > 0 and stride % unit == 0)
            for n, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
        )
    )


def extents(x: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """[B, T, H, D] as a descriptor wants it: [B, H, T, D], its shape and its strides."""
    x = x.transpose(1, 2)
    unit = 16 // x.element_size()
    anything = cdiv(x.shape[3], unit) * unit
    steps = [anything if n == 1 else step for n, step in zip(x.shape, x.stride(), strict=True)]
    return x, list(x.shape), [*steps[:3], 1]


def _describe(x: Tensor, rows: int, width: int) -> Any:
    return TensorDescriptor(*extents(x), [1, 1, rows, width])
