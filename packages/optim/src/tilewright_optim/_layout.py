"""One memory layout for a parameter, its gradient and its states, for kernels to walk abreast.

The kernels take element i of each to lie at offset i. That is so when all are contiguous, or dense
with the same strides (channels_last weights, say), which is how autograd makes gradients and
`zeros_like` makes states. What lies otherwise, or is the negative of what lies there (a view such
as `z.conj().imag`), goes through a copy.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Columns = Sequence[Sequence[Tensor]]


class Aligned(NamedTuple):
    """Tensors that lie alike; `copies` pairs each written original with its stand-in."""

    grads: Sequence[Tensor]
    written: Columns
    copies: Sequence[tuple[Tensor, Tensor]]


def aligned(grads: Sequence[Tensor], written: Columns) -> Aligned:
    """Make the tensors at each index lie in memory alike, by copying those that lie otherwise.

    Args:
        grads: gradients, which the kernel reads.
        written: parameters, then columns of states, which the kernel reads and writes. A dense
            parameter's strides are the ones kept.
    """
    columns = (grads, *written)
    if all(all(map(lies_plain, column)) for column in columns):
        return Aligned(grads, written, ())
    new_columns: list[list[Tensor]] = [[] for _ in columns]
    copies = []
    for row in zip(*columns, strict=True):
        # empty_like keeps the strides of a dense tensor and makes a sliced one contiguous.
        strides = torch.empty_like(row[1], device="meta").stride()
        for i, tensor in enumerate(row):
            if _has_strides(tensor, strides) and not tensor.is_neg():
                new_columns[i].append(tensor)
                continue
            copy = torch.empty_strided(
                tensor.shape, strides, dtype=tensor.dtype, device=tensor.device
            ).copy_(tensor)
            new_columns[i].append(copy)
            if i > 0:
                copies.append((tensor, copy))
    return Aligned(new_columns[0], new_columns[1:], copies)


def lies_plain(tensor: Tensor) -> bool:
    """Whether its elements are, in order, what lies at its address."""
    return tensor.is_contiguous() and not tensor.is_neg()


def _has_strides(tensor: Tensor, strides: Sequence[int]) -> bool:
    """Whether tensor has these strides; along dimensions of size 1 any will do."""
    dims = zip(tensor.shape, tensor.stride(), strides, strict=True)
    return all(ours == theirs for size, ours, theirs in dims if size > 1)


def memory_order(x: Tensor) -> list[int]:
    """x's dimensions as `empty_like` orders them in memory, the slowest first."""
    strides = torch.empty_like(x, device="meta").stride()
    return sorted(range(x.dim()), key=lambda i: strides[i], reverse=True)


def in_memory_order(x: Tensor) -> Tensor:
    """x's elements [size] as they lie in memory."""
    return x.permute(memory_order(x)).reshape(-1)


def like_in_memory(elements: Tensor, like: Tensor) -> Tensor:
    """The inverse: a tensor of like's shape and strides that holds elements [size]."""
    out = torch.empty_like(like, dtype=elements.dtype)
    ordered = out.permute(memory_order(like))
    ordered.copy_(elements.view(ordered.shape))
    return out


def lies_dense(x: Tensor) -> bool:
    """Whether x's elements fill their memory without gaps, in whatever order."""
    return x.is_contiguous() or _has_strides(x, torch.empty_like(x, device="meta").stride())
