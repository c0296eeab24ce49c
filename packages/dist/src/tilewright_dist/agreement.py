"""Values that have to be the same on all ranks, compared before anything depends on them."""

from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def gather_objects(value: T, process_group: dist.ProcessGroup, device: torch.device) -> list[T]:
    """Every rank's value, by rank of the group. Collective; values travel pickled."""
    values: list[T | None] = [None] * process_group.size()
    # NCCL moves objects through the current device, which a caller may have left at 0 on all ranks.
    with torch.cuda.device(device.index if device.type == "cuda" else -1):
        dist.all_gather_object(values, value, group=process_group)
    return values  # pyrefly: ignore


def verify_agreement(
    what: str, value: str, process_group: dist.ProcessGroup, device: torch.device
) -> None:
    """Check that a short text is the same on all ranks.

    Raises:
        ValueError: On every rank alike, with the ranks that hold each value.
    """
    holders: dict[str, list[int]] = {}
    ranks = dist.get_process_group_ranks(process_group)
    for rank, held in zip(ranks, gather_objects(value, process_group, device), strict=True):
        holders.setdefault(held, []).append(rank)
    if len(holders) > 1:
        listed = "; ".join(
            f"{held} on ranks {', '.join(map(str, who))}" for held, who in holders.items()
        )
        raise ValueError(f"{what} differs between ranks: {listed}. Pass the same on every rank")


def from_first(value: T, process_group: dist.ProcessGroup, device: torch.device) -> T:
    """The value of rank 0 of the group. Collective; it travels pickled."""
    held = [value]
    with torch.cuda.device(device.index if device.type == "cuda" else -1):
        dist.broadcast_object_list(held, group=process_group, group_src=0)
    return held[0]
