"""Buckets as memory: a flat tensor each, and for every tensor in it a view in its own shape."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from tilewright_dist.layout import BucketLayout, Partition, TensorSpec
from tilewright_dist.peers import PeerBuffer, Peers


class Bucket:
    """The memory of one layout, zeros at first.

    Args:
        layout: Where each tensor lies.
        specs: The tensors by name.
        device: Where the memory is.
        shared: Memory that other ranks read, zeros; None allocates.
    """

    def __init__(
        self,
        layout: BucketLayout,
        specs: Mapping[str, TensorSpec],
        device: torch.device,
        shared: PeerBuffer | None = None,
    ) -> None:
        self.layout = layout
        self.shared = shared
        if shared is not None:
            self.memory = shared.memory
        else:
            self.memory = torch.zeros(layout.numel, dtype=layout.dtype, device=device)
        self.views = {
            slot.name: self.memory[slot.start :].as_strided(
                specs[slot.name].shape, specs[slot.name].strides
            )
            for slot in layout.slots
        }

    def piece(self, rank: int) -> torch.Tensor:
        """What a rank owns."""
        return self.memory[self.layout.piece(rank)]


def describe(
    tensors: Mapping[str, torch.Tensor], partitions: Mapping[str, Partition] | None = None
) -> list[TensorSpec]:
    """What layouts have to know of tensors."""
    return [
        TensorSpec(
            name=name,
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            # Of dense tensors the order in memory is kept (channels_last), gaps are not.
            strides=torch.empty_like(tensor, device="meta").stride(),
            partition=(partitions or {}).get(name, "replicated"),
        )
        for name, tensor in tensors.items()
    ]


def has_other_users(tensor: torch.Tensor) -> bool:
    """Whether other tensors, also such as autograd still holds, use the same memory."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) > 2  # the tensor's, and this one


def allocate(
    layouts: Iterable[BucketLayout], specs: Iterable[TensorSpec], device: torch.device
) -> list[Bucket]:
    """Memory for layouts."""
    by_name = {spec.name: spec for spec in specs}
    return [Bucket(layout, by_name, device) for layout in layouts]


def shared_memory(
    layouts: Sequence[BucketLayout], peers: Peers | None
) -> Sequence[PeerBuffer | None]:
    """For each layout memory that other ranks read; None without peers. Collective."""
    if peers is None:
        return [None] * len(layouts)
    return peers.allocate([x.numel for x in layouts], [x.dtype for x in layouts])
