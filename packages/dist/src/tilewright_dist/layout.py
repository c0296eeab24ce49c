"""Where every gradient lies: buckets, padding, owners. Pure functions, for any number of ranks.

A bucket is one flat piece of memory that travels in one collective. Tensors lie in it one after
another, each at a multiple of `ALIGNMENT` elements, and W - 1 bounds divide it among the W ranks
where a sharded optimizer wants that. Every rank computes the layout for itself from the same names,
shapes and dtypes, so nothing here communicates; `fingerprint` is what ranks compare.

How a bucket is divided is its partition:

- "replicated": not at all. Every rank updates everything.
- "flat": into equal pieces, which cut through tensors. For element-wise optimizers.
- "matrix": between tensors, each of which has one owner, balanced by cost. For optimizers that look
  at a matrix as a whole.
"""

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Partition = Literal["replicated", "flat", "matrix"]

ALIGNMENT = 256
"""Elements. The block of 8-bit optimizer states: no bound between ranks cuts a block, so that the
states load at any other number of ranks. It also keeps every tensor on 16-byte addresses."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What a layout has to know of a tensor."""

    name: str
    """Name that is unique in a layout."""
    shape: tuple[int, ...]
    """Its shape."""
    dtype: torch.dtype
    """Its dtype, and that of its bucket."""
    strides: tuple[int, ...] = ()
    """Order of its elements in memory; empty for contiguous."""
    partition: Partition = "replicated"
    """How its bucket is divided among the ranks."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size without padding."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Slot:
    """The place of one tensor in a bucket, in elements."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Segment:
    """The part of one tensor that lies in one rank's piece, in elements of the tensor."""

    name: str
    start: int
    stop: int
    offset: int
    """Where the part begins in the bucket."""


@dataclass(frozen=True, kw_only=True)
class BucketLayout:
    """One bucket."""

    dtype: torch.dtype
    """Of all tensors in it."""
    partition: Partition
    """How it is divided."""
    slots: tuple[Slot, ...]
    """Its tensors, by address."""
    bounds: tuple[int, ...]
    """Rank r owns elements bounds[r] to bounds[r + 1]; the last bound is the bucket's size."""

    @property
    def numel(self) -> int:
        """Elements, padding included."""
        return self.bounds[-1]

    def piece(self, rank: int) -> slice:
        """What a rank owns."""
        return slice(self.bounds[rank], self.bounds[rank + 1])

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """The parts of tensors that a rank owns, without padding and empty parts."""
        first, last = self.bounds[rank], self.bounds[rank + 1]
        found = []
        for slot in self.slots:
            start, stop = max(slot.start, first), min(slot.stop, last)
            if start < stop:
                found.append(Segment(slot.name, start - slot.start, stop - slot.start, start))
        return tuple(found)


def plan_buckets(
    specs: Sequence[TensorSpec], world_size: int, *, cap_bytes: int, first_cap_bytes: int
) -> tuple[BucketLayout, ...]:
    """Lay tensors out in buckets, in the order in which their collectives start.

    Args:
        specs: In the order in which gradients are expected.
        world_size: Number of ranks.
        cap_bytes: Size at which a bucket is full. It may be exceeded by the last tensor, since two
            buckets of less would take two collectives.
        first_cap_bytes: The same for the first bucket, smaller so that something travels early.

    Returns:
        The buckets, each of one dtype and one partition.

    Raises:
        ValueError: A cap that is not positive, or no ranks.
    """
    if cap_bytes <= 0 or first_cap_bytes <= 0:
        raise ValueError(f"bucket caps must be positive, not {cap_bytes} and {first_cap_bytes}")
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, not {world_size}")
    owners = balance({s.name: cost(s) for s in specs if s.partition == "matrix"}, world_size)
    return tuple(
        lay_out(bucket, world_size, owners)
        for bucket in assign_buckets(specs, cap_bytes=cap_bytes, first_cap_bytes=first_cap_bytes)
    )


def assign_buckets(
    specs: Sequence[TensorSpec], *, cap_bytes: int, first_cap_bytes: int
) -> list[list[TensorSpec]]:
    """Divide tensors into buckets, sorted by when their last gradient is expected."""
    position = {spec.name: index for index, spec in enumerate(specs)}
    closed: list[list[TensorSpec]] = []
    opened: dict[tuple[torch.dtype, Partition], list[TensorSpec]] = {}
    for spec in specs:
        key = (spec.dtype, spec.partition)
        bucket = opened.setdefault(key, [])
        bucket.append(spec)
        cap = cap_bytes if closed else first_cap_bytes
        if sum(s.num_bytes for s in bucket) >= cap:
            closed.append(opened.pop(key))
    closed += opened.values()
    return sorted(closed, key=lambda bucket: position[bucket[-1].name])


def lay_out(
    specs: Iterable[TensorSpec], world_size: int, owners: Mapping[str, int]
) -> BucketLayout:
    """Give the tensors of one bucket their places, and the ranks their pieces."""
    specs = list(specs)
    dtype, partition = specs[0].dtype, specs[0].partition
    if partition == "matrix":
        specs.sort(key=lambda spec: owners[spec.name])  # stable: pieces are contiguous
    slots: list[Slot] = []
    ends = [0] * world_size
    end = 0
    for spec in specs:
        slots.append(Slot(spec.name, end, end + spec.numel))
        end += round_up(spec.numel, ALIGNMENT)
        if partition == "matrix":
            ends[owners[spec.name]] = end
    if partition == "matrix":
        bounds = [0]
        for rank_end in ends:
            bounds.append(max(bounds[-1], rank_end))
    else:
        piece = round_up(-(-end // world_size), ALIGNMENT)
        bounds = [rank * piece for rank in range(world_size + 1)]
    return BucketLayout(dtype=dtype, partition=partition, slots=tuple(slots), bounds=tuple(bounds))


def balance(costs: Mapping[str, float], world_size: int) -> dict[str, int]:
    """Owners by name: the dearest first, each to the rank with the least so far.

    The largest load exceeds the best possible one by a third at most (Graham 1969,
    doi:10.1137/0117039).
    """
    loads = [0.0] * world_size
    owners = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        rank = min(range(world_size), key=lambda r: loads[r])
        owners[name] = rank
        loads[rank] += costs[name]
    return owners


def cost(spec: TensorSpec) -> float:
    """Relative work of orthogonalizing a tensor's matrices: elements times the shorter side."""
    return float(spec.numel * max(1, min(spec.shape[-2:], default=1)))


def fingerprint(specs: Iterable[TensorSpec], layouts: Iterable[BucketLayout]) -> str:
    """A digest of everything that has to agree between ranks before they exchange memory."""
    text = "\n".join(map(repr, [*specs, *layouts]))
    return hashlib.sha256(text.encode()).hexdigest()


def is_even(bounds: Sequence[int]) -> bool:
    """Whether all ranks' pieces are equally long."""
    return len({b - a for a, b in itertools.pairwise(bounds)}) == 1


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below the value."""
    return -(-value // multiple) * multiple
