"""The driver's batched operations of a stream, for which torch has no name.

What copies between GPUs cost beside backward is the host: the hooks of backward launch them, and
while they do, nothing else is launched. A batch is one call, whatever is in it: all copies of a
bucket, or a barrier's signals to all ranks and its waits for them.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Move(NamedTuple):
    """Elements to be copied between two flat tensors of one dtype."""

    target: torch.Tensor
    at: int
    """First element that is written."""
    source: torch.Tensor
    begin: int
    """First element that is read."""
    numel: int


def copy_one_by_one(moves: Sequence[Move]) -> None:
    """Carry out copies by torch, a call each."""
    for target, at, source, begin, numel in moves:
        target[at : at + numel].copy_(source[begin : begin + numel])


def copy_in_a_batch(moves: Sequence[Move], stream: int) -> bool:
    """Queue copies in any order among themselves, by one call; whether the driver took them.

    The copy engines carry them out, also those within a GPU, for which a kernel would be taken.

    Args:
        moves: On GPUs, contiguous; none of them reads what another one writes.
        stream: Handle of the stream.
    """
    # The legacy default stream takes no batches.
    if stream == 0 or not moves:
        return not moves
    copy = _batched_copies()
    if copy is None:
        return False
    sizes = [move.source.element_size() for move in moves]
    numbers = ctypes.c_uint64 * len(moves)
    targets = numbers(
        *(m.target.data_ptr() + m.at * size for m, size in zip(moves, sizes, strict=True))
    )
    sources = numbers(
        *(m.source.data_ptr() + m.begin * size for m, size in zip(moves, sizes, strict=True))
    )
    lengths = numbers(*(m.numel * size for m, size in zip(moves, sizes, strict=True)))
    first = ctypes.c_size_t(0)
    return not copy(
        targets, sources, lengths, len(moves), _ATTRIBUTES, ctypes.byref(first), 1, stream
    )


_IN_STREAM_ORDER, _BESIDE_KERNELS = 1, 1
_ATTRIBUTES = (ctypes.c_int * 6)(_IN_STREAM_ORDER, 0, 0, 0, 0, _BESIDE_KERNELS)
"""CUmemcpyAttributes: when sources are read, two places (of managed memory only), flags."""


@functools.cache
def _batched_copies() -> "ctypes._FuncPointer | None":
    """cuMemcpyBatchAsync as CUDA 13 has it; None where the driver is older."""
    copy = getattr(ctypes.CDLL("libcuda.so.1"), "cuMemcpyBatchAsync_v2", None)
    if copy is not None:
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        copy.argtypes = [pointer, pointer, pointer, size, pointer, pointer, size, pointer]
    return copy


class _Operation(ctypes.Structure):
    """CUstreamBatchMemOpParams of a write or a wait."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint),
        ("padding", ctypes.c_uint64 * 2),
    )


_WAIT, _WRITE = 1, 2


@functools.cache
def _batched_operations() -> "ctypes._FuncPointer":
    """cuStreamBatchMemOp, which writes and awaits numbers in stream order."""
    batch = ctypes.CDLL("libcuda.so.1").cuStreamBatchMemOp_v2
    batch.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint]
    return batch


class Signals:
    """Numbers in memory that a stream writes for others, and awaits from them.

    Args:
        theirs: Addresses of this rank's number at each other rank.
        mine: Addresses here of theirs, in the same order.
    """

    def __init__(self, theirs: Sequence[int], mine: Sequence[int]) -> None:
        self._batch = _batched_operations()
        # A write follows what the stream has written before; a wait with flag 0 ends when the value
        # is at least that, counted cyclically.
        self._operations = (_Operation * (len(theirs) + len(mine)))(
            *(_Operation(kind=_WRITE, address=address) for address in theirs),
            *(_Operation(kind=_WAIT, address=address) for address in mine),
        )

    def exchange(self, number: int, stream: int) -> None:
        """Write a number for all others, then let the stream wait until theirs are as large.

        Raises:
            RuntimeError: The driver refuses.
        """
        for operation in self._operations:
            operation.value = number % 2**32
        error = self._batch(stream, len(self._operations), self._operations, 0)
        if error:
            raise RuntimeError(f"a stream operation between GPUs failed with CUDA error {error}")
