"""How several processes divide a run: replicas, ZeRO-1's states, or everything (FSDP).

One process without torchrun trains the model as it is. Under FSDP a process holds rows of every
parameter: a forward pass is made by all together, and whoever wants whole weights asks for them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from tilewright_dist import (
    DistributedEnvironment,
    FullyShardedOptimizer,
    ShardedOptimizer,
    gather_state_dict,
    load_whole_state_dict,
    shard_fully,
    wrap,
)
from tilewright_model import CausalLM, ModelConfig, count_parameters
from tilewright_train.config import REFERENCE_EMA, Parallel, PretrainConfig
from tilewright_train.errors import InputError
from tilewright_train.precision import arithmetic
from tilewright_train.snapshot import Copy


def check_divisible(config: PretrainConfig) -> None:
    """Refuse what needs something whole that no process would have.

    Raises:
        InputError: It names the option and the modes that are left.
    """
    if config.machine.parallel != "fsdp":
        return
    instead = "use --parallel zero1 or ddp"
    if config.training.optim == "muon":
        raise InputError(
            "optim muon orthogonalizes whole matrices, and with --parallel fsdp each process has"
            f" rows of them: {instead}, or --optim adamw"
        )
    if config.machine.compile:
        raise InputError(
            "compile would trace the exchanges of --parallel fsdp, which is not supported:"
            f" {instead}, or leave --compile out"
        )
    if config.run.objective == "dpo" and config.dpo.reference == REFERENCE_EMA:
        raise InputError(
            "reference ema averages whole weights after every step, of which with --parallel fsdp"
            f" each process has rows: {instead}, or another --reference"
        )


def replicate(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    parallel: Parallel,
    precision: str,
    environment: DistributedEnvironment,
    max_grad_norm: float,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """What is called to train a model, and what updates it.

    Args:
        model: On its device, or where `made_on` says.
        make_optimizer: Of all its parameters.
        parallel: What the processes divide.
        precision: Of the run.
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
        device=environment.device if parallel == "fsdp" else None,
        block_options={"mp_policy": _policy(precision)} if parallel == "fsdp" else None,
    )


def divide_like(model: nn.Module, frozen: nn.Module, precision: str) -> None:
    """Under FSDP divide a module that is not trained as the model is; it computes alike.

    Args:
        model: What is trained; all processes call this together where its parameters are divided,
            and elsewhere nothing is done.
        frozen: What is called, on the host or where the model is.
        precision: Of the run.
    """
    parameter = next(model.parameters())
    if isinstance(parameter, DTensor):
        shard_fully(
            frozen,
            process_group=parameter.device_mesh.get_group(),
            device=parameter.device,
            block_options={"mp_policy": _policy(precision)},
            reshard_after_forward=True,
        )


def made_on(
    config: ModelConfig, parallel: Parallel, environment: DistributedEnvironment
) -> torch.device:
    """Where a model is made before it is divided: on the host where a GPU has no room for it."""
    device = environment.device
    if parallel != "fsdp" or environment.process_group is None or device.type != "cuda":
        return device
    whole = 4 * count_parameters(config).total
    memory = torch.cuda.get_device_properties(device).total_memory
    return device if whole < memory / 2 else torch.device("cpu")


def _policy(precision: str) -> MixedPrecisionPolicy:
    """What blocks gather: weights in the dtype of products.

    Autocast would keep its casts of whole weights from forward to backward, which frees nothing.
    Gradients come in that dtype, as they do under autocast, and are averaged in that of weights.
    The stream stays as wide as it is: embedding and head are gathered as they are stored.
    """
    dtypes = arithmetic(precision)
    if not dtypes.autocasts:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(
        param_dtype=dtypes.products, reduce_dtype=dtypes.weights, cast_forward_inputs=False
    )


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether processes hold rows of its parameters, and compute a forward pass together."""
    return isinstance(module, FSDPModule)


def wait_for_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Return when the weights are there after a step, or divided again after a forward pass."""
    if isinstance(optimizer, ShardedOptimizer | FullyShardedOptimizer):
        optimizer.wait_for_parameters()


def gradient_norm(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
) -> torch.Tensor:
    """Of all gradients together, whatever part of them this process has; 0-d, on the device."""
    # Imported here, behind the thread that `pretraining` starts for it.
    from tilewright_optim.clip_grad import total_norm

    if isinstance(optimizer, FullyShardedOptimizer):
        return optimizer.over_ranks(total_norm(optimizer.local_gradients()))
    return total_norm([p.grad for p in parameters if p.grad is not None])


def is_sharded(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its whole state has to be collected, and is a copy then."""
    return isinstance(optimizer, ShardedOptimizer | FullyShardedOptimizer)


def whole_state(optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
    """The optimizer's state as one process would have it, to be saved by the first.

    Sharded states travel to the first process; all call this together, and the weights are there
    afterwards.
    """
    if isinstance(optimizer, ShardedOptimizer | FullyShardedOptimizer):
        optimizer.wait_for_parameters()
        return optimizer.full_state_dict()
    return optimizer.state_dict()


def whole_weights(
    model: nn.Module, optimizer: torch.optim.Optimizer, copy: Copy | None = None
) -> dict[str, torch.Tensor] | None:
    """Under FSDP copies of all weights on the host of the first process, which all call for.

    One at a time is whole on a device.

    Args:
        model: Without wrappers.
        optimizer: Of its parameters.
        copy: Takes a copy that may be on its way still; by default a plain one is waited for.

    Returns:
        None where every process has whole weights anyway; in others than the first, nothing.
    """
    if not isinstance(optimizer, FullyShardedOptimizer):
        return None
    optimizer.wait_for_parameters()
    weights = {}
    for name, tensor in gather_state_dict(model):
        if tensor is not None:
            weights[name] = copy(name, tensor) if copy else tensor.detach().cpu().clone()
    return weights


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load whole weights, of which a process may keep its rows."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        load_whole_state_dict(model, weights)
    else:
        model.load_state_dict(weights)


def own_rows(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a parameter or a gradient; not to be changed."""
    rows = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return rows.detach()


def whole_model(
    config: ModelConfig, weights: Mapping[str, torch.Tensor], device: torch.device
) -> CausalLM:
    """A model of weights that `whole_weights` gave, to write with.

    Where a GPU has no room for it the model stays on the host and is slow.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        needed = sum(tensor.nbytes for tensor in weights.values())
        if needed > 0.8 * torch.cuda.mem_get_info(device)[0]:
            device = torch.device("cpu")
    with torch.device("meta"):
        model = CausalLM(config)
    model.load_state_dict(weights, assign=True)
    for module in (model.rotary, model.embed_positions):
        if module is not None and not any(True for _ in module.parameters()):
            module.to_empty(device="cpu")  # its table follows from the configuration
    return model.to(device)
