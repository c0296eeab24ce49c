"""The exchanges of data parallelism as copies between GPUs, beside which all kernels run on.

The same averages as in `wire.py`, with the same bytes over the link: every rank gets the others'
values for its piece, adds them up, and the others get the averages from it. Only the adding up is a
kernel, which reads as much as is averaged. Pieces are added in the order of ranks, so the bits
depend neither on who adds nor on where a number lies.

Averages push values from wherever they are, so that a gradient need not be copied to a bucket
first: a millisecond or two of a step. What lands, and what is fetched back, is in memory that ranks
share. `all_gather` works on buffers that are shared themselves: it begins with a barrier (what is
fetched has been written) and ends with one (nobody writes again before all have fetched).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch

from tilewright_dist.channel import Exchange
from tilewright_dist.layout import BucketLayout, round_up
from tilewright_dist.peers import PeerBuffer, Peers
from tilewright_dist.stream_operations import Move

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
    dtype, adds_in = _dtypes(values[0].dtype, reduce_dtype)
    memory = landing.as_dtype(dtype)
    rows = memory[peers.rank].view(peers.world_size + 1, -1)
    width = rows.shape[1]
    mine, averages = peers.rank * width, peers.world_size * width
    order = _others_first(peers)
    for load in _loads(values, peers.world_size, width):
        sent = [value if value.dtype == dtype else value.to(dtype) for value, _, _ in load]
        used = load[-1][1] + load[-1][2]
        # Nobody reads these rows any more: all have added up before any came out of the barrier
        # before the last fetching.
        pieces = [
            (rank, value, rank * size, start, min(size, value.numel() - rank * size))
            for rank in order
            for value, (_, start, size) in zip(sent, load, strict=True)
            if rank * size < value.numel()
        ]
        peers.copy([Move(memory[r], mine + at, v, begin, n) for r, v, begin, at, n in pieces])
        peers.barrier()
        _mean(rows[:-1, :used], rows[-1, :used], adds_in)
        peers.barrier()
        peers.copy([Move(v, begin, memory[r], averages + at, n) for r, v, begin, at, n in pieces])
        for value, (target, _, _) in zip(sent, load, strict=True):
            if value is not target:
                target.copy_(value)
    yield None


def scatter_average(
    values: Mapping[str, torch.Tensor],
    layout: BucketLayout,
    landing: PeerBuffer,
    peers: Peers,
    reduce_dtype: torch.dtype | None = None,
) -> Exchange:
    """Replace what this rank owns of tensors by its average; the rest of them stays.

    Args:
        values: Those of the layout by name; flat, contiguous, of one dtype, anywhere.
        layout: Says which rank owns what.
        landing: `landing_bytes` of uint8.
        peers: The ranks.
        reduce_dtype: As in `average`; averages are not rounded, as they do not travel.
    """
    dtype, adds_in = _dtypes(layout.dtype, reduce_dtype)
    memory = landing.as_dtype(dtype)
    rows = memory[peers.rank].view(peers.world_size + 1, -1)
    width = rows.shape[1]
    mine = peers.rank * width
    order = _others_first(peers)
    sent = {n: v if v.dtype == dtype else v.to(dtype) for n, v in values.items()}
    longest = max(b - a for a, b in itertools.pairwise(layout.bounds))
    for first in range(0, longest, width):
        peers.copy(
            [
                Move(memory[rank], mine + at, sent[name], begin, end - begin)
                for rank in order
                for name, begin, end, at in _window(layout, rank, first, width)
            ]
        )
        peers.barrier()
        for name, begin, end, at in _window(layout, peers.rank, first, width):
            _mean(rows[:-1, at : at + end - begin], values[name][begin:end], adds_in)
        peers.barrier()
    yield None


def all_gather(buffer: PeerBuffer, bounds: Sequence[int], peers: Peers) -> Exchange:
    """Fill the other ranks' pieces of a buffer with what their owners hold."""
    peers.barrier()
    peers.copy(
        [
            Move(buffer.memory, bounds[r], buffer.ranks[r], bounds[r], bounds[r + 1] - bounds[r])
            for r in _others_first(peers)[:-1]
            if bounds[r] < bounds[r + 1]
        ]
    )
    peers.barrier()
    yield None


def _mean(rows: torch.Tensor, out: torch.Tensor, adds_in: torch.dtype) -> None:
    """Average over the first dimension, added in a dtype."""
    if out.dtype == adds_in:
        torch.mean(rows, 0, dtype=adds_in, out=out)
    elif rows.is_cuda and adds_in == torch.float32 and out.dtype == rows.dtype:
        # 16 bits are added in float32 there, and rounded once: no averages in float32 in between.
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
