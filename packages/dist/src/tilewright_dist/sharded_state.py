"""States of a sharded optimizer: in pieces, whole, and in other pieces. No pickle.

A state belongs to a segment [start, stop) of its parameter's elements, in the order of memory. What
a state tensor covers shows in its size: one value an element (moments), one a block of 256 (scales
of 8-bit moments), or one for the whole (a 0-d tensor: step counts). Anything else is the state of
an undivided matrix and is kept as it is.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from tilewright_dist.agreement import gather_objects
from tilewright_dist.layout import ALIGNMENT, Segment, TensorSpec
from tilewright_dist.param_groups import options_of

States = Mapping[str, tuple[Segment, Mapping[str, Any]]]
"""Segment and states by parameter name."""


def to_tensors(states: States) -> dict[str, torch.Tensor]:
    """The tensors by «parameter name.state», each with memory of its own."""
    tensors = {}
    for name, (_, state) in states.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                # Step counts may be views of one tensor, which a file would hold once for each.
                shares = value.untyped_storage().nbytes() != value.nbytes
                tensors[f"{name}.{key}"] = value.clone() if shares else value
    return tensors


def to_numbers(states: States) -> dict[str, dict[str, Any]]:
    """What is no tensor, by parameter name and state."""
    numbers = {}
    for name, (_, state) in states.items():
        plain = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
        if plain:
            numbers[name] = plain
    return numbers


def to_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options as numbers."""
    return {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def restored(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """Saved options in the types that the group has: JSON knows neither tuples nor tensors."""
    options = {}
    for key, value in options_of(saved).items():
        now = current.get(key)
        if isinstance(now, tuple) and isinstance(value, list):
            value = tuple(value)
        elif isinstance(now, torch.Tensor) and not isinstance(value, torch.Tensor):
            value = torch.full_like(now, value)
        options[key] = value
    return options


def assemble(
    saved: Sequence[tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]],
    owned: Mapping[str, tuple[torch.Tensor, Segment]],
) -> dict[str, dict[str, Any]]:
    """States of this rank's pieces, from what the owners of other pieces saved.

    Raises:
        ValueError: Elements of a state that nobody saved.
    """
    keys: dict[str, set[str]] = {name: set() for name in owned}
    for tensors, _ in saved:
        for full in tensors:
            name, _, key = full.rpartition(".")
            if name in owned:
                keys[name].add(key)
    pieces: dict[str, dict[str, Any]] = {}
    for name, (piece, segment) in owned.items():
        state: dict[str, Any] = {}
        for _, layout in saved:
            state |= layout["numbers"].get(name, {})
        for key in sorted(keys[name]):
            parts = [
                (_segment_of(name, layout), tensors[f"{name}.{key}"])
                for tensors, layout in saved
                if f"{name}.{key}" in tensors
            ]
            state[key] = _join(parts, segment, piece.shape, piece.stride(), key)
        if state:
            pieces[name] = state
    return pieces


def _segment_of(name: str, layout: Mapping[str, Any]) -> Segment:
    start, stop = layout["pieces"][name]
    return Segment(name, start, stop, 0)


def cut(
    states: Mapping[str, Mapping[str, Any]],
    sizes: Mapping[str, int],
    owned: Mapping[str, tuple[torch.Tensor, Segment]],
) -> dict[str, dict[str, Any]]:
    """This rank's part of whole states.

    Args:
        states: By parameter.
        sizes: Elements of each parameter.
        owned: Pieces of this rank.
    """
    pieces: dict[str, dict[str, Any]] = {}
    for name, (piece, segment) in owned.items():
        if name in states:
            whole = Segment(name, 0, sizes[name], 0)
            pieces[name] = {
                key: _join([(whole, value)], segment, piece.shape, piece.stride(), key)
                for key, value in states[name].items()
            }
    return pieces


def collect(
    states: States,
    specs: Iterable[TensorSpec],
    process_group: dist.ProcessGroup,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Whole states on the CPU of rank 0, empty elsewhere. Collective."""
    described = {
        name: (
            segment,
            {
                key: (tuple(v.shape), v.dtype) if isinstance(v, torch.Tensor) else v
                for key, v in state.items()
            },
        )
        for name, (segment, state) in states.items()
    }
    whole: dict[str, dict[str, Any]] = {}
    everyone = gather_objects(described, process_group, device)
    for spec in specs:
        name = spec.name
        owners = [rank for rank, held in enumerate(everyone) if name in held and held[name][1]]
        for key in everyone[owners[0]][name][1] if owners else ():
            parts = []
            for rank in owners:
                segment, entries = everyone[rank][name]
                mine = states[name][1][key] if rank == process_group.rank() else None
                value = _send_to_first(mine, entries[key], rank, process_group, device)
                parts.append((segment, value))
            if process_group.rank() == 0:
                target = Segment(name, 0, spec.numel, 0)
                joined = _join(parts, target, spec.shape, spec.strides, key)
                whole.setdefault(name, {})[key] = joined
    return whole


def _send_to_first(
    value: Any,
    entry: Any,
    rank: int,
    process_group: dist.ProcessGroup,
    device: torch.device,
) -> Any:
    """A value that one rank holds, on the CPU of rank 0."""
    if not isinstance(entry, tuple) or not isinstance(entry[1], torch.dtype):
        return entry
    if rank == 0:
        return value.detach().cpu() if value is not None else None
    shape, dtype = entry
    if value is not None:
        # As bytes: no backend moves every dtype.
        data = value.detach().to(device).contiguous().view(-1).view(torch.uint8)
        dist.send(data, group=process_group, group_dst=0)
    if process_group.rank() == 0:
        size = math.prod(shape) * dtype.itemsize
        data = torch.empty(size, dtype=torch.uint8, device=device)
        dist.recv(data, group=process_group, group_src=rank)
        return data.cpu().view(dtype).view(shape)
    return None


def _join(
    parts: Sequence[tuple[Segment, Any]],
    target: Segment,
    shape: Sequence[int],
    strides: Sequence[int],
    key: str,
) -> Any:
    """A state of the target segment, whose piece has this shape, from those of other segments."""
    segment, first = parts[0]
    if not isinstance(first, torch.Tensor) or first.dim() == 0:
        return first.clone() if isinstance(first, torch.Tensor) else first
    unit = _unit(first, segment)
    if unit is None:
        if (segment.start, segment.stop) != (target.start, target.stop):
            raise ValueError(
                f"state {key!r} of {target.name!r} has shape {tuple(first.shape)}, which cannot be "
                "divided: load it with the partition that it was saved with"
            )
        return first.clone()
    joined = first.new_empty(-(-(target.stop - target.start) // unit))
    covered = 0
    for segment, value in parts:
        start, stop = max(segment.start, target.start), min(segment.stop, target.stop)
        if start < stop:
            count = -(-(stop - start) // unit)
            source = _in_memory_order(value)[(start - segment.start) // unit :][:count]
            joined[(start - target.start) // unit :][:count].copy_(source)
            covered += stop - start
    if covered != target.stop - target.start:
        raise ValueError(
            f"{covered} of {target.stop - target.start} elements of state {key!r} of "
            f"{target.name!r} were saved: pass what all ranks saved"
        )
    return joined.as_strided(tuple(shape), tuple(strides)) if unit == 1 else joined


def _unit(value: torch.Tensor, segment: Segment) -> int | None:
    """Elements of the parameter for one of the state; None if it cannot be divided."""
    length = segment.stop - segment.start
    if value.numel() == length:
        return 1
    return ALIGNMENT if value.numel() == -(-length // ALIGNMENT) and value.dim() == 1 else None


def _in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.as_strided((tensor.numel(),), (1,))
