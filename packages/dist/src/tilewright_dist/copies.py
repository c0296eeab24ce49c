"""The exchanges of data parallelism as copies between GPUs, beside which all kernels run on.

The same averages as in `wire.py`, with the same bytes over the link: every rank gets the others'
values for its piece, adds them up, and the others get the averages from it. Only the adding up is a
kernel, which reads as much as is averaged: 10 µs for 25 MiB. Pieces are added in the order of
ranks, so the bits depend neither on who adds nor on where a number lies.

`average` pushes values from wherever they are, so that a gradient need not be copied to a bucket
first: a millisecond or two of a step. What lands, and what is fetched back, is in memory that ranks
share. The others work on buffers that are shared themselves: they begin with a barrier (what is
fetched has been written) and end with one (nobody writes again before all have fetched).
"""

import itertools
from collections.abc import Iterator, Sequence

import torch

from tilewright_dist.channel import Exchange
from tilewright_dist.layout import round_up
from tilewright_dist.peers import SCRATCH_BYTES, PeerBuffer, Peers

LANDING_BYTES = 64 * 2**20
"""Of values that are averaged at once: more than most buckets hold."""

_ALIGNMENT = 64  # elements between pieces


def landing_bytes(peers: Peers) -> int:
    """Size of the shared memory that `average` needs: a row a rank, and one of averages."""
    return (peers.world_size + 1) * round_up(LANDING_BYTES // peers.world_size, 512)


def average(
    values: Sequence[torch.Tensor],
    landing: PeerBuffer,
    peers: Peers,
    reduce_dtype: torch.dtype | None = None,
) -> Exchange:
    """Replace tensors by their averages over the ranks, the same bits on every rank.

    Args:
        values: Flat, contiguous, of one dtype; anywhere.
        landing: `landing_bytes` of uint8.
        peers: The ranks.
        reduce_dtype: What travels if it is narrower than the values, which are added in their own
            dtype then; else that in which they are added. None is the values' own for both.
    """
    if not values:
        return
    own = values[0].dtype
    is_narrow = reduce_dtype is not None and reduce_dtype.itemsize < own.itemsize
    dtype = reduce_dtype if is_narrow and reduce_dtype is not None else own
    adds_in = own if is_narrow else reduce_dtype or own
    rows = [memory.view(dtype).view(peers.world_size + 1, -1) for memory in landing.ranks]
    mine = rows[peers.rank]
    for load in _loads(values, peers.world_size, mine.shape[1]):
        sent = [value if value.dtype == dtype else value.to(dtype) for value, _, _ in load]
        used = load[-1][1] + load[-1][2]
        # Nobody reads these rows any more: all have added up before any came out of the barrier
        # before the last fetching.
        for rank in _others_first(peers):
            for value, (_, start, size) in zip(sent, load, strict=True):
                piece = value[rank * size : (rank + 1) * size]
                rows[rank][peers.rank, start : start + piece.numel()].copy_(piece)
        peers.barrier()
        _mean(mine[:-1, :used], mine[-1, :used], adds_in)
        peers.barrier()
        for rank in _others_first(peers):
            for value, (_, start, size) in zip(sent, load, strict=True):
                piece = value[rank * size : (rank + 1) * size]
                piece.copy_(rows[rank][-1, start : start + piece.numel()])
        for value, (target, _, _) in zip(sent, load, strict=True):
            if value is not target:
                target.copy_(value)
    yield None


def reduce_scatter(
    buffer: PeerBuffer, bounds: Sequence[int], peers: Peers, dtype: torch.dtype | None = None
) -> Exchange:
    """Replace this rank's piece of a buffer by its average; the others' pieces stay.

    Args:
        buffer: The values.
        bounds: Rank r owns elements bounds[r] to bounds[r + 1].
        peers: The ranks.
        dtype: In which they are added; None is the values' own.
    """
    peers.barrier()
    first, last = bounds[peers.rank], bounds[peers.rank + 1]
    for start, stop in _turns(first, last, peers.world_size * buffer.memory.itemsize):
        received = peers.scratch(peers.world_size, stop - start, buffer.memory.dtype)
        for rank in _others_first(peers):
            received[rank].copy_(buffer.ranks[rank][start:stop])
        _mean(received, buffer.memory[start:stop], dtype or buffer.memory.dtype)
    peers.barrier()
    yield None


def reduce_scatter_narrow(
    values: torch.Tensor,
    bounds: Sequence[int],
    landing: PeerBuffer,
    peers: Peers,
    dtype: torch.dtype,
) -> Exchange:
    """The same of values that travel narrow and are added in their own dtype.

    Args:
        values: Flat; anywhere.
        bounds: Rank r owns elements bounds[r] to bounds[r + 1].
        landing: As for `average`.
        peers: The ranks.
        dtype: What travels.
    """
    ranks = [memory.view(dtype).view(peers.world_size + 1, -1)[:-1] for memory in landing.ranks]
    rows = ranks[peers.rank]
    width = rows.shape[1]
    longest = max(b - a for a, b in itertools.pairwise(bounds))
    for start in range(0, longest, width):
        pieces = [
            values[a + start : max(a + start, min(b, a + start + width))]
            for a, b in itertools.pairwise(bounds)
        ]
        for row, piece in zip(rows, pieces, strict=True):
            row[: piece.numel()].copy_(piece)
        peers.barrier()
        mine = pieces[peers.rank]
        received = peers.scratch(peers.world_size, mine.numel(), dtype)
        for rank in _others_first(peers):
            received[rank].copy_(ranks[rank][peers.rank, : mine.numel()])
        _mean(received, mine, values.dtype)
        peers.barrier()
    yield None


def all_gather(buffer: PeerBuffer, bounds: Sequence[int], peers: Peers) -> Exchange:
    """Fill the other ranks' pieces of a buffer with what their owners hold."""
    peers.barrier()
    for rank in _others_first(peers)[:-1]:
        piece = slice(bounds[rank], bounds[rank + 1])
        buffer.memory[piece].copy_(buffer.ranks[rank][piece])
    peers.barrier()
    yield None


def _mean(rows: torch.Tensor, out: torch.Tensor, adds_in: torch.dtype) -> None:
    """Average over the first dimension, added in a dtype."""
    if adds_in == rows.dtype == out.dtype:
        torch.mean(rows, 0, out=out)
    else:
        out.copy_(rows.mean(0, dtype=adds_in))


def _loads(
    values: Sequence[torch.Tensor], world_size: int, width: int
) -> Iterator[list[tuple[torch.Tensor, int, int]]]:
    """What is averaged at once: parts of tensors, where their pieces begin in a row, and the size.

    The same on all ranks, as it depends on sizes only.
    """
    load: list[tuple[torch.Tensor, int, int]] = []
    end = 0
    for value in values:
        for part in value.split(world_size * width) if value.numel() else ():
            size = min(width, round_up(-(-part.numel() // world_size), _ALIGNMENT))
            if end + size > width:
                yield load
                load, end = [], 0
            load.append((part, end, size))
            end += size
    if load:
        yield load


def _turns(first: int, last: int, bytes_an_element: int) -> Iterator[tuple[int, int]]:
    """Parts of a piece that fit into the scratch together with the other ranks'."""
    step = SCRATCH_BYTES // bytes_an_element // 128 * 128
    for start in range(first, last, step):
        yield start, min(last, start + step)


def _others_first(peers: Peers) -> list[int]:
    """All ranks from the next one on, so that no two fetch from one at a time; this one last."""
    return [(peers.rank + turn) % peers.world_size for turn in range(1, peers.world_size + 1)]
