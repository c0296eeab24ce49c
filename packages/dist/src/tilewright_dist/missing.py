"""Parameters without a gradient, which all strategies treat alike.

A gradient that is missing counts as zeros, so that every rank takes part in every collective and
none is left waiting. What happens then is the wrapper's `find_unused_parameters`: without it the
rank that lacks a gradient raises an error that names the parameters; with it one more collective, a
byte a parameter, tells which have a gradient on any rank, and the others keep None, so that an
optimizer passes over them as it would in a single process.

A sparse gradient cannot be averaged: it counts as missing, and its rank raises when all collectives
are over.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from tilewright_dist.channel import Exchange


class MissingGradientError(RuntimeError):
    """A gradient is missing on this rank; the averages of all others are in place."""


class SparseGradientError(TypeError):
    """A gradient of this rank is sparse; the averages of all others are in place."""


def lacks(gradient: torch.Tensor | None) -> bool:
    """Whether there is nothing to average."""
    return gradient is None or gradient.layout != torch.strided


def _refuse_sparse(name: str, gradient: torch.Tensor) -> None:
    raise SparseGradientError(
        f"the gradient of {name!r} has layout {gradient.layout}, which cannot be averaged: "
        "build its module with sparse=False"
    )


def presence(parameters: Mapping[str, nn.Parameter]) -> torch.Tensor:
    """[number of parameters] uint8 on their device, 1 where this rank has a gradient."""
    device = next(iter(parameters.values())).device
    present = torch.ones(len(parameters), dtype=torch.uint8, device=device)
    for index, parameter in enumerate(parameters.values()):
        if parameter.grad is None:
            present[index] = 0
    return present


def presence_anywhere(present: torch.Tensor, process_group: dist.ProcessGroup) -> Exchange:
    """Turn every rank's own presence into that on any rank, in place."""
    yield dist.all_reduce(present, op=dist.ReduceOp.MAX, group=process_group, async_op=True)


def give_missing(
    parameters: Mapping[str, nn.Parameter],
    averages: Mapping[str, torch.Tensor],
    anywhere: torch.Tensor | None,
) -> None:
    """Give parameters without a gradient on this rank the average, where another rank has one.

    Args:
        parameters: All, in the order of `anywhere`.
        averages: By name, for the parameters that lack a gradient here.
        anywhere: What `presence_anywhere` made; None without find_unused_parameters.

    Raises:
        SparseGradientError: A gradient is there, but not strided.
        MissingGradientError: A gradient is missing and `anywhere` is None.
    """
    for name in averages:
        gradient = parameters[name].grad
        if gradient is not None:
            _refuse_sparse(name, gradient)
    if not averages:
        return
    if anywhere is None:
        raise MissingGradientError(unused_message(n for n in parameters if n in averages))
    # Reading the answer waits for the device, so only a rank that lacks a gradient reads it.
    for name, found in zip(parameters, anywhere.tolist(), strict=True):
        if found and name in averages:
            parameters[name].grad = averages[name]


def unused_message(names: Iterable[str]) -> str:
    """What a rank says that lacks gradients."""
    listed = ", ".join(repr(name) for name in names)
    return (
        f"rank {dist.get_rank()}: no gradient arrived for {listed}. If the loss does not use them "
        "at every step, pass find_unused_parameters=True; if they are never used, freeze them "
        "(requires_grad=False) before wrapping; under reentrant checkpointing pass "
        "static_graph=True"
    )
