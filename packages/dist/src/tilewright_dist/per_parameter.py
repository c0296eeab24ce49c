"""The overlapped strategy without buckets: one all-reduce a gradient, started when it arrives.

Gradients arrive from the last layer to the first while backward goes on, so all but the last ones
travel under it. What is left of the naive form's cost is the latency of a collective for every
parameter, however small.

Collectives start in reverse order of registration on all ranks. A parameter that is used out of
that order (a head tied to the embedding) holds back those behind it; buckets, which are rebuilt in
the order observed, do better.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from tilewright_dist.channel import Channel, Handle
from tilewright_dist.missing import give_missing, presence, presence_anywhere, refuse_sparse
from tilewright_dist.options import ReducerOptions
from tilewright_dist.readiness import ReadyQueue
from tilewright_dist.wire import all_reduce_any_layout


class PerParameterReducer:
    """Averages gradients one by one, beside backward.

    Args:
        parameters: Trainable parameters by name, the same on all ranks, on one device.
        process_group: The ranks; not kept.
        options: Those of the wrapper.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        process_group: dist.ProcessGroup,
        options: ReducerOptions,
    ) -> None:
        self._parameters = parameters
        self._options = options
        self._channel = Channel(next(iter(parameters.values())).device)
        self._handles: list[Handle] = []
        self._filled: dict[str, torch.Tensor] = {}
        self._names = list(reversed(list(parameters)))
        self._queue = ReadyQueue([[n] for n in self._names], learns=options.static_graph)
        self._task = -1

    @torch.no_grad()
    def gradient_arrived(self, name: str, process_group: dist.ProcessGroup | None) -> None:
        """Start what may start; without a group (no_sync) nothing.

        Raises:
            TypeError: The gradient is sparse.
            RuntimeError: It arrived too often in one backward.
        """
        gradient = self._parameters[name].grad
        assert gradient is not None
        refuse_sparse(name, gradient)
        if process_group is None:
            return
        task = torch._C._current_graph_task_id()
        if task != self._task and not self._options.static_graph:
            self._abandon()
        self._task = task
        for unit in self._queue.arrived(name):
            self._start(self._names[unit], process_group)

    @torch.no_grad()
    def finish(self, process_group: dist.ProcessGroup) -> None:
        """Start the rest and wait for all.

        Raises:
            RuntimeError: A gradient is missing, without find_unused_parameters.
        """
        for unit in self._queue.rest():
            self._start(self._names[unit], process_group)
        anywhere = None
        if self._options.find_unused_parameters:
            anywhere = presence(self._parameters)
            self._handles.append(self._channel.start(presence_anywhere(anywhere, process_group)))
        if self._options.static_graph:
            self._queue = ReadyQueue([[n] for n in self._names], self._queue.counts)
        filled, self._filled = self._filled, {}
        self._abandon()
        give_missing(self._parameters, filled, anywhere)

    def _start(self, name: str, process_group: dist.ProcessGroup) -> None:
        parameter = self._parameters[name]
        gradient = parameter.grad
        if gradient is None:
            gradient = self._filled[name] = torch.zeros_like(parameter)
        average = all_reduce_any_layout(gradient, process_group, self._options.reduce_dtype)
        self._handles.append(self._channel.start(average))

    def begin(self) -> None:
        """Forget what a backward that raised has left behind."""
        if self._queue.counts:
            self._abandon()

    def _abandon(self) -> None:
        """Wait for what is under way and forget all arrivals, also of a backward that raised."""
        for handle in self._handles:
            handle.wait()
        self._handles.clear()
        self._queue.reset()
