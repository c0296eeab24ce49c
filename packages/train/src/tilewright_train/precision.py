"""The arithmetic of a run: what weights are stored in, and what products are computed in.

| precision | weights | products | beside the weights |
|---|---|---|---|
| fp32 | float32 | float32, or tf32 where asked for | |
| bf16 | float32 | bfloat16, by autocast | |
| bf16-weights | bfloat16 | bfloat16 | 16 more bits each: exact float32 masters |
| fp16 | float32 | float16, by autocast | a loss scale: torch.amp.GradScaler |
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

Precision = Literal["fp32", "bf16", "bf16-weights", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """The dtypes of one precision."""

    weights: torch.dtype
    """Of parameters, of the gradients that the optimizer reads, and of the residual stream."""
    products: torch.dtype
    """Of what is multiplied."""

    @property
    def autocasts(self) -> bool:
        """Whether weights are cast for each product."""
        return self.weights != self.products

    @property
    def master(self) -> Literal["none", "exact"]:
        """What the optimizer keeps of weights beyond their bits."""
        return "exact" if self.weights == torch.bfloat16 else "none"

    @property
    def scales_loss(self) -> bool:
        """Whether gradients need a scale to stay in the range of the products' dtype."""
        return self.products == torch.float16

    def autocast(self, device_type: str) -> torch.autocast:
        """The context of a forward pass."""
        dtype = self.products if self.autocasts else torch.bfloat16
        return torch.autocast(device_type, dtype, enabled=self.autocasts)


_ARITHMETIC: dict[str, Arithmetic] = {
    "fp32": Arithmetic(weights=torch.float32, products=torch.float32),
    "bf16": Arithmetic(weights=torch.float32, products=torch.bfloat16),
    "bf16-weights": Arithmetic(weights=torch.bfloat16, products=torch.bfloat16),
    "fp16": Arithmetic(weights=torch.float32, products=torch.float16),
}


def arithmetic(precision: str) -> Arithmetic:
    """The dtypes of a precision.

    Raises:
        ValueError: An unknown one.
    """
    if precision not in _ARITHMETIC:
        raise ValueError(
            f"precision is {precision!r}: choose one of {', '.join(get_args(Precision))}"
        )
    return _ARITHMETIC[precision]


def cast_weights(model: nn.Module, precision: str) -> None:
    """Store a model's parameters as the precision does; its tables of angles stay as they are."""
    dtype = arithmetic(precision).weights
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
