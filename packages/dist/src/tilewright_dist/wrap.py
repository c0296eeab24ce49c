"""One place to choose how a module is trained on several ranks."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from tilewright_dist.data_parallel import DistributedDataParallel, checked_process_group
from tilewright_dist.fully_sharded import FullyShardedOptimizer
from tilewright_dist.module_state import broadcast_module_state, verify_module_state
from tilewright_dist.sharded_optimizer import ELEMENTWISE, ShardedOptimizer

Parallel = Literal["ddp", "zero1", "fsdp"]


def wrap(
    module: nn.Module,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    parallel: Parallel = "ddp",
    process_group: dist.ProcessGroup | None = None,
    max_grad_norm: float | None = None,
    device: torch.device | None = None,
    block_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Make a module and its optimizer work on several ranks.

    | parallel | every rank holds | what it is |
    |---|---|---|
    | "ddp" | weights, gradients, states | DistributedDataParallel |
    | "zero1" | weights, gradients, its part of the states | the same and a ShardedOptimizer |
    | "fsdp" | its part of everything | torch's fully_shard of each block, then of the rest |

    Args:
        module: On its device. With "fsdp" it is changed in place, and its parameters are DTensors.
            It may be on the CPU then: blocks go to `device` one by one, each as it is divided.
        make_optimizer: Called with the module whose parameters are to be optimized. Under "fsdp"
            one that treats every element by itself (Adam and its like) gets this rank's rows as
            plain tensors, in a FullyShardedOptimizer; another has to accept DTensors.
        parallel: What is divided.
        process_group: The ranks; None is the default group.
        max_grad_norm: For "zero1", where a rank does not see all gradients: clip in the step.
            Elsewhere clip with torch.nn.utils.clip_grad_norm_.
        device: For "fsdp": where it computes; None is where the module is.
        block_options: For "fsdp": of the blocks' fully_shard, beside or instead of `options`.
        **options: Of DistributedDataParallel, or of fully_shard.

    Returns:
        The module to call, and the optimizer to step.

    Raises:
        ValueError: An unknown choice; max_grad_norm, device or block_options where they are not
            used.
    """
    if parallel not in get_args(Parallel):
        valid = ", ".join(repr(name) for name in get_args(Parallel))
        raise ValueError(f"unknown parallel {parallel!r}; valid: {valid}")
    if max_grad_norm is not None and parallel != "zero1":
        raise ValueError(
            f"max_grad_norm is for parallel='zero1': with {parallel!r} call "
            "torch.nn.utils.clip_grad_norm_ before the step"
        )
    if block_options is not None and parallel != "fsdp":
        raise ValueError(f"block_options are for parallel='fsdp', not {parallel!r}: leave them out")
    if device is not None and parallel != "fsdp":
        raise ValueError(
            f"device is for parallel='fsdp': with {parallel!r} call module.to({device})"
        )
    process_group = checked_process_group(process_group)
    if parallel == "fsdp":
        shard_fully(
            module,
            process_group=process_group,
            device=device,
            block_options=block_options,
            **options,
        )
        optimizer = make_optimizer(module)
        if type(optimizer).__name__ in ELEMENTWISE:
            optimizer = FullyShardedOptimizer(optimizer, module)
        return module, optimizer
    wrapper = DistributedDataParallel(module, process_group=process_group, **options)
    optimizer = make_optimizer(module)
    if parallel == "zero1":
        optimizer = ShardedOptimizer.from_optimizer(
            optimizer, ddp=wrapper, max_grad_norm=max_grad_norm
        )
    return wrapper, optimizer


def shard_fully(
    module: nn.Module,
    *,
    process_group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
    block_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Divide a module's weights in place, as `wrap` does with "fsdp", and make no optimizer.

    A model that is not trained is divided so. Give it `reshard_after_forward=True`: no backward
    divides it again, and embedding and head would stay whole.

    Args:
        module: Where it is; blocks go to `device` one by one.
        process_group: The ranks; None is the default group.
        device: Where it computes; None is where the module is.
        block_options: Of the blocks' fully_shard, beside or instead of `options`.
        **options: Of fully_shard.
    """
    process_group = checked_process_group(process_group)
    device = device or next(module.parameters()).device
    verify_module_state(module, process_group)
    # fully_shard divides what each rank has: replicas that differ would be mixed.
    broadcast_module_state(module, process_group, device)
    mesh = DeviceMesh.from_group(process_group, device.type)
    for block in list(_blocks(module)):
        fully_shard(block, mesh=mesh, **options | dict(block_options or {}))
    fully_shard(module, mesh=mesh, **options)


def _blocks(module: nn.Module, *, in_list: bool = False) -> Iterator[nn.Module]:
    """Elements of ModuleLists, of lists in one another the innermost, and nothing in a block."""
    for child in module.children():
        is_called = not isinstance(child, nn.ModuleList | nn.ModuleDict)
        if in_list and is_called:
            yield child
        else:
            is_list = isinstance(child, nn.ModuleList) or (in_list and not is_called)
            yield from _blocks(child, in_list=is_list)
