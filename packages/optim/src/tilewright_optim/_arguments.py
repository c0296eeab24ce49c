"""What a step is given, made into what kernels take."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """What closure returns, with gradients enabled; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def without_overflow(
    found_inf: Tensor | None, groups: Sequence[dict[str, Any]]
) -> tuple[bool, Tensor | None]:
    """Whether a step is to be made, and what its kernels have to read to know.

    Step counts on the host cannot follow the device without asking it, so unless all groups are
    capturable it is asked here.
    """
    if found_inf is None or all(group["capturable"] for group in groups):
        return True, found_inf
    return not found_inf.item(), None


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured there."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def number(name: str, value: float | Tensor, device: torch.device) -> float | Tensor:
    """A float, or a tensor on the device that a kernel reads.

    Raises:
        RuntimeError: value is a tensor on the CPU and a CUDA graph is being captured.
    """
    if not isinstance(value, Tensor):
        return float(value)
    if value.device == device or not value.is_cpu:
        return value.to(device)
    if is_capturing(device):
        raise RuntimeError(
            f"{name} is a tensor on cpu, whose value a captured CUDA graph would keep for ever; "
            f"give one on {device}, or a float if that is meant"
        )
    return value.item()


def on(device: torch.device, scalar: Tensor | None) -> Tensor | None:
    """The scalar on the device; None stays None."""
    return scalar if scalar is None else scalar.to(device)


def obstacle(tensors: Sequence[Tensor], what: str = "parameter") -> str | None:
    """Why kernels, which walk addresses, cannot take these tensors, or None if they can."""
    subclasses = set(map(type, tensors)) - {Tensor, torch.nn.Parameter}
    if not subclasses:
        return None
    return f"a {what} is a {subclasses.pop().__name__}, which may not lie at one address"
