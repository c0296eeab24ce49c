"""The exchanges of data parallelism as copies between GPUs, beside which all kernels run on.

The same averages as in `wire.py`, with the same bytes over the link: a rank fetches its piece of
every other rank's values, adds them up, and the others fetch the averages from it. Only the adding
up is a kernel, of (W-1)/W · S read bytes, 20 µs for 25 MiB. Pieces are added in the order of ranks,
so the bits depend neither on who adds nor on where in a buffer a number lies.

Each exchange begins and ends with a barrier: what is fetched has been written, and nobody writes
again before all have fetched.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch

from tilewright_dist.channel import Exchange
from tilewright_dist.peers import SCRATCH_BYTES, PeerBuffer, Peers


def all_reduce(
    buffer: PeerBuffer, bounds: Sequence[int], peers: Peers, dtype: torch.dtype | None = None
) -> Exchange:
    """Replace a buffer by its average over the ranks, the same bits on every rank.

    Args:
        buffer: The values.
        bounds: Rank r adds up elements bounds[r] to bounds[r + 1].
        peers: The ranks.
        dtype: In which they are added; None is the values' own.
    """
    yield from reduce_scatter(buffer, bounds, peers, dtype)
    yield from _gather(buffer, bounds, peers)


def reduce_scatter(
    buffer: PeerBuffer, bounds: Sequence[int], peers: Peers, dtype: torch.dtype | None = None
) -> Exchange:
    """Replace this rank's piece of a buffer by its average; the others' pieces stay."""
    peers.barrier()
    first, last = bounds[peers.rank], bounds[peers.rank + 1]
    for start, stop in _turns(first, last, peers.world_size * buffer.memory.itemsize):
        received = peers.scratch(peers.world_size, stop - start, buffer.memory.dtype)
        for rank in _others_first(peers):
            received[rank].copy_(buffer.ranks[rank][start:stop])
        mine = buffer.memory[start:stop]
        if dtype is None:
            torch.mean(received, 0, out=mine)
        else:
            mine.copy_(received.mean(0, dtype=dtype))
    peers.barrier()
    yield None


def all_gather(buffer: PeerBuffer, bounds: Sequence[int], peers: Peers) -> Exchange:
    """Fill the other ranks' pieces of a buffer with what their owners hold."""
    peers.barrier()
    yield from _gather(buffer, bounds, peers)


def all_reduce_narrow(
    values: torch.Tensor, bounds: Sequence[int], wire: PeerBuffer, peers: Peers
) -> Exchange:
    """The average of values that travel narrow and are added in their own dtype.

    Args:
        values: Flat; anywhere.
        bounds: Rank r adds up elements bounds[r] to bounds[r + 1].
        wire: What travels, in its dtype; of any size.
        peers: The ranks.
    """
    for pieces in _narrow_turns(values, bounds, wire, peers):
        average = _averaged(pieces, wire, peers, values.dtype)
        rows = wire.memory.view(peers.world_size, -1)
        rows[peers.rank, : average.numel()].copy_(average)
        peers.barrier()
        for rank in _others_first(peers)[:-1]:
            size = pieces[rank].numel()
            there = wire.ranks[rank].view(peers.world_size, -1)
            rows[rank, :size].copy_(there[rank, :size])
        for rank, piece in enumerate(pieces):
            piece.copy_(rows[rank, : piece.numel()])
        peers.barrier()
    yield None


def reduce_scatter_narrow(
    values: torch.Tensor, bounds: Sequence[int], wire: PeerBuffer, peers: Peers
) -> Exchange:
    """The same for this rank's piece only; the others' pieces stay."""
    for pieces in _narrow_turns(values, bounds, wire, peers):
        pieces[peers.rank].copy_(_averaged(pieces, wire, peers, values.dtype))
        peers.barrier()
    yield None


def _gather(buffer: PeerBuffer, bounds: Sequence[int], peers: Peers) -> Exchange:
    """Fetch what the last barrier made valid; then the closing one."""
    for rank in _others_first(peers)[:-1]:
        piece = slice(bounds[rank], bounds[rank + 1])
        buffer.memory[piece].copy_(buffer.ranks[rank][piece])
    peers.barrier()
    yield None


def _narrow_turns(
    values: torch.Tensor, bounds: Sequence[int], wire: PeerBuffer, peers: Peers
) -> Iterator[list[torch.Tensor]]:
    """Every rank's piece, or as much of it as goes at once, written to the wire."""
    rows = wire.memory.view(peers.world_size, -1)
    width = rows.shape[1]
    longest = max(b - a for a, b in itertools.pairwise(bounds))
    for start in range(0, longest, width):
        pieces = [
            values[a + start : max(a + start, min(b, a + start + width))]
            for a, b in itertools.pairwise(bounds)
        ]
        for row, piece in zip(rows, pieces, strict=True):
            row[: piece.numel()].copy_(piece)
        yield pieces


def _averaged(
    pieces: Sequence[torch.Tensor], wire: PeerBuffer, peers: Peers, dtype: torch.dtype
) -> torch.Tensor:
    """The average of this rank's piece, from what all have written to the wire."""
    size = pieces[peers.rank].numel()
    peers.barrier()
    received = peers.scratch(peers.world_size, size, wire.memory.dtype)
    for rank in _others_first(peers):
        received[rank].copy_(wire.ranks[rank].view(peers.world_size, -1)[peers.rank, :size])
    return received.mean(0, dtype=dtype)


def _turns(first: int, last: int, bytes_an_element: int) -> Iterator[tuple[int, int]]:
    """Parts of a piece that fit into the scratch together with the other ranks'."""
    step = SCRATCH_BYTES // bytes_an_element // 128 * 128
    for start in range(first, last, step):
        yield start, min(last, start + step)


def _others_first(peers: Peers) -> list[int]:
    """All ranks from the next one on, so that no two fetch from one at a time; this one last."""
    return [(peers.rank + turn) % peers.world_size for turn in range(1, peers.world_size + 1)]
