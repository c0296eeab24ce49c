"""What a user of Muon can get wrong, checked where it enters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tilewright_optim._coefficients import triples
from tilewright_optim.muon_functional import ADJUSTMENTS
from tilewright_optim.newton_schulz import FORMS

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_muon_options(options: Mapping[str, Any]) -> None:
    """Raise a ValueError unless the options of a parameter group are in their ranges."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}; give one of one element")
    if isinstance(options["weight_decay"], Tensor):
        raise ValueError(
            f"weight_decay is a tensor, {options['weight_decay']}; give Muon a float, such as "
            f"weight_decay.item()"
        )
    for name in ("lr", "weight_decay", "eps"):
        if not options[name] >= 0.0:
            raise ValueError(f"{name} is {options[name]}; it must be a number of at least 0")
    if not 0.0 <= options["momentum"] <= 1.0:
        raise ValueError(f"momentum is {options['momentum']}; it must be from 0 to 1")
    triples(options["ns_coefficients"], options["ns_steps"])
    for name, choices in (
        ("adjust_lr_fn", (None, *ADJUSTMENTS)),
        ("form", FORMS),
        ("master", ("none", "exact")),
    ):
        if options[name] not in choices:
            raise ValueError(
                f"{name} is {options[name]!r}; choose from {', '.join(map(repr, choices))}"
            )
    split_sizes = options["split_sizes"]
    if split_sizes is not None and any(
        isinstance(rows, bool) or not isinstance(rows, int) or rows < 0 for rows in split_sizes
    ):
        raise ValueError(
            f"split_sizes are {split_sizes}; give numbers of rows, as [1536, 512, 512]"
        )


def check_muon_matrix(param: Tensor, group: Mapping[str, Any]) -> None:
    """Raise unless a parameter is made of matrices that Muon can update with a group's options."""
    shape = tuple(param.shape)
    if len(shape) not in (2, 3):
        raise ValueError(
            f"a parameter has shape {shape}; Muon takes matrices [A, B] and experts [E, A, B], and "
            f"MuonW gives all else to AdamW"
        )
    if param.dtype not in _FLOATING:
        raise TypeError(
            f"a parameter of shape {shape} is {param.dtype}; give float16, bfloat16, float32 or "
            f"float64"
        )
    split_sizes = group["split_sizes"]
    if split_sizes is not None and sum(split_sizes) != shape[-2]:
        raise ValueError(
            f"split_sizes {list(split_sizes)} add up to {sum(split_sizes)} and a parameter has "
            f"shape {shape}; they must add up to its rows, {shape[-2]}: give a group of its own to "
            f"each kind of weight"
        )
