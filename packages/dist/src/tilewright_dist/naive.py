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


class NaiveReducer:
    """Averages the gradients of a fixed set of parameters over a process group.

    Every call runs the same collectives in the same order on every rank, whatever gradients a rank
    has: a missing one counts as zeros. One more collective, a byte a parameter, tells which
    parameters have a gradient on any rank at all; the others keep None, so that an optimizer
    passes over them as it would in a single process.

    Args:
        parameters: Trainable parameters by name, the same on all ranks, on one device.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters

    @torch.no_grad()
    def finish(self, process_group: dist.ProcessGroup) -> None:
        """Replace every gradient by its average over the ranks.

        Raises:
            TypeError: A gradient is sparse.
        """
        self._refuse_sparse_gradients()
        has_gradient = self._gradient_anywhere(process_group)
        filled: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            gradient = parameter.grad
            if gradient is None:
                gradient = filled[name] = torch.zeros_like(parameter)
            _average(gradient, process_group)
        # Reading the answer waits for the device, so only a rank that lacks a gradient reads it.
        if filled:
            for name, anywhere in zip(self._parameters, has_gradient.tolist(), strict=True):
                if anywhere and name in filled:
                    self._parameters[name].grad = filled[name]

    def _gradient_anywhere(self, process_group: dist.ProcessGroup) -> torch.Tensor:
        """[number of parameters] uint8, 1 where at least one rank has a gradient."""
        device = next(iter(self._parameters.values())).device
        present = torch.ones(len(self._parameters), dtype=torch.uint8, device=device)
        for index, parameter in enumerate(self._parameters.values()):
            if parameter.grad is None:
                present[index] = 0
        dist.all_reduce(present, op=dist.ReduceOp.MAX, group=process_group)
        return present

    def _refuse_sparse_gradients(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise TypeError(
                    f"the gradient of {name!r} has layout {parameter.grad.layout}, which cannot be "
                    "averaged: build its module with sparse=False"
                )


def _average(tensor: torch.Tensor, process_group: dist.ProcessGroup) -> None:
    # Collectives send memory as it lies: a layout of this rank's own must not reach the others.
    values = tensor.contiguous()
    # gloo of torch 2.11 has AVG as NCCL has: one path for both, and no second pass that divides.
    dist.all_reduce(values, op=dist.ReduceOp.AVG, group=process_group)
    if values.data_ptr() != tensor.data_ptr():
        tensor.copy_(values)
