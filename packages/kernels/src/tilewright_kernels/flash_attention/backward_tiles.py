"""What the kernels of the backward share: scratch memory, and the probabilities of a tile.

Scores are not kept: each kernel multiplies q and k once more and has its probabilities from the
log-sum-exp that forward left, p = exp(s - lse), without a maximum and without a sum.
"""

from tilewright_kernels._triton import tl, triton
from tilewright_kernels.flash_attention.online_softmax import tanh

SCRATCH_ROWS = tl.constexpr(128)
"""Rows of a sequence in scratch memory are padded to a multiple of this, or of the power of two
that the longest sequence fits in: no block needs a mask."""


@triton.jit
def scratch_row(
    batch, head, heads, first_q, rows_per_head, PACKED: tl.constexpr, PADDED: tl.constexpr
):
    """The row of scratch memory where the queries of a sequence and head begin.

    Dense: [batch, heads, rows_per_head]. Packed: [heads, rows_per_head], in which each sequence
    begins at a multiple of PADDED, and none reaches the next. int64: many short packed sequences
    are padded to more rows than int32 counts.
    """
    batch, head = tl.cast(batch, tl.int64), tl.cast(head, tl.int64)
    if PACKED:
        padded = (first_q + batch * PADDED) // PADDED * PADDED
        row = head * rows_per_head + padded
    else:
        row = (batch * heads + head) * rows_per_head
    return row


@triton.jit
def score_scales(scale, softcap, CAP: tl.constexpr):
    """What `probabilities` multiplies products with, and scores, which are in base 2."""
    if CAP != "":
        inner, outer = scale / softcap, softcap * 1.4426950408889634
    else:
        inner, outer = scale * 1.4426950408889634, softcap
    return inner, outer


@triton.jit
def probabilities(products, lse, inner, outer, CAP: tl.constexpr):
    """p = exp(s - lse), and the slope of the softcap at s, 1 where there is none.

    products are q·k, of queries by keys or of keys by queries, as lse is shaped. lse is in base 2,
    +inf where a query sees nothing. inner and outer are of `score_scales`.
    """
    slope = 1.0
    if CAP != "":
        t = tanh(products * inner, CAP)
        slope = 1.0 - t * t
        p = tl.exp2(t * outer - lse)
    else:
        p = tl.exp2(products * inner - lse)
    return p, slope
