"""What gates: the activations that gated layers take, by the name that a caller gives."""

from typing import Any, Literal, get_args

from tilewright_kernels import _math

GatedActivation = Literal["silu", "gelu", "relu"]

_ACTIVATIONS: tuple[str, ...] = get_args(GatedActivation)


def check_activation(activation: str) -> None:
    """Raise unless it is one of them."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; choose from {', '.join(_ACTIVATIONS)}")


def device_functions(activation: str) -> tuple[Any, Any]:
    """f and f', device functions."""
    return getattr(_math, activation), getattr(_math, f"{activation}_grad")
