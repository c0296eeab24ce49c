"""Parameters in buckets, and the part of them that this rank updates.

The memory of a bucket's parameters is laid out as that of their gradients, so an optimizer's piece
of one lies beside its piece of the other, and updated pieces are gathered in place.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import nn

from tilewright_dist import copies
from tilewright_dist.buckets import Bucket, describe
from tilewright_dist.channel import Exchange
from tilewright_dist.layout import BucketLayout, Segment
from tilewright_dist.peers import PeerBuffer, Peers
from tilewright_dist.wire import all_gather


class Shard:
    """One bucket of parameters.

    The parameters become views of the bucket's memory; their values stay.

    Args:
        layout: Of the bucket.
        parameters: Those in it, by name.
        rank: This rank in its group.
        gradients: Memory of the same layout that holds this rank's averages after backward; None
            where `.grad` holds whole averages.
        shared: Memory for the parameters that other ranks read; None allocates.
    """

    def __init__(
        self,
        layout: BucketLayout,
        parameters: Mapping[str, nn.Parameter],
        rank: int,
        gradients: torch.Tensor | None,
        shared: PeerBuffer | None = None,
    ) -> None:
        self.layout = layout
        self._gradients = gradients
        self._gathering: copies.Gathering | None = None
        self._parameters = {slot.name: parameters[slot.name] for slot in layout.slots}
        specs = {spec.name: spec for spec in describe(self._parameters)}
        self._strides = {name: spec.strides for name, spec in specs.items()}
        device = next(iter(self._parameters.values())).device
        self._bucket = Bucket(layout, specs, device, shared)
        for name, parameter in self._parameters.items():
            self._bucket.views[name].copy_(parameter.detach())
            parameter.data = self._bucket.views[name]
        self.segments = {segment.name: segment for segment in layout.segments(rank)}
        self.pieces = {
            name: nn.Parameter(self._cut(self._bucket.memory, segment))
            for name, segment in self.segments.items()
        }
        """What the optimizer updates, by parameter: flat pieces, or whole matrices and scalars."""

    @property
    def shared_bytes(self) -> int:
        """Memory that other ranks read."""
        return 0 if self._bucket.shared is None else self._bucket.memory.nbytes

    def take_gradients(self) -> None:
        """Give each piece its part of the averaged gradient, None where there is none."""
        for name, segment in self.segments.items():
            gradient = self._parameters[name].grad
            if gradient is not None and self._gradients is not None:
                gradient = self._cut(self._gradients, segment)
            elif gradient is not None:
                gradient = self._cut_tensor(gradient.detach(), segment)
            self.pieces[name].grad = gradient

    def drop_gradients(self) -> None:
        """Forget the pieces' gradients, so that zero_grad on the parameters frees them."""
        for piece in self.pieces.values():
            piece.grad = None

    def gather(self, process_group: dist.ProcessGroup, peers: Peers | None = None) -> Exchange:
        """Fetch the pieces that other ranks have updated."""
        if self._bucket.shared is not None and peers is not None:
            if self._gathering is None:
                self._gathering = copies.Gathering(self._bucket.shared, self.layout.bounds, peers)
            yield from self._gathering.run()
        else:
            yield from all_gather(self._bucket.memory, self.layout.bounds, process_group)

    def names(self) -> Iterator[str]:
        """Of all its parameters."""
        return iter(self._parameters)

    def _cut(self, memory: torch.Tensor, segment: Segment) -> torch.Tensor:
        if self.layout.partition == "matrix":
            shape = self._parameters[segment.name].shape
            return memory[segment.offset :].as_strided(shape, self._strides[segment.name])
        if self._parameters[segment.name].dim() == 0:
            # Of one element it would be a vector, whose moments nothing tells from step counts once
            # they are whole.
            return memory[segment.offset]
        return memory[segment.offset : segment.offset + segment.stop - segment.start]

    def _cut_tensor(self, tensor: torch.Tensor, segment: Segment) -> torch.Tensor:
        """The same of a tensor that has its own memory."""
        if self.layout.partition == "matrix" or tensor.dim() == 0:
            return tensor
        strides = self._strides[segment.name]
        if tensor.stride() != strides:
            dense = torch.empty_strided(
                tensor.shape, strides, dtype=tensor.dtype, device=tensor.device
            )
            tensor = dense.copy_(tensor)
        flat = tensor.as_strided((tensor.numel(),), (1,))
        return flat[segment.start : segment.stop]
