"""Positions of packed tokens: each sequence counts from 0.

    position[n] = n - max of the entries of cu_seqlens that are at most n

The entries ascend, so a token finds its own by bisection, in log2(S) loads that L1 serves. The
positions of a batch are the same in every layer of a model: it is enough to find them once.
"""

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv
from tilewright_kernels._operator import Operator
from tilewright_kernels._triton import tl, triton

BLOCK = 256
"""Tokens of a program."""

_OP = Operator("packed_position_ids")


def packed_position_ids_reference(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The definition in plain torch."""
    tokens = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return tokens - cu_seqlens[torch.searchsorted(cu_seqlens, tokens, right=True) - 1]


@triton.jit(do_not_specialize=["num_tokens", "num_entries", "steps"])
def _packed_position_ids_kernel(
    cu_seqlens_ptr, out_ptr, num_tokens, num_entries, steps, BLOCK: tl.constexpr
):
    """out[n] = n - cu_seqlens[low], where cu_seqlens[low] ≤ n < cu_seqlens[low + 1]."""
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], dtype=tl.int32)
    high = low + num_entries
    for _ in range(steps):
        middle = (low + high) // 2
        above = tl.load(cu_seqlens_ptr + middle) > tokens
        low, high = tl.where(above, low, middle), tl.where(above, middle, high)
    tl.store(out_ptr + tokens, tokens - tl.load(cu_seqlens_ptr + low), mask=tokens < num_tokens)


def _fake(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    return cu_seqlens.new_empty(num_tokens)


@_OP.function(fake=_fake)
def packed_position_ids_forward(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Launch the bisection."""
    out, entries = _fake(cu_seqlens, num_tokens), len(cu_seqlens)
    _OP.launch(
        _packed_position_ids_kernel, (cdiv(num_tokens, BLOCK),), cu_seqlens.contiguous(), out,
        num_tokens, entries, (entries - 1).bit_length(), BLOCK=BLOCK,
    )  # fmt: skip
    return out


def packed_position_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Position of each token within its own sequence of a packed batch.

    Args:
        cu_seqlens: [S + 1] int32 or int64, ascending from 0: sequence s is tokens cu_seqlens[s] to
            cu_seqlens[s + 1].
        num_tokens: N, below 2³¹. Tokens from the last entry on are padding and count anew.

    Returns:
        [N] of cu_seqlens' dtype, found without waiting for the device.

    Raises:
        ValueError: cu_seqlens is not a vector, or has no entry; num_tokens is not in [0, 2³¹).
        TypeError: cu_seqlens is neither int32 nor int64.
    """
    if cu_seqlens.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"cu_seqlens is {cu_seqlens.dtype}; give int64 or int32, as in cu_seqlens.long()"
        )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; it must be [S + 1], 0 first"
        )
    if not 0 <= num_tokens < 2**31:
        raise ValueError(f"num_tokens is {num_tokens}; give 0 or more tokens, fewer than 2**31")
    if not _OP.uses_triton(cu_seqlens):
        return packed_position_ids_reference(cu_seqlens, num_tokens)
    return packed_position_ids_forward(cu_seqlens, num_tokens)
