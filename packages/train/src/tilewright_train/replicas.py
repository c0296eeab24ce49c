"""How several processes divide a run: replicas, and with ZeRO-1 the optimizer's states.

One process without torchrun trains the model as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tilewright_dist import DistributedEnvironment, ShardedOptimizer, wrap
from tilewright_train.config import Parallel


def replicate(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    parallel: Parallel,
    environment: DistributedEnvironment,
    max_grad_norm: float,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """What is called to train a model, and what updates it.

    Args:
        model: On its device.
        make_optimizer: Of all its parameters.
        parallel: What the processes divide.
        environment: Of this process.
        max_grad_norm: A sharded optimizer clips by itself, as no process sees all gradients.
    """
    if environment.process_group is None:
        return model, make_optimizer(model)
    return wrap(
        model,
        make_optimizer,
        parallel=parallel,
        process_group=environment.process_group,
        max_grad_norm=max_grad_norm if parallel == "zero1" else None,
    )


def wait_for_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Return when the weights are there after a step: sharded ones travel meanwhile."""
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.wait_for_parameters()


def clip_and_step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], max_grad_norm: float
) -> torch.Tensor:
    """Scale gradients of a larger norm down to it, and update; the norm before that, 0-d."""
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.step()
        assert optimizer.grad_norm is not None
        return optimizer.grad_norm
    # Imported here, behind the thread that `pretraining` starts for it.
    from tilewright_optim import clip_grad_norm_

    norm = clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    return norm


def is_sharded(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its whole state has to be collected, and is a copy then."""
    return isinstance(optimizer, ShardedOptimizer)


def whole_state(optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
    """The optimizer's state as one process would have it, to be saved by the first.

    Sharded states travel to the first process; all call this together, and the weights are there
    afterwards.
    """
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.wait_for_parameters()
        return optimizer.full_state_dict()
    return optimizer.state_dict()
