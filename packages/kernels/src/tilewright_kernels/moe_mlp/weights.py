"""The router's weights in the order of rows, and their gradient back in the order of tokens."""

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv, next_power_of_2
from tilewright_kernels._operator import Operator
from tilewright_kernels._triton import tl, triton


@triton.jit
def weight_grads_kernel(
    dots_ptr, dweights_ptr, inverse_ptr, assignments, parts,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dweights[a] = Σ dots[inverse[a]], the parts of a row in their order."""
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(inverse_ptr + own, mask=own < assignments, other=0).to(tl.int64)
    cols = tl.arange(0, PARTS)
    mask = (own < assignments)[:, None] & (cols < parts)[None, :]
    dots = tl.load(dots_ptr + rows[:, None] * parts + cols[None, :], mask=mask, other=0.0)
    dweights = tl.sum(dots, axis=1).to(dweights_ptr.dtype.element_ty)
    tl.store(dweights_ptr + own, dweights, mask=own < assignments)


def row_weights(weights: Tensor, permutation: Tensor, dtype: torch.dtype) -> Tensor:
    """weights [T, k] as [T · k] in the experts' order, in float32 or, for float64 rows, float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return weights.detach().to(wide).flatten().index_select(0, permutation)


def weight_grads(operator: Operator, dots: Tensor, dweights: Tensor, inverse: Tensor) -> None:
    """dweights [T, k] of dots [T · k, parts]."""
    assignments, parts = dots.shape
    columns = next_power_of_2(parts)
    block = max(1, min(64, 4096 // columns))
    operator.launch(
        weight_grads_kernel, (cdiv(assignments, block),),
        dots, dweights, inverse, assignments, parts, BLOCK=block, PARTS=columns,
    )  # fmt: skip
