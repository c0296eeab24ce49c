"""What tensor descriptors can describe: operands of a product as [outer, inner, rows, columns]."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv
from tilewright_kernels._triton import HAS_TRITON

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor


def varies(name: str, x: Tensor) -> dict[str, int]:
    """Whether an operand has a matrix of its own along each dimension of the batch."""
    outer, inner = x.stride()[:2]
    return {f"{name}_OUTER": int(outer != 0), f"{name}_INNER": int(inner != 0)}


def describable(a: Tensor | None, b: Tensor | None, out: Tensor | None, other: Any) -> bool:
    """Whether tensor descriptors can describe all operands."""
    assert a is not None
    assert b is not None
    assert out is not None
    wide = any(x is not None and x.dtype == torch.float64 for x in (a, out, other))
    if wide or a.shape[-1] == 0 or not has_accelerator(a.device):
        return False
    if not all(_aligned(x) or _aligned(x.mT) for x in (a, b)):
        return False
    return _aligned(out) and (other is None or _aligned(other))


@cache
def has_accelerator(device: torch.device) -> bool:
    """Whether descriptors are the hardware's (Hopper and later) or interpreted."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def _aligned(x: Tensor) -> bool:
    """Whether columns are adjacent, and all else lies at multiples of 16 bytes."""
    unit = 16 // x.element_size()
    *batch, rows, cols = x.shape
    return (
        x.stride(-1) == 1
        and cols >= unit
        and max(rows, cols) < 2**31
        and (rows == 1 or x.stride(-2) >= cols)
        and x.data_ptr() % 16 == 0
        and all(n == 1 or stride % unit == 0 for n, stride in zip(batch, x.stride(), strict=False))
        and (rows == 1 or x.stride(-2) % unit == 0)
    )


def describe(x: Tensor, block: list[int], batched: bool) -> tuple[Any, bool]:
    """A tensor descriptor of [outer, inner, rows, cols] or of its transpose, and which it is.

    Along a dimension of the batch that x is expanded over, it has one matrix.
    """
    transposed = not _aligned(x)
    if transposed:
        x, block = x.mT, block[::-1]
    if batched:
        block = [1, 1, *block]
    used = list(zip(x.shape, x.stride(), strict=True))[-len(block) :]
    unit = 16 // x.element_size()
    anything = cdiv(x.shape[-1], unit) * unit
    sizes = [1 if stride == 0 else n for n, stride in used]
    strides = [anything if n == 1 or stride == 0 else stride for n, stride in used]
    strides[-1] = 1
    return TensorDescriptor(x, sizes, strides, block), transposed
