"""Tables on the device that let one launch work on any number of tensors of any sizes.

The work table holds, as int64, columns of addresses, a column of sizes, and the list of chunks;
program i takes chunk i. All chunks but a tensor's last are of one size, so tensors of one element
and of hundreds of millions are balanced by the GPU's own scheduler.

    columns[0][0 … T)  …  columns[K - 1][0 … T)  |  sizes[0 … T)  |  chunks[0 … C)
    chunk = tensor << 32 | ordinal:  elements ordinal · CHUNK … of that tensor

Gradients change address when `zero_grad` frees them, so theirs is a table of its own, small enough
to be sent anew. A table is never written again once it was sent: a changed address makes a new one.
That needs no synchronization with launches under way, and a captured CUDA graph keeps the tables
that it was captured with.
"""

from array import array
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright_kernels.authoring import tl, triton
from tilewright_optim._arguments import is_capturing


@triton.jit
def element(address, DTYPE: tl.constexpr, index, ALIGNED: tl.constexpr):
    """Pointer to element `index` of the tensor at an address; ALIGNED: it is a multiple of 16.

    A hint stays only with an operation of the same function, so it cannot be given by callers.
    """
    pointer = address.to(tl.pointer_type(DTYPE)) + index  # pyrefly: ignore[bad-argument-type]
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Where the tensors' elements begin."""
    return list(map(Tensor.data_ptr, tensors))


@cache
def triton_type(dtype: torch.dtype) -> Any:
    """Triton's type of a tensor's elements."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def chunk_list(sizes: Sequence[int], chunk: int) -> Tensor:
    """Chunks of tensors of these sizes, int64 [C]; empty tensors have none."""
    elements = torch.tensor(sizes, dtype=torch.int64)
    counts = (elements + chunk - 1) // chunk
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    ordinal = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
    return tensor << 32 | ordinal


class Tables(NamedTuple):
    """What one launch is given.

    Attributes:
        work: int64 [(K + 1) · T + C], as above.
        grads: int64 [T], addresses of the gradients.
        num_chunks: C.
    """

    work: Tensor
    grads: Tensor
    num_chunks: int


class PointerTables:
    """Makes the tables of successive launches; keeps those on the device that still hold.

    Args:
        device: where the tensors are.
        chunk: elements in a chunk, a multiple of 16.
    """

    def __init__(self, device: torch.device, chunk: int) -> None:
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        self._tables = Tables(nothing, nothing, 0)
        self._work_key: list[list[int]] = []
        self._grads_key: list[int] = []
        self._device = device
        self._chunk = chunk
        self._stream = 0
        self._captured: list[Tensor] = []

    def get(self, columns: Sequence[list[int]], sizes: list[int], grads: list[int]) -> Tables:
        """Tables with these contents; what has changed since the last call is sent.

        Args:
            columns: K lists of T addresses, or other integers that seldom change.
            sizes: elements of each tensor.
            grads: addresses of the gradients.
        """
        capturing = is_capturing(self._device)
        if self._device.type == "cuda" and not capturing:
            self._follow_stream()
        tables, work_key = self._tables, [*columns, sizes]
        if not _are_equal(work_key, self._work_key):
            chunks = chunk_list(sizes, self._chunk)
            work = torch.cat([_int64(chain.from_iterable(work_key)), chunks])
            tables = tables._replace(work=self._send(work, capturing), num_chunks=len(chunks))
        if grads is not self._grads_key and grads != self._grads_key:
            tables = tables._replace(grads=self._send(_int64(grads), capturing))
        if capturing:
            # Not for later steps: what is sent in a capture arrives when the graph is replayed.
            self._captured += [tables.work, tables.grads]
        else:
            self._tables, self._work_key, self._grads_key = tables, work_key, grads
        return tables

    def _send(self, table: Tensor, capturing: bool) -> Tensor:
        """Copy to the device, without waiting for it."""
        if self._device.type != "cuda":
            return table
        table = table.pin_memory()
        if capturing:
            self._captured.append(table)  # each replay copies from it again
        return table.to(self._device, non_blocking=True)

    def _follow_stream(self) -> None:
        """Tell the allocator when launches move to another stream than the tables were made on."""
        current = torch._C._cuda_getCurrentRawStream(self._tables.work.get_device())
        if current != self._stream:  # torch's object for it costs as much as all else here
            self._stream = current
            stream = torch.cuda.current_stream(self._device)
            self._tables.work.record_stream(stream)
            self._tables.grads.record_stream(stream)


def _int64(values: Iterable[int]) -> Tensor:
    """Integers, at least one; torch.tensor takes four times as long."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)


def _are_equal(ours: list[list[int]], theirs: list[list[int]]) -> bool:
    """Whether lists of lists are equal; a list that is itself is not gone through."""
    return len(ours) == len(theirs) and all(
        a is b or a == b for a, b in zip(ours, theirs, strict=True)
    )
