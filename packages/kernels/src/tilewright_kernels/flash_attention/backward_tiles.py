"""What the kernels of the backward are made of: where a sequence lies, tiles, probabilities.

Scores are not kept: each kernel multiplies q and k once more and has its probabilities from the
log-sum-exp that forward left, p = exp(s - lse), without a maximum and without a sum.
"""

from tilewright_kernels._triton import tl, triton
from tilewright_kernels.flash_attention.masks import visible

SCRATCH_ROWS = tl.constexpr(128)
"""Rows of a sequence in scratch memory are padded to a multiple of this: no block needs a mask."""


@triton.jit
def sequence(batch, len_q, len_k, cu_q_ptr, cu_k_ptr):
    """Where sequence `batch` lies: (index in the tensors, first query, queries, first key, keys).

    Packed sequences lie in one row of the batch; len_q and len_k are then the longest ones'.
    """
    if cu_q_ptr is None:
        index = batch
        first_q, first_k = len_q * 0, len_k * 0
    else:
        index = batch * 0
        first_q, first_k = tl.load(cu_q_ptr + batch), tl.load(cu_k_ptr + batch)
        len_q = tl.load(cu_q_ptr + batch + 1) - first_q
        len_k = tl.load(cu_k_ptr + batch + 1) - first_k
    return index, first_q, len_q, first_k, len_k


@triton.jit
def scratch_row(batch, head, heads, first_q, rows_per_head, PACKED: tl.constexpr):
    """The row of scratch memory where the queries of a sequence and head begin.

    Dense: [batch, heads, rows_per_head]. Packed: [heads, rows_per_head], in which each sequence
    begins at a multiple of SCRATCH_ROWS, and none reaches the next.
    """
    if PACKED:
        padded = (first_q + batch * SCRATCH_ROWS) // SCRATCH_ROWS * SCRATCH_ROWS
        row = head * rows_per_head + padded
    else:
        row = (batch * heads + head) * rows_per_head
    return row


@triton.jit
def load_rows(
    source, index, head, first, row, length, strides, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr, CLEAR: tl.constexpr,
):  # fmt: skip
    """Rows row … row + ROWS - 1 of a sequence that begins at `first`, zeros past its end.

    source is a descriptor of [B, H, T, WIDTH], or a pointer, which needs the strides of the batch,
    the rows and the heads. A descriptor sees the tensor's end only: with CLEAR what lies between
    the sequence's and that one becomes zero, since a probability of zero times a NaN is a NaN.
    """
    inside = row + tl.arange(0, ROWS)[:, None] < length
    if TMA:
        tile = source.load([index, head, first + row, 0]).reshape(ROWS, COLS)
        if CLEAR:
            tile = tl.where(inside, tile, 0.0)
    else:
        batch_stride, row_stride, head_stride = strides
        rows = (first + row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        cols = tl.arange(0, COLS)[None, :]
        source += tl.cast(index, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride
        tile = tl.load(
            source + rows * row_stride + cols, mask=inside & (cols < WIDTH), other=0.0
        )  # fmt: skip
    return tile


@triton.jit
def store_rows(
    tile, pointer, index, head, first, row, length, strides,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write what of a tile lies within the sequence, in the type of the memory."""
    batch_stride, row_stride, head_stride = strides
    inside = row + tl.arange(0, ROWS)[:, None] < length
    rows = (first + row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    pointer += tl.cast(index, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride
    tl.store(
        pointer + rows * row_stride + cols, tile.to(pointer.dtype.element_ty),
        mask=inside & (cols < WIDTH),
    )  # fmt: skip


@triton.jit
def probabilities(
    products, lse, query, key, len_k, shift, left, right, scale, softcap,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """p = exp(s - lse), and the slope of the softcap at s, 1 where there is none.

    products are q·k, of queries by keys or of keys by queries, as query and key are shaped. lse is
    in base 2, +inf where a query sees nothing. The scale of the products is divided by the softcap
    where there is one, else times log2(e); softcap is times log2(e).
    """
    slope = 1.0
    if HAS_SOFTCAP:
        # tanh through e²ˣ, which may be inf. 1 / d is the reciprocal root of d².
        d = 1.0 + tl.exp2(products * (scale * 2.8853900817779268))
        tanh = 1.0 - 2.0 * (1.0 / d if products.dtype == tl.float64 else tl.rsqrt(d * d))
        slope = 1.0 - tanh * tanh
        p = tl.exp2(tanh * softcap - lse)
    else:
        p = tl.exp2(products * scale - lse)
    if MASKED:
        seen = visible(query, key, len_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
        p = tl.where(seen, p, 0.0)
    return p, slope
