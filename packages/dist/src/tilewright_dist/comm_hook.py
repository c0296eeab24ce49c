"""torch's protocol for communication hooks: `hook(state, bucket) -> Future[Tensor]`.

The hooks of torch.distributed.algorithms.ddp_comm_hooks (bf16_compress_hook, powerSGD_hook, …) run
unchanged: they ask a bucket for what `GradBucket` has here, send what they want, and return a
future of the averages in the bucket's shape. Dividing by the number of ranks is the hook's.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tilewright_dist.buckets import Bucket
from tilewright_dist.channel import Handle, collective_errors

CommHook = Callable[[Any, Any], torch.futures.Future[torch.Tensor]]


class GradBucket:
    """One bucket as hooks see it; the methods are torch.distributed.GradBucket's."""

    def __init__(
        self, bucket: Bucket, parameters: Mapping[str, nn.Parameter], *, index: int, is_last: bool
    ) -> None:
        self._bucket = bucket
        self._parameters = parameters
        self._index = index
        self._is_last = is_last
        self._buffer = bucket.memory

    def index(self) -> int:
        """Number of the bucket in starting order, the same on all ranks."""
        return self._index

    def buffer(self) -> torch.Tensor:
        """[elements] The gradients one after another, with zeros as padding."""
        return self._buffer

    def set_buffer(self, buffer: torch.Tensor) -> None:
        """Have `buffer` return another tensor, for hooks around hooks."""
        self._buffer = buffer

    def gradients(self) -> list[torch.Tensor]:
        """The gradients as views of the bucket."""
        return list(self._bucket.views.values())

    def parameters(self) -> list[torch.Tensor]:
        """The parameters that the gradients are of."""
        return [self._parameters[name] for name in self._bucket.views]

    def is_last(self) -> bool:
        """Whether no bucket of this backward starts after it."""
        return self._is_last


class HookHandle(Handle):
    """A hook that has been called: its result goes to the bucket."""

    def __init__(self, future: torch.futures.Future[torch.Tensor], memory: torch.Tensor) -> None:
        self._future = future
        self._memory = memory

    def wait(self) -> None:
        """Return when the averages are in the bucket."""
        with collective_errors():
            averages = self._future.wait()
        if averages.data_ptr() != self._memory.data_ptr():
            self._memory.copy_(averages.view(-1))
