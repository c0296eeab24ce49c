"""The naive strategy: one all-reduce a gradient, one after another, when backward is over.

The smallest thing that is right, and what the faster strategies are tested against. Each rank
sends 2 (W-1)/W bytes for every byte of gradient, W being the number of ranks, and none of it runs
beside the computation; each parameter also costs the latency of a collective, which for a model of
many small parameters outweighs the bytes.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from tilewright_dist.missing import give_missing, lacks, presence, presence_anywhere
from tilewright_dist.options import ReducerOptions
from tilewright_dist.watchdog import watched_channel
from tilewright_dist.wire import all_reduce_any_layout


class NaiveReducer:
    """Averages the gradients of a fixed set of parameters over a process group.

    Every call runs the same collectives in the same order on every rank, whatever gradients a rank
    has.

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
        device = next(iter(parameters.values())).device
        self._channel = watched_channel(process_group, device)

    def gradient_arrived(self, name: str, process_group: dist.ProcessGroup | None) -> None:
        """Nothing: all is done at the end."""

    def begin(self) -> None:
        """Nothing: nothing is under way between two passes."""

    @torch.no_grad()
    def finish(self, process_group: dist.ProcessGroup) -> None:
        """Replace every gradient by its average over the ranks.

        Raises:
            TypeError: A gradient is sparse.
            RuntimeError: A gradient is missing, without find_unused_parameters.
        """
        anywhere = None
        if self._options.find_unused_parameters:
            anywhere = presence(self._parameters)
            self._channel.start(presence_anywhere(anywhere, process_group)).wait()
        filled: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            gradient = parameter.grad
            if gradient is None or lacks(gradient):
                gradient = filled[name] = torch.zeros_like(parameter)
            average = all_reduce_any_layout(gradient, process_group, self._options.reduce_dtype)
            self._channel.start(average).wait()
        give_missing(self._parameters, filled, anywhere)
