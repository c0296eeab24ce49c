"""Proof that nobody else can change a tensor, because nobody else can get at it.

CPython counts the references to an object, and torch those to a tensor and to its memory. Where all
are an optimizer's own, no `.data =`, no alias and no view can move the tensor or its memory, until
somebody gets it from the optimizer's state, which that takes note of (`_watched`). So a thousand
states need no look at each step, and none of their memory is touched.

What walks all objects (`gc.get_objects`) gets at everything without a reference.
"""

import sys
from collections.abc import Sequence
from typing import Any
from weakref import getweakrefcount

import torch
from torch import Tensor

_ADDRESS = getattr(torch._C, "_storage_address", None)
_USES = getattr(torch._C, "_storage_Use_Count", None)
_TENSOR_USES = getattr(Tensor, "_use_count", None)

# Threads without the interpreter's lock count references of their own.
_COUNTED = getattr(sys, "_is_gil_enabled", lambda: True)()


def held_by(containers: int, tensors: Sequence[Tensor], *, with_memory: bool = True) -> bool:
    """Whether each is in so many containers, and nothing else refers to it or to its memory.

    It takes 1 to 2 µs a tensor, and is False where it cannot be known.

    Args:
        containers: lists, dicts and so on, `tensors` among them.
        tensors: plain ones, without repetition.
        with_memory: whether aliases count; without, only what leads to these objects does.
    """
    if not _COUNTED or None in (_ADDRESS, _USES, _TENSOR_USES):
        return False
    # What interpreter and torch add of their own differs by version: it is counted here.
    sample = [torch.empty(1)]
    kept = [list(sample) for _ in range(containers - 1)]
    result = _references(tensors) <= _references(sample)
    if result and with_memory:
        result = _memory_references(tensors) <= _memory_references(sample)
    del kept
    return result


def _references(tensors: Sequence[Tensor]) -> set[Any]:
    counts: Any = _TENSOR_USES
    return set(
        zip(
            map(sys.getrefcount, tensors),
            map(getweakrefcount, tensors),
            map(counts, tensors),
            strict=True,
        )
    )


def _memory_references(tensors: Sequence[Tensor]) -> set[Any]:
    storages = list(map(Tensor.untyped_storage, tensors))
    place: Any = _ADDRESS
    uses: Any = _USES
    return set(
        zip(
            map(sys.getrefcount, storages),
            map(getweakrefcount, storages),
            map(uses, map(place, tensors)),
            strict=True,
        )
    )
