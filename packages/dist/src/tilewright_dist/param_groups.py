"""Parameter groups in which every parameter has a name, the same on all ranks."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tilewright_dist.data_parallel import DistributedDataParallel


def unnamed(group: Mapping[str, Any]) -> dict[str, Any]:
    """The group with parameters alone, as torch.optim.Optimizer takes it."""
    return {**group, "params": [parameter for _, parameter in group["params"]]}


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The group without its parameters."""
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}


def named_groups(
    params: Iterable[Any], ddp: DistributedDataParallel | None, *, first: int
) -> list[dict[str, Any]]:
    """Groups of (name, parameter); names are the wrapped module's, the given ones, or numbers.

    Raises:
        ValueError: No parameters, or some that the wrapper does not have.
    """
    known = {id(p): name for name, p in ddp.module.named_parameters()} if ddp is not None else {}
    listed = list(params)
    groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
    number, found = first, []
    for group in groups:
        given = group["params"]
        entries = [given] if isinstance(given, torch.Tensor) else list(given)
        labels = group.get("param_names") or [None] * len(entries)
        named = []
        for label, entry in zip(labels, entries, strict=True):
            name, parameter = entry if isinstance(entry, tuple) else (label, entry)
            if ddp is not None and id(parameter) not in known:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is not of the wrapped module: "
                    "build the optimizer of its parameters"
                )
            named.append((known.get(id(parameter)) or name or str(number), parameter))
            number += 1
        found.append(options_of(group) | {"params": named})
    if not any(group["params"] for group in found):
        raise ValueError("there are no parameters to optimize")
    return found
