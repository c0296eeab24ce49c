"""What strategies share whose collectives run beside backward: which are under way, and for whom.

A backward that raises leaves arrivals and collectives behind and nobody says so. They are dropped
when the next forward begins, or, where none comes before it, at the first gradient of another
backward.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from tilewright_dist.channel import Exchange, Handle
from tilewright_dist.missing import presence, presence_anywhere
from tilewright_dist.options import ReducerOptions
from tilewright_dist.readiness import ReadyQueue
from tilewright_dist.watchdog import watched_channel


class OverlappedReducer:
    """Base of the strategies; each says in `_queue` what starts when.

    Args:
        parameters: Trainable parameters by name, the same on all ranks, on one device.
        process_group: The ranks; not kept.
        options: Those of the wrapper.
    """

    _queue: ReadyQueue

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        process_group: dist.ProcessGroup,
        options: ReducerOptions,
    ) -> None:
        self._parameters = parameters
        self._options = options
        self._device = next(iter(parameters.values())).device
        self._channel = watched_channel(process_group, self._device)
        self._handles: list[Handle] = []
        self._task = -1

    def begin(self) -> None:
        """Forget what a backward that raised has left behind."""
        if self._queue.counts:
            self._abandon()

    def _enter_backward(self) -> None:
        """Forget the same when a gradient is the first one of another backward."""
        task = torch._C._current_graph_task_id()
        # Reentrant checkpoints, which static_graph allows, are tasks of their own in one backward.
        if task != self._task and not self._options.static_graph:
            self._abandon()
        self._task = task

    def _send(self, exchange: Exchange, holds: Sequence[torch.Tensor] = ()) -> None:
        """Start an exchange. After a backward that raised nobody else may hold its gradients."""
        self._handles.append(self._channel.start(exchange, holds))

    def _ask_for_missing(self, process_group: dist.ProcessGroup) -> torch.Tensor | None:
        """Start to find out which gradients any rank has; None without find_unused_parameters."""
        if not self._options.find_unused_parameters:
            return None
        anywhere = presence(self._parameters)
        self._send(presence_anywhere(anywhere, process_group))
        return anywhere

    def _abandon(self) -> None:
        """Wait for what is under way and forget all arrivals, also of a backward that raised."""
        for handle in self._handles:
            handle.wait()
        self._handles.clear()
        self._queue.reset()
