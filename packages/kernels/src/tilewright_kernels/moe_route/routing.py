"""What routing decides, as tensors on the device: nothing here waits for it.

Each of T tokens goes to k of E experts, T·k assignments. Assignment a = t·k + j is the j-th choice
of token t. Sorted by expert, and within an expert by token, they are the T·k rows that the products
of the experts work on: expert e has the rows from offs[e - 1] to offs[e]. There is neither padding
nor a limit on the rows of an expert.
"""

from typing import NamedTuple

from torch import Tensor


class Permutation(NamedTuple):
    """The order of rows by expert."""

    tokens_per_expert: Tensor
    """[E] int32: rows of each expert."""
    offs: Tensor
    """[E] int32: end of each expert's rows, the `offs` of `grouped_mm`."""
    indices: Tensor
    """[T·k] int32: assignment that a row holds. The row's token is indices // k."""
    inverse: Tensor
    """[T·k] int32: row that holds an assignment."""


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
        """The rows' order without the weights."""
        return Permutation(self.tokens_per_expert, self.offs, self.permutation, self.inverse)
