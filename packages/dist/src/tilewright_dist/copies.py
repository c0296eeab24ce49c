"""The exchanges of data parallelism as copies between GPUs, beside which all kernels run on.

The same averages as in `wire.py`, with the same bytes over the link: every rank gets the others'
values for its piece, adds them up, and the others get the averages from it. Only the adding up is a
kernel, which reads as much as is averaged. Pieces are added in the order of ranks, so the bits
depend neither on who adds nor on where a number lies.

Averages push values from wherever they are, so that a gradient need not be copied to a bucket
first: a millisecond or two of a step. What lands, and what is fetched back, is in memory that ranks
share. `Gathering` works on buffers that are shared themselves: it begins with a barrier (what is
fetched has been written) and ends with one (nobody writes again before all have fetched).
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from tilewright_dist.channel import Exchange
from tilewright_dist.layout import BucketLayout, round_up
from tilewright_dist.peers import PeerBuffer, Peers
from tilewright_dist.stream_operations import Copies, Piece

LANDING_BYTES = 64 * 2**20
"""Of values that are averaged at once: more than most buckets hold."""

_ALIGNMENT = 64  # elements between pieces


def landing_bytes(peers: Peers) -> int:
    """Size of the shared memory that averages need: a row a rank, and one of averages."""
    return (peers.world_size + 1) * round_up(LANDING_BYTES // peers.world_size, 512)


class Averaging:
    """Replaces tensors by their averages over the ranks, the same bits on every rank.

    Made once for tensors of some sizes; what can be known of them before is computed here, as the
    host's time beside backward is short.

    Args:
        sizes: Elements of each tensor.
        dtype: Of all tensors.
        landing: `landing_bytes` of uint8.
        peers: The ranks.
        reduce_dtype: What travels if it is narrower than the values, which are added in their own
            dtype then; else that in which they are added. None is the values' own for both.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        dtype: torch.dtype,
        landing: PeerBuffer,
        peers: Peers,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        self._peers = peers
        self._dtype, self._adds_in = _dtypes(dtype, reduce_dtype)
        memory = landing.as_dtype(self._dtype)
        rows = memory[peers.rank].view(peers.world_size + 1, -1)
        width = rows.shape[1]
        mine, averages = peers.rank * width, peers.world_size * width
        self._turns: list[tuple[Copies, torch.Tensor, torch.Tensor, Copies]] = []
        for load in _loads(sizes, peers.world_size, width):
            used = load[-1].at + load[-1].width
            pieces = [
                (part.value, begin, end - begin, memory[rank], part.at)
                for rank in _others_first(peers)
                for part in load
                for begin, end in [part.piece(rank)]
                if begin < end
            ]
            send = peers.copies([Piece(v, b, n, m, mine + at) for v, b, n, m, at in pieces])
            fetch = peers.copies([Piece(v, b, n, m, averages + at) for v, b, n, m, at in pieces])
            self._turns.append((send, rows[:-1, :used], rows[-1, :used], fetch))

    def run(self, values: Sequence[torch.Tensor]) -> Exchange:
        """The exchange of tensors of those sizes, dense, anywhere, ordered alike on all ranks."""
        sent = [v if v.dtype == self._dtype else v.to(self._dtype) for v in values]
        for send, rows, averages, fetch in self._turns:
            # Nobody reads these rows any more: all have added up before any came out of the barrier
            # before the last fetching.
            send.send(sent)
            self._peers.barrier()
            _mean(rows, averages, self._adds_in)
            self._peers.barrier()
            fetch.fetch(sent)
        for value, narrow in zip(values, sent, strict=True):
            if value is not narrow:
                value.copy_(narrow)
        yield None


class Scattering:
    """Replaces what this rank owns of tensors by its average; the rest of them stays.

    Args:
        layout: Says which rank owns what.
        landing: `landing_bytes` of uint8.
        peers: The ranks.
        reduce_dtype: As in `Averaging`; averages are not rounded, as they do not travel.
    """

    def __init__(
        self,
        layout: BucketLayout,
        landing: PeerBuffer,
        peers: Peers,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        self._peers = peers
        self._dtype, self._adds_in = _dtypes(layout.dtype, reduce_dtype)
        memory = landing.as_dtype(self._dtype)
        rows = memory[peers.rank].view(peers.world_size + 1, -1)
        width = rows.shape[1]
        mine = peers.rank * width
        number = {slot.name: index for index, slot in enumerate(layout.slots)}
        self._turns: list[tuple[Copies, list[tuple[int, int, int, torch.Tensor]]]] = []
        longest = max(b - a for a, b in itertools.pairwise(layout.bounds))
        for first in range(0, longest, width):
            send = peers.copies(
                [
                    Piece(number[name], begin, end - begin, memory[rank], mine + at)
                    for rank in _others_first(peers)
                    for name, begin, end, at in _window(layout, rank, first, width)
                ]
            )
            owned = [
                (number[name], begin, end, rows[:-1, at : at + end - begin])
                for name, begin, end, at in _window(layout, peers.rank, first, width)
            ]
            self._turns.append((send, owned))

    def run(self, values: Sequence[torch.Tensor]) -> Exchange:
        """The exchange of the layout's tensors, dense, anywhere."""
        sent = [v if v.dtype == self._dtype else v.to(self._dtype) for v in values]
        for send, owned in self._turns:
            send.send(sent)
            self._peers.barrier()
            for number, begin, end, rows in owned:
                _mean(rows, _flat(values[number])[begin:end], self._adds_in)
            self._peers.barrier()
        yield None


class Gathering:
    """Fills the other ranks' pieces of a buffer with what their owners hold.

    Args:
        buffer: Shared by the ranks.
        bounds: Rank r owns from bounds[r] to bounds[r + 1].
        peers: The ranks.
    """

    def __init__(self, buffer: PeerBuffer, bounds: Sequence[int], peers: Peers) -> None:
        self._peers = peers
        self._values = [buffer.memory]
        self._copies = peers.copies(
            [
                Piece(0, bounds[r], bounds[r + 1] - bounds[r], buffer.ranks[r], bounds[r])
                for r in _others_first(peers)[:-1]
                if bounds[r] < bounds[r + 1]
            ]
        )

    def run(self) -> Exchange:
        """The exchange."""
        self._peers.barrier()
        self._copies.fetch(self._values)
        self._peers.barrier()
        yield None


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor as they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _mean(rows: torch.Tensor, out: torch.Tensor, adds_in: torch.dtype) -> None:
    """Average over the first dimension, added in a dtype."""
    if out.dtype == adds_in:
        torch.mean(rows, 0, dtype=adds_in, out=out)
    elif rows.is_cuda and adds_in == torch.float32 and out.dtype == rows.dtype:
        # 16 bits are added in float32 there, and rounded once: no averages in float32 in between.
        torch.mean(rows, 0, out=out)
    else:
        out.copy_(rows.mean(0, dtype=adds_in))


class _Part(NamedTuple):
    """Elements of a tensor that are averaged at once, a piece by each rank."""

    value: int
    begin: int
    end: int
    at: int
    """Where its pieces begin in a row."""
    width: int
    """Of a piece; the last ones may be shorter."""

    def piece(self, rank: int) -> tuple[int, int]:
        """Begin and end of what a rank averages."""
        begin = self.begin + rank * self.width
        return begin, min(begin + self.width, self.end)


def _loads(sizes: Sequence[int], world_size: int, width: int) -> Iterator[list[_Part]]:
    """What is averaged at once; the same on all ranks, as it depends on sizes only."""
    load: list[_Part] = []
    used = 0
    for value, numel in enumerate(sizes):
        for begin in range(0, numel, world_size * width):
            end = min(numel, begin + world_size * width)
            size = min(width, round_up(-(-(end - begin) // world_size), _ALIGNMENT))
            if used + size > width:
                yield load
                load, used = [], 0
            load.append(_Part(value, begin, end, used, size))
            used += size
    if load:
        yield load


def _window(
    layout: BucketLayout, rank: int, start: int, width: int
) -> Iterator[tuple[str, int, int, int]]:
    """What lies in a part of a rank's piece: tensor, begin and end in it, place in the part."""
    first = layout.bounds[rank] + start
    for segment in layout.segments(rank):
        begin = max(segment.offset, first)
        end = min(segment.offset + segment.stop - segment.start, first + width)
        if begin < end:
            moved = segment.start - segment.offset
            yield segment.name, begin + moved, end + moved, begin - first


def _dtypes(own: torch.dtype, reduce_dtype: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
    """What travels, and in what is added."""
    if reduce_dtype is not None and reduce_dtype.itemsize < own.itemsize:
        return reduce_dtype, own
    return own, reduce_dtype or own


def _others_first(peers: Peers) -> list[int]:
    """All ranks from the next one on, so that no two fetch from one at a time; this one last."""
    return [(peers.rank + turn) % peers.world_size for turn in range(1, peers.world_size + 1)]
