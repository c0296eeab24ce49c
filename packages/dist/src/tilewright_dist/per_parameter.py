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

from tilewright_dist.missing import give_missing, lacks
from tilewright_dist.options import ReducerOptions
from tilewright_dist.overlapped_reducer import OverlappedReducer
from tilewright_dist.readiness import ReadyQueue
from tilewright_dist.wire import all_reduce_any_layout


class PerParameterReducer(OverlappedReducer):
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
        super().__init__(parameters, process_group, options)
        self._filled: dict[str, torch.Tensor] = {}
        self._names = list(reversed(list(parameters)))
        self._queue = ReadyQueue([[n] for n in self._names], learns=options.static_graph)

    @torch.no_grad()
    def gradient_arrived(self, name: str, process_group: dist.ProcessGroup | None) -> None:
        """Start what may start; without a group (no_sync) nothing.

        Raises:
            RuntimeError: It arrived too often in one backward.
        """
        if process_group is None:
            return
        self._enter_backward()
        for unit in self._queue.arrived(name):
            self._start(self._names[unit], process_group)

    @torch.no_grad()
    def finish(self, process_group: dist.ProcessGroup) -> None:
        """Start the rest and wait for all.

        Raises:
            TypeError: A gradient is sparse.
            RuntimeError: A gradient is missing, without find_unused_parameters.
        """
        for unit in self._queue.rest():
            self._start(self._names[unit], process_group)
        anywhere = self._ask_for_missing(process_group)
        if self._options.static_graph:
            self._queue = ReadyQueue([[n] for n in self._names], self._queue.counts)
        filled, self._filled = self._filled, {}
        self._abandon()
        give_missing(self._parameters, filled, anywhere)

    def _start(self, name: str, process_group: dist.ProcessGroup) -> None:
        parameter = self._parameters[name]
        gradient = parameter.grad
        if gradient is None or lacks(gradient):
            gradient = self._filled[name] = torch.zeros_like(parameter)
        exchange = all_reduce_any_layout(gradient, process_group, self._options.reduce_dtype)
        self._send(exchange, [gradient])
