"""Parameters and gradients for tests of optimizers, the same on every device."""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter


def random_parameters(
    device: torch.device, dtype: torch.dtype, shapes: Iterable[Sequence[int]], seed: int = 0
) -> list[Parameter]:
    """Parameters of these shapes, drawn on the CPU from a normal distribution.

    Args:
        device: where they are put.
        dtype: to which they are rounded.
        shapes: of each.
        seed: of their values.
    """
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def set_random_grads(
    params: Iterable[Tensor], seed: int, skip: Collection[int] = (), factor: float = 1.0
) -> None:
    """Give each parameter a gradient that depends on seed alone, drawn on the CPU.

    Args:
        params: whose.
        seed: of the values.
        skip: indices of those that get None.
        factor: standard deviation.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator) * factor
        param.grad = None if i in skip else grad.to(param)
