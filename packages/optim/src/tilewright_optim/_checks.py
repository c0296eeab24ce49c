"""What a user can get wrong, checked where it enters; messages name the value and the remedy."""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from tilewright_optim._blockwise import num_blocks

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FIXED = {
    "master_low": torch.int16,
    "exp_avg_scale": torch.float32,
    "exp_avg_sq_scale": torch.float32,
}
_SHAPE = attrgetter("shape")


def check_options(options: Mapping[str, Any]) -> None:
    """Raise a ValueError unless the options of a parameter group are in their ranges."""
    betas = options["betas"]
    for name in ("lr", "weight_decay"):
        value = options[name]
        if isinstance(value, Tensor) and value.numel() != 1:
            shape = tuple(value.shape)
            raise ValueError(f"{name} is a tensor of shape {shape}; give one of one element")
    if len(betas) != 2 or any(isinstance(beta, Tensor) for beta in betas):
        raise ValueError(f"betas are {betas}; give two floats, for example (0.9, 0.999)")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas[{i}] is {beta}; it must be at least 0 and below 1")
    for name in ("lr", "eps", "weight_decay"):
        if not options[name] >= 0.0:
            raise ValueError(f"{name} is {options[name]}; it must be a number of at least 0")
    if options["cautious"] and not options["decoupled_weight_decay"]:
        raise ValueError("cautious is for decoupled decay; use AdamW, or leave it out")


def check_tensors(param: Tensor, grad: Tensor, *states: Tensor) -> None:
    """Raise unless an optimizer can work with this parameter, its gradient and its states."""
    what = f"a parameter of shape {tuple(param.shape)}"
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"the gradient of {what} is {grad.layout}; this optimizer needs dense ones: make it so "
            f"by param.grad.to_dense(), or use torch.optim.SparseAdam for this parameter"
        )
    for name, tensor in ((what, param), (f"the gradient of {what}", grad)):
        if tensor.dtype not in _FLOATING:
            raise TypeError(
                f"{name} is {tensor.dtype}; give float16, bfloat16, float32 or float64 (for "
                f"complex numbers, torch.view_as_real of them)"
            )
    for name, tensor in (("gradient", grad), *(("state", state) for state in states)):
        if tensor.device != param.device:
            raise ValueError(
                f"{what} is on {param.device} and its {name} on {tensor.device}; move the model "
                f"first, then create its optimizer and load the optimizer's state"
            )


def check_rows(params: Sequence[Tensor], columns: Mapping[str, Sequence[Tensor]]) -> None:
    """Raise a RuntimeError unless kernels may walk each row as far as its parameter reaches.

    Args:
        params: parameters.
        columns: under "grad" and keys of states, a tensor for each parameter, or nothing.
    """
    shapes = list(map(_SHAPE, params))
    for key, column in columns.items():
        coded = key.endswith("_scale")
        if column and (coded or list(map(_SHAPE, column)) != shapes):
            for param, tensor in zip(params, column, strict=True):
                expected = state_shape(param, key)
                if tuple(tensor.shape) != expected or (coded and not tensor.is_contiguous()):
                    raise RuntimeError(
                        f"{key} has shape {tuple(tensor.shape)}, strides {tensor.stride()} for a "
                        f"parameter of shape {tuple(param.shape)}, where {expected} without gaps "
                        f"is needed; after a change of a parameter's size set its grad to None "
                        f"and delete its state, or create the optimizer anew"
                    )
        dtype = columns["exp_avg_sq"][0].dtype if key == "max_exp_avg_sq" else _FIXED.get(key)
        for param, tensor in zip(params, column if dtype else (), strict=False):
            if tensor.dtype != dtype or tensor.device != param.device:
                raise RuntimeError(
                    f"{key} is {tensor.dtype} on {tensor.device} for a parameter on "
                    f"{param.device}; it must be {dtype} there, convert it with .to()"
                )


def check_max_grad_norm(max_grad_norm: float | None) -> None:
    """Raise a ValueError unless gradients can be clipped to this norm; None does not clip."""
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm is {max_grad_norm}; it must be above 0, or None")


def state_shape(param: Tensor, key: str) -> tuple[int, ...]:
    """The shape of this entry of a parameter's state; kernels take it for granted."""
    if key == "step":
        return ()
    return (num_blocks(param.numel()),) if key.endswith("_scale") else tuple(param.shape)


def check_states(states: Mapping[Any, Any], keys: frozenset[str]) -> None:
    """Raise a ValueError unless entries of these keys fit their parameters."""
    for param, state in states.items():
        for key in keys & state.keys():
            shape = tuple(state[key].shape)
            if shape != state_shape(param, key):
                raise ValueError(
                    f"the state to be loaded has {key} of shape {shape} for a parameter of shape "
                    f"{tuple(param.shape)}; make the optimizer of the same parameters in the same "
                    f"order"
                )
