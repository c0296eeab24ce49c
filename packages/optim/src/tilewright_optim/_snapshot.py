"""Whether tensors are what they were a step before: where they lie, and how.

A tensor object stays while `.data`, `set_`, `resize_` and `swap_tensors` change what is behind it.
To ask a thousand of them for address, size, strides and dtype one by one takes longer than the rest
of an optimizer's step, so both questions are put to torch in one call each: 0.1 µs a tensor. Those
calls are not of torch's documented surface; where one is missing, tensors are asked one by one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_POINTERS_EQUAL = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
"""`lie_at` in one call, half its time with cold caches; in torch built with CUDA."""

_GUARDS = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)
"""What torch.compile compares arguments by: types, dispatch keys, dtypes, devices, sizes, strides.
They also refuse a tensor that is given twice, and another mode of gradients or of inference."""

_SLICE = 96
"""Tensors of a guard: it looks for repetitions among them in a table that fits the first cache.

A multiple of many numbers of tensors that layers have."""

Check = Callable[[Sequence[Any]], bool]


def lie_at(tensors: list[Tensor], places: list[int], indices: list[int]) -> bool:
    """Whether tensors are at these addresses.

    Args:
        tensors: at least one.
        places: as many.
        indices: of those to look at.
    """
    if _POINTERS_EQUAL is None:
        return all(tensors[i].data_ptr() == places[i] for i in indices)
    return _POINTERS_EQUAL(tensors, places, indices)


def like(tensors: Sequence[Tensor]) -> Check:
    """A function that says whether others, as many, have these tensors' types and layouts.

    A layout is dtype, device, sizes, strides and whether there is a negative bit. No tensor is kept
    alive. In another mode of gradients or inference than now it may say no.
    """
    if _GUARDS is not None:
        try:
            guarded = _guarded(tensors)
            if guarded(tensors):
                return guarded
        except (TypeError, RuntimeError):  # of another signature; of a tensor without strides
            pass
    traits = list(map(_traits, tensors))
    return lambda others: list(map(_traits, others)) == traits


def _guarded(tensors: Sequence[Tensor]) -> Check:
    """Guards of a slice each; alike slices, as of equal layers, share one, which stays in cache."""
    parts: list[tuple[Any, slice]] = []
    made: list[Any] = []
    for start in range(0, len(tensors), _SLICE):
        part = slice(start, start + _SLICE)
        some = tensors[part]
        same_number = made if len(some) == _SLICE else []
        check = next((check for check in same_number if check(*some)), None)
        if check is None:
            guards: Any = _GUARDS
            check = guards(*some, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
            same_number.append(check)
        parts.append((check, part))
    return lambda others: all(check(*others[part]) for check, part in parts)


def _traits(tensor: Any) -> tuple[Any, ...]:
    if not isinstance(tensor, Tensor):
        return (type(tensor),)
    if tensor.layout is not torch.strided:
        return type(tensor), tensor.layout
    strides, negative = tensor.stride(), tensor.is_neg()
    return type(tensor), tensor.dtype, tensor.device, tensor.shape, strides, negative
