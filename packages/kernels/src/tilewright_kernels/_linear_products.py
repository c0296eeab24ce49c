"""The three products of a linear layer, each made by whoever is measured to be faster.

    y = x · Wᵀ + b          dx = dy · W          dW = dyᵀ · x

Operands are read where they lie, transposed ones too. Results that a caller gave memory for are
written there. What is not made by `launch_matmul` is made by torch, which calls cuBLAS.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tilewright_kernels._operator import Operator, check_floating, check_same_device
from tilewright_kernels.matmul import launch_matmul

Product = Literal["forward", "dgrad", "wgrad"]

PRODUCTS: tuple[Product, ...] = get_args(Product)


class Measured(NamedTuple):
    """TFLOP/s of one product."""

    ours: float
    cublas: float


_LINEAR_TABLE: dict[tuple[int, int], dict[Product, Measured]] = {
    (1536, 1536): {
        "forward": Measured(688, 673),
        "dgrad": Measured(670, 665),
        "wgrad": Measured(569, 692),
    },
    (1536, 8192): {
        "forward": Measured(667, 664),
        "dgrad": Measured(691, 694),
        "wgrad": Measured(728, 731),
    },
    (4096, 1536): {
        "forward": Measured(706, 710),
        "dgrad": Measured(670, 656),
        "wgrad": Measured(614, 729),
    },
    (4096, 4096): {
        "forward": Measured(682, 671),
        "dgrad": Measured(681, 677),
        "wgrad": Measured(716, 722),
    },
    (4096, 22016): {
        "forward": Measured(690, 690),
        "dgrad": Measured(698, 683),
        "wgrad": Measured(711, 699),
    },
    (11008, 4096): {
        "forward": Measured(691, 677),
        "dgrad": Measured(687, 675),
        "wgrad": Measured(701, 673),
    },
}
"""By (in_features, out_features): 16384 tokens in bfloat16 on an H200.

Each figure is of one run in which both took turns. Both are bound by the power that the card may
take. The two slow ones have 72 and 192 tiles for 132 multiprocessors.
"""

LEAST_LEAD = 1.01
"""Ours is taken where it is faster by this factor: cuBLAS differs from itself by less."""

LEAST_TOKENS = 4096
"""Fewer tokens were not measured, and are cuBLAS's."""

WIDTH_UNIT = 8
"""Of 16-bit numbers: rows of other widths have no tensor descriptors, and were not measured."""


def is_faster(product: Product, x: Tensor, in_features: int, out_features: int) -> bool:
    """Whether `launch_matmul` is measured to be faster than cuBLAS: the nearest shape decides.

    Nearest by the larger of the two ratios of widths; a ratio of 2 or more is no measurement. In
    plain loops and comparisons, for torch.compile traces it.
    """
    if x.element_size() != 2 or x.numel() < LEAST_TOKENS * x.shape[-1]:
        return False
    if in_features == 0 or out_features == 0:
        return False
    if in_features % WIDTH_UNIT != 0 or out_features % WIDTH_UNIT != 0:
        return False
    nearest, least = None, 2.0
    for (k, n), products in _LINEAR_TABLE.items():
        ratios = k / in_features, in_features / k, n / out_features, out_features / n
        distance = max(ratios)
        if distance < least:
            nearest, least = products.get(product), distance
    return nearest is not None and nearest.ours >= LEAST_LEAD * nearest.cublas


def choose(operator: Operator, x: Tensor, in_features: int, out_features: int) -> list[bool]:
    """Whether each of PRODUCTS is ours: all under backend triton, the faster ones under auto."""
    if operator.setting != "auto":
        return [operator.setting == "triton"] * len(PRODUCTS)
    return [is_faster(product, x, in_features, out_features) for product in PRODUCTS]


def forward_product(
    operator: Operator, x: Tensor, weight: Tensor, bias: Tensor | None, *, ours: bool
) -> Tensor:
    """x [..., K] · weight [N, K]ᵀ + bias [N], contiguous."""
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    if ours:
        launch_matmul(operator, _with_rows(x), weight.T, _with_rows(y), bias=bias)
    elif bias is None:
        torch.mm(as_matrix(x), weight.T, out=as_matrix(y))
    else:
        torch.addmm(bias, as_matrix(x), weight.T, out=as_matrix(y))
    return y


def dgrad_product(operator: Operator, dy: Tensor, weight: Tensor, *, ours: bool) -> Tensor:
    """dy [..., N] · weight [N, K], contiguous."""
    dx = dy.new_empty(*dy.shape[:-1], weight.shape[1])
    if ours:
        launch_matmul(operator, _with_rows(dy), weight, _with_rows(dx))
    else:
        torch.mm(as_matrix(dy), weight, out=as_matrix(dx))
    return dx


def wgrad_product(
    operator: Operator, dy: Tensor, x: Tensor, *, ours: bool, buffer: Tensor | None = None
) -> Tensor:
    """dyᵀ · x, [N, K], added to the buffer where there is one."""
    dy, x = as_matrix(dy), as_matrix(x)
    dweight = dy.new_empty(dy.shape[1], x.shape[1]) if buffer is None else buffer
    if ours:
        launch_matmul(operator, dy.T, x, dweight, accumulate=buffer is not None)
    elif buffer is None:
        torch.mm(dy.T, x, out=dweight)
    elif x.is_cuda and buffer.dtype != x.dtype:
        torch.addmm(buffer, dy.T, x, out_dtype=buffer.dtype, out=buffer)
    else:
        buffer.addmm_(dy.T.to(buffer.dtype), x.to(buffer.dtype))
    return dweight


def as_matrix(x: Tensor) -> Tensor:
    """x [..., K] as [rows, K], copied only where no such view exists."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _with_rows(x: Tensor) -> Tensor:
    return x[None] if x.dim() == 1 else x


def check_operands(x: Tensor, name: str, **weights: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raise unless x is floating and every weight has its shape, x's dtype and x's device.

    Args:
        x: the layer's input.
        name: of x, for messages.
        weights: by name, each with the shape that it must have.
    """
    check_floating(name, x)
    for key, (weight, shape) in weights.items():
        if weight is None:
            continue
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"{key} has shape {tuple(weight.shape)}; with {name} {tuple(x.shape)} it must "
                f"be {shape}"
            )
        if weight.dtype != x.dtype:
            raise TypeError(
                f"{key} is {weight.dtype} and {name} {x.dtype}; give {key}.to({name}.dtype), or "
                f"call it under torch.autocast"
            )
    check_same_device(**{name: x}, **{key: weight for key, (weight, _) in weights.items()})
