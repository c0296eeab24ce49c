"""The second half of every weight gradient: partial sums of many programs, added column by column.

A backward kernel whose programs each keep a private sum over their rows writes partial [P, N] in
the accumulation type; one small launch adds the P rows in a fixed order and casts. Two runs give
the same bits, which atomics would not.
"""

import torch

from tilewright_kernels._launch import cdiv
from tilewright_kernels._operator import Operator, accumulator
from tilewright_kernels._triton import tl, triton

BLOCK_P, BLOCK_N = 256, 16
"""Narrow blocks: the partials lie in L2, and what counts is how many programs ask for them."""


@triton.jit
def _column_sum_kernel(
    partial_ptr, out_ptr, num_partials, n_cols,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[n] = Σ_p partial[p, n]; moves P·N partials in, N sums out."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < n_cols
    total = tl.zeros([BLOCK_P, BLOCK_N], dtype=ACC)
    for start in range(0, num_partials, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask = (p < num_partials)[:, None] & col_mask[None, :]
        total += tl.load(partial_ptr + p[:, None] * n_cols + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, axis=0), mask=col_mask)


def column_sum(operator: Operator, partial: torch.Tensor, out: torch.Tensor) -> None:
    """Sum partial [P, N] over P into out [N], of any dtype; the launch counts for `operator`."""
    num_partials, n_cols = partial.shape
    operator.launch(
        _column_sum_kernel, (cdiv(n_cols, BLOCK_N),), partial, out, num_partials, n_cols,
        ACC=accumulator(partial.dtype), BLOCK_P=BLOCK_P, BLOCK_N=BLOCK_N, num_warps=4,
    )  # fmt: skip
