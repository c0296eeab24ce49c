"""What routing decides, as tensors on the device: nothing here waits for it.

Each of T tokens goes to k of E experts, T·k assignments. Assignment a = t·k + j is the j-th choice
of token t. Sorted by expert, and within an expert by token, they are the T·k rows that the products
of the experts work on: expert e has the rows from offs[e - 1] to offs[e]. There is neither padding
nor a limit on the rows of an expert.
"""

from typing import NamedTuple

from torch import Tensor

from tilewright_kernels._operator import check_floating, check_same_device
from tilewright_kernels.moe_route.rows import (
    COMBINE,
    PERMUTE,
    combine_reference,
    moe_combine_forward,
    moe_permute_forward,
    permute_reference,
)


class Permutation(NamedTuple):
    """The order of rows by expert, and the ways there and back.

    Between `apply` and `combine` stand the experts; with experts on several devices, an all-to-all
    of the rows as well: those for the experts of one device lie together.
    """

    tokens_per_expert: Tensor
    """[E] int32: rows of each expert."""
    offs: Tensor
    """[E] int32: end of each expert's rows, the `offs` of `grouped_mm`."""
    indices: Tensor
    """[T·k] int32: assignment that a row holds. The row's token is indices // k."""
    inverse: Tensor
    """[T·k] int32: row that holds an assignment."""
    k: int
    """Assignments a token."""

    def apply(self, x: Tensor) -> Tensor:
        """Each token's vector to each of its rows.

        Args:
            x: [T, N] in float16, bfloat16, float32 or float64; rows at any distance.

        Returns:
            [T·k, N], contiguous. Differentiable once.

        Raises:
            ValueError: x has not T rows, or is on another device.
            TypeError: x is not floating point.
        """
        _check("x", x, len(self.inverse) // self.k, self.inverse)
        if PERMUTE.uses_triton(x):
            return moe_permute_forward(x, self.inverse.contiguous(), self.k)
        return permute_reference(x, self.indices, self.k)

    def combine(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """The sum of each token's rows, in float32 (float64 for float64) and the order of choices.

        Args:
            rows: [T·k, N] in float16, bfloat16, float32 or float64; at any distance.
            weights: [T, k], factors of the rows in any of these dtypes; None for ones.

        Returns:
            [T, N] of rows' dtype, contiguous. Differentiable once, by rows and weights.

        Raises:
            ValueError: shapes that do not fit, tensors on different devices.
            TypeError: rows or weights is not floating point.
        """
        _check("rows", rows, len(self.inverse), self.inverse)
        if weights is not None:
            check_floating("weights", weights)
            shape = (len(self.inverse) // self.k, self.k)
            if tuple(weights.shape) != shape:
                raise ValueError(f"weights has shape {tuple(weights.shape)}; it must be {shape}")
            check_same_device(rows=rows, weights=weights)
        if COMBINE.uses_triton(rows):
            return moe_combine_forward(rows, weights, self.inverse.contiguous(), self.k)
        return combine_reference(rows, weights, self.inverse, self.k)


class Routing(NamedTuple):
    """Where each token goes, and with what weight."""

    weights: Tensor
    """[T, k] float32 (float64 for float64 logits): share of each chosen expert. Differentiable."""
    ids: Tensor
    """[T, k] int32: the chosen experts, best first."""
    tokens_per_expert: Tensor
    """[E] int32: rows of each expert."""
    offs: Tensor
    """[E] int32: end of each expert's rows, the `offs` of `grouped_mm`."""
    permutation: Tensor
    """[T·k] int32: assignment t·k + j that a row holds. The row's token is permutation // k."""
    inverse: Tensor
    """[T·k] int32: row that holds an assignment."""

    def order(self) -> Permutation:
        """The order of rows, as an object that can apply it."""
        tensors = (self.tokens_per_expert, self.offs, self.permutation, self.inverse)
        return Permutation(*tensors, self.ids.shape[1])


def _check(name: str, x: Tensor, num_rows: int, inverse: Tensor) -> None:
    check_floating(name, x)
    if x.dim() != 2 or x.shape[0] != num_rows:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [{num_rows}, N]")
    check_same_device(permutation=inverse, **{name: x})
