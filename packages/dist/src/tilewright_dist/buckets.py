"""Buckets as memory: a flat tensor each, and for every tensor in it a view in its own shape."""

from collections.abc import Iterable, Mapping

import torch

from tilewright_dist.layout import BucketLayout, Partition, TensorSpec


class Bucket:
    """The memory of one layout, zeros at first.

    Args:
        layout: Where each tensor lies.
        specs: The tensors by name.
        device: Where the memory is.
    """

    def __init__(
        self, layout: BucketLayout, specs: Mapping[str, TensorSpec], device: torch.device
    ) -> None:
        self.layout = layout
        self.memory = torch.zeros(layout.numel, dtype=layout.dtype, device=device)
        self.views = {
            slot.name: self.memory.as_strided(
                specs[slot.name].shape, specs[slot.name].strides, slot.start
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


def allocate(
    layouts: Iterable[BucketLayout], specs: Iterable[TensorSpec], device: torch.device
) -> list[Bucket]:
    """Memory for layouts."""
    by_name = {spec.name: spec for spec in specs}
    return [Bucket(layout, by_name, device) for layout in layouts]
