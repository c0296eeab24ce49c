"""What all kernels of one backward share, as the host has it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv
from tilewright_kernels._operator import Operator, accumulator
from tilewright_kernels._triton import HAS_TRITON
from tilewright_kernels.dropout import kept_words
from tilewright_kernels.flash_attention.backward_tiles import SCRATCH_ROWS
from tilewright_kernels.flash_attention.masks import Mask
from tilewright_kernels.flash_attention.online_softmax import cap_of
from tilewright_kernels.flash_attention.operands import dot_precision
from tilewright_kernels.flash_attention.tiles import padded

PADDED = SCRATCH_ROWS.value if HAS_TRITON else 128


class Problem(NamedTuple):
    """One backward of tensors [B, T, H, D], packed ones with B = 1.

    Attributes:
        operator: whose launches they are.
        lengths: (T_q, T_k), or those of the longest sequences.
        batch: sequences.
        heads: of queries.
        kv_heads: of keys.
        rows_per_head: of scratch memory.
        lse2: scratch memory: log-sum-exp in base 2, a number a row.
        minus_delta: likewise.
        cu_seqlens_q: where sequences are packed, else None.
        cu_seqlens_k: likewise.
        seed: int64 scalar, None without dropout.
        kept: of 2³² random words, how many keep.
        scale: of q·k.
        softcap: c of c · tanh(s / c), 0 for none.
        mask: what a query sees.
        widths: D, D_V, BLOCK_D and BLOCK_DV.
        flags: the constants that say which features there are.
    """

    operator: Operator
    lengths: tuple[int, int]
    batch: int
    heads: int
    kv_heads: int
    rows_per_head: int
    lse2: Tensor
    minus_delta: Tensor
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seed: Tensor | None
    kept: int
    scale: float
    softcap: float
    mask: Mask
    widths: dict[str, int]
    flags: dict[str, Any]

    @property
    def extras(self) -> tuple[Any, ...]:
        """What the portable kernels of the tiles take one after another."""
        sequences = self.cu_seqlens_q, self.cu_seqlens_k
        return self.seed, *sequences, self.scale, self.softcap, self.kept

    @property
    def keys_seen(self) -> float:
        """About how many keys a query sees in the mean: half of all on each side of its place."""
        half = self.lengths[1] / 2
        return sum(half if limit < 0 else min(limit, half) for limit in self.mask.window)

    def constants(self, *names: str) -> dict[str, Any]:
        """Some of the flags."""
        return {name: self.flags[name] for name in names}


def problem_of(
    operator: Operator, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, scale: float,
    softcap: float, dropout_p: float, seed: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
) -> Problem:  # fmt: skip
    """The problem of `launch_backward`'s arguments, with scratch memory of its own."""
    heads, kv_heads = q.shape[2], k.shape[2]
    if cu_seqlens_q is None:
        batch, lengths = len(q), (q.shape[1], k.shape[1])
        rows = min(PADDED, padded(max(1, lengths[0])))
        rows_per_head = cdiv(q.shape[1], rows) * rows
    else:
        batch, lengths = len(cu_seqlens_q) - 1, (max_seqlen_q, max_seqlen_k)
        rows = min(PADDED, padded(max(1, lengths[0])))
        # Sequence b begins at cu[b] + b · rows rounded down: see scratch_row.
        rows_per_head = (q.shape[1] // rows + batch + 1) * rows
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse2, minus_delta = q.new_empty((2, len(q) * heads * rows_per_head), dtype=wide)
    kept = kept_words(dropout_p)
    left, right = mask.window
    widths = {"D": q.shape[3], "D_V": v.shape[3]}
    flags = {
        "GROUP": heads // max(1, kv_heads),
        "BOTTOM_RIGHT": mask.bottom_right,
        "HAS_LEFT": left >= 0,
        "HAS_RIGHT": right >= 0,
        "CAP": cap_of(softcap, q),
        "HAS_DROPOUT": kept < 2**32,
        "PACKED": cu_seqlens_q is not None,
        "PADDED": rows,
        "ACC": accumulator(q.dtype),
        "PRECISION": dot_precision(q.dtype),
    }
    return Problem(
        operator, lengths, batch, heads, kv_heads, rows_per_head, lse2, minus_delta,
        cu_seqlens_q, cu_seqlens_k, seed if kept < 2**32 else None, kept, scale, softcap, mask,
        widths | {"BLOCK_D": padded(widths["D"]), "BLOCK_DV": padded(widths["D_V"])}, flags,
    )  # fmt: skip
