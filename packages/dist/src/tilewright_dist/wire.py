"""The exchanges of data parallelism: averages, scattered averages, gathered pieces.

Each is a generator for `Channel.start`. Averages come from the collective itself (AVG), without a
pass that divides. With W ranks and S bytes each rank sends

    all_reduce  2 (W-1)/W · S        reduce_scatter  (W-1)/W · S        all_gather  (W-1)/W · S

A `reduce_dtype` narrower than the gradients halves those bytes without adding in low precision,
which a ring would do at every hop: pieces travel narrow, are added in the gradients' own dtype by
their owner, and the averages travel narrow again. A wider one costs a copy of the buffer.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist

from tilewright_dist.channel import Exchange
from tilewright_dist.layout import is_even


def all_reduce(
    values: torch.Tensor, group: dist.ProcessGroup, reduce_dtype: torch.dtype | None = None
) -> Exchange:
    """Replace contiguous values by their average over the ranks, the same bits on every rank."""
    if values.numel() == 0:
        return
    if reduce_dtype is not None and reduce_dtype.itemsize < values.dtype.itemsize:
        yield from _all_reduce_narrow(values, group, reduce_dtype)
        return
    wire = values if reduce_dtype is None else values.to(reduce_dtype)
    yield dist.all_reduce(wire, op=dist.ReduceOp.AVG, group=group, async_op=True)
    if wire is not values:
        values.copy_(wire)


def all_reduce_any_layout(
    tensor: torch.Tensor, group: dist.ProcessGroup, reduce_dtype: torch.dtype | None = None
) -> Exchange:
    """all_reduce of a tensor of any strides."""
    # Collectives send memory as it lies: a layout of this rank's own must not reach the others.
    values = tensor.detach().contiguous()
    yield from all_reduce(values, group, reduce_dtype)
    if values.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(values)


def reduce_scatter(
    values: torch.Tensor,
    bounds: Sequence[int],
    group: dist.ProcessGroup,
    reduce_dtype: torch.dtype | None = None,
) -> Exchange:
    """Replace this rank's piece of the values by its average; other pieces are undefined then.

    Args:
        values: Flat, contiguous.
        bounds: Rank r owns values[bounds[r] : bounds[r + 1]].
        group: The ranks.
        reduce_dtype: What travels; None is the values' own.
    """
    if values.numel() == 0:
        return
    if reduce_dtype is not None and reduce_dtype.itemsize < values.dtype.itemsize:
        yield from _reduce_scatter_narrow(values, bounds, group, reduce_dtype)
        return
    wire = values if reduce_dtype is None else values.to(reduce_dtype)
    mine = slice(bounds[group.rank()], bounds[group.rank() + 1])
    average = dist.ReduceOp.AVG
    if is_even(bounds):
        yield dist.reduce_scatter_tensor(wire[mine], wire, op=average, group=group, async_op=True)
    else:
        works = [
            dist.reduce(piece, group_dst=rank, op=average, group=group, async_op=True)
            for rank, piece in enumerate(_pieces(wire, bounds))
            if piece.numel()
        ]
        yield from works
    if wire is not values:
        values[mine].copy_(wire[mine])


def all_gather(values: torch.Tensor, bounds: Sequence[int], group: dist.ProcessGroup) -> Exchange:
    """Fill the other ranks' pieces of flat values with what their owners hold."""
    if values.numel() == 0:
        return
    pieces = _pieces(values, bounds)
    if is_even(bounds):
        mine = pieces[group.rank()]
        yield dist.all_gather_into_tensor(values, mine, group=group, async_op=True)
        return
    works = [
        dist.broadcast(piece, group_src=rank, group=group, async_op=True)
        for rank, piece in enumerate(pieces)
        if piece.numel()
    ]
    yield from works


def _all_reduce_narrow(
    values: torch.Tensor, group: dist.ProcessGroup, dtype: torch.dtype
) -> Exchange:
    flat = values.view(-1)
    size = -(-flat.numel() // group.size())
    wire = flat.new_zeros(size * group.size(), dtype=dtype)
    wire[: flat.numel()].copy_(flat)
    received = torch.empty_like(wire)
    yield dist.all_to_all_single(received, wire, group=group, async_op=True)
    mine = wire[size * group.rank() :][:size]
    mine.copy_(_average(received, group.size(), values.dtype))
    yield dist.all_gather_into_tensor(wire, mine, group=group, async_op=True)
    flat.copy_(wire[: flat.numel()])


def _reduce_scatter_narrow(
    values: torch.Tensor, bounds: Sequence[int], group: dist.ProcessGroup, dtype: torch.dtype
) -> Exchange:
    wire = values.to(dtype)
    mine = _pieces(values, bounds)[group.rank()]
    received = wire.new_empty(mine.numel() * group.size())
    sent = [piece.numel() for piece in _pieces(wire, bounds)]
    kept = [mine.numel()] * group.size()
    yield dist.all_to_all_single(received, wire, kept, sent, group=group, async_op=True)
    if mine.numel():
        mine.copy_(_average(received, group.size(), values.dtype))


def _average(received: torch.Tensor, world_size: int, dtype: torch.dtype) -> torch.Tensor:
    # The sum reads narrow and adds wide: no wide copy of what came in.
    return received.view(world_size, -1).sum(0, dtype=dtype).div_(world_size)


def _pieces(values: torch.Tensor, bounds: Sequence[int]) -> list[torch.Tensor]:
    return [values[a:b] for a, b in itertools.pairwise(bounds)]
