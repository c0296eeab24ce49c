"""The driver's batched operations of a stream, for which torch has no name.

What copies between GPUs cost beside backward is the host: the hooks of backward launch them, and
while they do, nothing else is launched. A batch is one call, whatever is in it: all copies of a
bucket, or a barrier's signals to all ranks and its waits for them. Of a batch that is used again
only the addresses that have changed are computed anew.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Piece(NamedTuple):
    """Part of one of several values, and the place it is copied to or from."""

    value: int
    """Its number."""
    begin: int
    """First element in the value's memory."""
    numel: int
    memory: torch.Tensor
    """Flat, of the values' dtype."""
    at: int
    """First element there."""


class Copies:
    """Copies between values, which lie elsewhere each time, and fixed places: by torch, one by one.

    Args:
        pieces: None of them reads what another one writes, so that any order is right.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces

    def send(self, values: Sequence[torch.Tensor]) -> None:
        """Copy from values, dense ones, to the places."""
        for place, part in self._pairs(values):
            place.copy_(part)

    def fetch(self, values: Sequence[torch.Tensor]) -> None:
        """Copy from the places to values."""
        for place, part in self._pairs(values):
            part.copy_(place)

    def _pairs(self, values: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        flat = [value.as_strided((value.numel(),), (1,)) for value in values]
        return [
            (memory[at : at + numel], flat[value][begin : begin + numel])
            for value, begin, numel, memory, at in self._pieces
        ]


class BatchedCopies(Copies):
    """The same on GPUs, all of them in one call that the copy engines carry out.

    They also do those within a GPU, for which torch takes a kernel's multiprocessors. Where the
    driver takes no batches, they go one by one.

    Args:
        pieces: As above.
        stream: Returns the handle of the stream to queue on.
    """

    def __init__(self, pieces: Sequence[Piece], stream: Callable[[], int]) -> None:
        super().__init__(pieces)
        self._stream = stream
        self._copy = _batched_copies()
        size = pieces[0].memory.element_size() if pieces else 1
        numbers = ctypes.c_uint64 * len(pieces)
        self._places = numbers(*(p.memory.data_ptr() + p.at * size for p in pieces))
        self._lengths = numbers(*(p.numel * size for p in pieces))
        self._parts = numbers()
        self._offsets = [(p.value, p.begin * size) for p in pieces]

    def send(self, values: Sequence[torch.Tensor]) -> None:
        """Copy from values, dense ones, to the places."""
        if not self._batch(self._places, self._parts, values):
            super().send(values)

    def fetch(self, values: Sequence[torch.Tensor]) -> None:
        """Copy from the places to values."""
        if not self._batch(self._parts, self._places, values):
            super().fetch(values)

    def _batch(self, targets: object, sources: object, values: Sequence[torch.Tensor]) -> bool:
        """Whether the driver took them; if not, they may be done once more: they are the same."""
        stream = self._stream()
        # The legacy default stream takes no batches.
        if self._copy is None or stream == 0:
            return False
        if not self._offsets:
            return True
        starts = [value.data_ptr() for value in values]
        self._parts[:] = [starts[value] + offset for value, offset in self._offsets]
        count = len(self._offsets)
        return not self._copy(
            targets, sources, self._lengths, count, _ATTRIBUTES, _FROM_FIRST, 1, stream
        )


_IN_STREAM_ORDER, _BESIDE_KERNELS = 1, 1
_ATTRIBUTES = (ctypes.c_int * 6)(_IN_STREAM_ORDER, 0, 0, 0, 0, _BESIDE_KERNELS)
"""CUmemcpyAttributes: when sources are read, two places (of managed memory only), flags."""
_FROM_FIRST = (ctypes.c_size_t * 1)(0)


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
