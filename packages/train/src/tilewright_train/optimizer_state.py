"""An optimizer's state as named tensors and JSON, so that no checkpoint needs a pickle.

A torch.optim.Optimizer numbers its parameters; here every state stands under the parameter's name
(«layers.0.mlp.gate.weight.exp_avg»), so files can be read by people and by other world sizes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tilewright_train.errors import InputError


def flatten(
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    state: Mapping[str, Any] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state of `optimizer` without numbers for parameters.

    Args:
        optimizer: All its parameters belong to `module`.
        module: Gives the names.
        state: Its state_dict, where that has been gathered; None asks the optimizer.

    Returns:
        Tensors by «parameter.state», where they are, and a JSON record: the class, the groups with
        the names of their parameters, and states that are no tensors.
    """
    names = _names_by_index(optimizer, module)
    state = optimizer.state_dict() if state is None else state
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{names[index]}.{key}"] = value.detach()
            else:
                plain[f"{names[index]}.{key}"] = value
    groups = [
        {key: _plain(value) for key, value in group.items()}
        | {"params": [names[index] for index in group["params"]]}
        for group in state["param_groups"]
    ]
    return tensors, {"class": _class_of(optimizer), "groups": groups, "plain": plain}


def restore(
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    record: Mapping[str, Any],
) -> None:
    """Load what `flatten` gave into an optimizer with the same groups.

    Raises:
        InputError: It is of another class, or the groups hold other parameters.
    """
    saved_class = record.get("class", _class_of(optimizer))
    if saved_class != _class_of(optimizer):
        raise InputError(
            f"the checkpoint's optimizer is {saved_class} and this run's is {_class_of(optimizer)}:"
            " give the --optim that it was trained with, or start a new run"
        )
    names = _names_by_index(optimizer, module)
    own = optimizer.state_dict()["param_groups"]
    saved = [group["params"] for group in record["groups"]]
    if saved != [[names[i] for i in group["params"]] for group in own]:
        raise InputError(
            "the checkpoint's optimizer has other parameters or groups than this run's: start a new"
            " run, or --init it from this one"
        )
    state: dict[int, dict[str, Any]] = {index: {} for index in names}
    indices = {name: index for index, name in names.items()}
    for full_name, value in [*tensors.items(), *record["plain"].items()]:
        name, _, key = full_name.rpartition(".")
        if name not in indices:
            raise InputError(
                f"the checkpoint's optimizer has a state {full_name!r}, and no parameter of this"
                " run's has that name: start a new run, or --init it from this one"
            )
        state[indices[name]][key] = value
    groups = [
        group | {"params": here["params"]}
        for group, here in zip(record["groups"], own, strict=True)
    ]
    filled = {index: values for index, values in state.items() if values}
    optimizer.load_state_dict({"state": filled, "param_groups": groups})


def _class_of(optimizer: torch.optim.Optimizer) -> str:
    """Of an optimizer whose states are divided: that of the parts."""
    inner = getattr(optimizer, "inner", optimizer)
    return type(inner).__name__


def _names_by_index(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[int, str]:
    """The parameter's name for every number that state_dict() uses: its place over all groups."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {index: names[id(parameter)] for index, parameter in enumerate(parameters)}


def _plain(value: Any) -> Any:
    """A group's option as JSON; a learning rate may be a tensor."""
    return value.item() if isinstance(value, torch.Tensor) else value
