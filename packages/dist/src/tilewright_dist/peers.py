"""Memory that the GPUs of a host read from each other, and signals between their streams.

A collective of NCCL is a kernel: while it runs, it holds multiprocessors that the computation's
kernels expected to have. A product with one block a multiprocessor then takes two rounds instead of
one, however few are missing. Copies between GPUs need none: copy engines carry them out over
NVLink, and waiting for another rank is an operation of the stream, not a kernel that spins.

Here: buffers that every rank can read (torch's symmetric memory), and a barrier in stream order.
What travels through them is in `copies.py`. One host only.
"""

import socket
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symmetric_memory

from tilewright_dist.agreement import gather_objects
from tilewright_dist.layout import round_up
from tilewright_dist.stream_operations import BatchedCopies, Copies, Piece, Signals

T = TypeVar("T")

_ALIGNMENT = 512  # bytes, between buffers of one allocation


class PeerBuffer:
    """Flat memory of this rank, and of all others in the same place.

    Args:
        ranks: The memory of every rank, by rank.
        rank: This one.
        keeps: What has to live as long as they do.
    """

    def __init__(self, ranks: Sequence[torch.Tensor], rank: int, keeps: object = None) -> None:
        self.ranks = ranks
        self.memory = ranks[rank]
        """This rank's own."""
        self._keeps = keeps
        self._views: dict[torch.dtype, list[torch.Tensor]] = {}

    def as_dtype(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """The memory of every rank as flat numbers of a dtype that divides it."""
        if dtype not in self._views:
            self._views[dtype] = [memory.view(dtype) for memory in self.ranks]
        return self._views[dtype]


class Peers(Protocol):
    """Ranks that read each other's memory."""

    rank: int
    """This one."""
    world_size: int
    """Number of ranks."""

    def allocate(self, sizes: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[PeerBuffer]:
        """Buffers of some numbers of elements, zeros; the same on all ranks. Collective."""
        ...

    def copies(self, pieces: Sequence[Piece]) -> Copies:
        """Copies to be made again and again, on the current stream."""
        ...

    def barrier(self) -> None:
        """Let the current stream go on when those of all ranks have come to this point."""
        ...


class GPUPeers(Peers):
    """The GPUs of one host, one a rank, over NVLink or PCIe.

    All ranks call `barrier` equally often, each on one stream.

    Args:
        process_group: The ranks; not kept.
        device: This rank's GPU.

    Raises:
        RuntimeError: On every rank: one of them cannot share memory; `can_copy` asks first.
    """

    def __init__(self, process_group: dist.ProcessGroup, device: torch.device) -> None:
        self.rank, self.world_size = process_group.rank(), process_group.size()
        self._device = device
        self._group_name = process_group.group_name
        self._count = 0
        # Nobody signals before all have their zeros: who has agreed has them.
        (self._numbers,) = made_by_all(
            lambda: self.allocate([self.world_size], [torch.int32]), process_group, device
        )
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        here = self._numbers.memory.data_ptr()
        self._signals = Signals(
            [self._numbers.ranks[rank].data_ptr() + 4 * self.rank for rank in others],
            [here + 4 * rank for rank in others],
        )

    def allocate(self, sizes: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[PeerBuffer]:
        """Buffers of some numbers of elements, zeros; the same on all ranks. Collective."""
        starts, end = [], 0
        for size, dtype in zip(sizes, dtypes, strict=True):
            starts.append(end)
            end += round_up(size * dtype.itemsize, _ALIGNMENT)
        memory = symmetric_memory.empty(max(end, 1), dtype=torch.uint8, device=self._device)
        memory.zero_()
        # Others write from streams of their own, as soon as they have met this rank.
        torch.cuda.synchronize(self._device)
        handle = symmetric_memory.rendezvous(memory, self._group_name)
        buffers = []
        for start, size, dtype in zip(starts, sizes, dtypes, strict=True):
            ranks = [
                memory[start : start + size * dtype.itemsize].view(dtype)
                if rank == self.rank
                else handle.get_buffer(rank, (size,), dtype, start // dtype.itemsize)
                for rank in range(self.world_size)
            ]
            buffers.append(PeerBuffer(ranks, self.rank, handle))
        return buffers

    def copies(self, pieces: Sequence[Piece]) -> Copies:
        """Copies to be made again and again, on the current stream."""
        return BatchedCopies(pieces, self._stream)

    def barrier(self) -> None:
        """Let the current stream go on when those of all ranks have come to this point.

        Each rank has a number in the memory of each other: how often it has come to a barrier.
        """
        stream = self._stream()
        self._count += 1
        self._signals.exchange(self._count, stream)

    def _stream(self) -> int:
        """Handle of the current one.

        Raises:
            RuntimeError: In a graph's capture: replayed, the numbers would be old.
        """
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "copies between GPUs cannot be captured in a CUDA graph, whose replay would signal "
                "the same number again: use transport='collective'"
            )
        return torch.cuda.current_stream(self._device).cuda_stream


def made_by_all(make: Callable[[], T], process_group: dist.ProcessGroup, device: torch.device) -> T:
    """What a function gives, if it succeeds on every rank. Collective.

    Raises:
        RuntimeError: On every rank alike, with the first error of one of them.
    """
    made: list[T] = []
    message = ""
    try:
        made.append(make())
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300]
        message = f"rank {process_group.rank()}: {text or type(error).__name__}"
    found = next(filter(None, gather_objects(message, process_group, device)), "")
    if found:
        raise RuntimeError(found)
    return made[0]


def can_copy(process_group: dist.ProcessGroup, device: torch.device) -> str:
    """Why the ranks cannot read each other's memory, the same on all; empty if they can.

    Collective.
    """
    index = device.index if device.type == "cuda" else None
    places = gather_objects((_boot_id(), index), process_group, device)
    obstacle = ""
    if any(index is None for _, index in places):
        obstacle = "the ranks are not on GPUs"
    elif len({boot for boot, _ in places}) > 1:
        obstacle = "the ranks are on several hosts"
    elif len({index for _, index in places}) < len(places):
        # Or each sees its own one only, by CUDA_VISIBLE_DEVICES.
        obstacle = "the ranks' GPUs have no numbers of their own"
    elif not all(_reads(device, index) for _, index in places):
        obstacle = f"GPU {index} has no access to all others"
    return next(filter(None, gather_objects(obstacle, process_group, device)), "")


def _reads(device: torch.device, index: int | None) -> bool:
    """Whether a GPU can read another's memory."""
    if index is None or index == device.index:
        return index is not None
    return index < torch.cuda.device_count() and torch.cuda.can_device_access_peer(device, index)


def _boot_id() -> str:
    """Of this host: the same in all its processes, also where containers have other names."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()
