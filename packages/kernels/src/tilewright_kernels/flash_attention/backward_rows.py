"""What the backward does once a query: before the tiles, and after them.

Before, in a kernel of its own or in that of dq: delta = Σ out · dout over the columns. The gradient
of a softmax is p · (dp - Σ p · dp), and the sum over all keys is this sum over D columns, since
out = Σ p · v and dp = dout · v.
After: the float32 sums of dq in the type of dq.
"""

from tilewright_kernels._triton import tl, triton
from tilewright_kernels.flash_attention.backward_tiles import scratch_row
from tilewright_kernels.flash_attention.sequence_rows import load_rows, sequence, store_rows


@triton.jit
def row_terms(
    out, dout, lse_ptr, dlse_ptr, index, head, first, rows, length, lse_strides, dlse_strides,
    ACC: tl.constexpr,
):  # fmt: skip
    """lse2 = lse · log2(e) and -delta of the queries `rows`, whose out and dout are given.

    Rows that are no query's, and queries that see nothing, get lse2 = +inf, so that p = 0. The
    gradient of lse itself is p, so it goes into delta.
    """
    inside = rows < length
    minus_delta = -tl.sum(out.to(ACC) * dout.to(ACC), axis=1)
    lse_batch, lse_head, lse_row = lse_strides
    lse_ptr += tl.cast(index, tl.int64) * lse_batch + tl.cast(head, tl.int64) * lse_head
    lse = tl.load(lse_ptr + (first + rows).to(tl.int64) * lse_row, mask=inside, other=0.0).to(ACC)
    if dlse_ptr is not None:
        dlse_batch, dlse_head, dlse_row = dlse_strides
        dlse_ptr += tl.cast(index, tl.int64) * dlse_batch + tl.cast(head, tl.int64) * dlse_head
        dlse = tl.load(dlse_ptr + (first + rows).to(tl.int64) * dlse_row, mask=inside, other=0.0)
        minus_delta += dlse.to(ACC)
    sees = inside & (lse != float("-inf"))
    lse2 = tl.where(sees, lse * 1.4426950408889634, float("inf"))
    return lse2, tl.where(sees, minus_delta, 0.0)


@triton.jit(do_not_specialize=["len_q", "heads", "lse_head", "dlse_head"])
def attention_backward_rows_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, lse2_ptr, minus_delta_ptr, sums_ptr, cu_q_ptr,
    len_q, heads, rows_per_head, all_rows,
    out_batch, out_row, out_head, dout_batch, dout_row, dout_head,
    lse_batch, lse_head, lse_row, dlse_batch, dlse_head, dlse_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SUMS: tl.constexpr, ROWS: tl.constexpr,
    PACKED: tl.constexpr, PADDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`row_terms` of all queries, in padded rows; zeros where dq will be summed, if it will."""
    tiles = tl.cdiv(len_q, PADDED) * (PADDED // ROWS)
    row = tl.program_id(0) % tiles * ROWS
    head = tl.program_id(0) // tiles % heads
    batch = tl.program_id(0) // tiles // heads
    index, first, length, _, _ = sequence(batch, len_q, len_q, cu_q_ptr, cu_q_ptr)
    if row >= tl.cdiv(length, PADDED) * PADDED:
        return
    scratch = scratch_row(batch, head, heads, first, rows_per_head, PACKED, PADDED)
    out = load_rows(
        out_ptr, index, head, first, row, length, (out_batch, out_row, out_head), D,
        ROWS, BLOCK_D, False, False,
    )  # fmt: skip
    dout = load_rows(
        dout_ptr, index, head, first, row, length, (dout_batch, dout_row, dout_head), D,
        ROWS, BLOCK_D, False, False,
    )  # fmt: skip
    rows = row + tl.arange(0, ROWS)
    lse2, minus_delta = row_terms(
        out, dout, lse_ptr, dlse_ptr, index, head, first, rows, length,
        (lse_batch, lse_head, lse_row), (dlse_batch, dlse_head, dlse_row), ACC,
    )  # fmt: skip
    rows += scratch
    tl.store(lse2_ptr + rows, lse2)
    tl.store(minus_delta_ptr + rows, minus_delta)
    if sums_ptr is not None:
        cols = tl.arange(0, BLOCK_SUMS).to(tl.int64)[:, None]
        tl.store(sums_ptr + cols * all_rows + rows[None, :], tl.zeros((BLOCK_SUMS, ROWS), ACC))


@triton.jit(do_not_specialize=["len_q", "heads"])
def attention_backward_finish_kernel(
    sums_ptr, dq_ptr, cu_q_ptr,
    # float64, so that it is exact there.
    # pyrefly: ignore[not-a-type]
    scale: tl.float64,
    len_q, heads, rows_per_head, all_rows, dq_batch, dq_row, dq_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    PACKED: tl.constexpr, PADDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq = scale · sumsᵀ: backward_keys.py adds up dq transposed."""
    tiles = tl.cdiv(len_q, ROWS)
    row = tl.program_id(0) % tiles * ROWS
    head = tl.program_id(0) // tiles % heads
    batch = tl.program_id(0) // tiles // heads
    index, first, length, _, _ = sequence(batch, len_q, len_q, cu_q_ptr, cu_q_ptr)
    if row >= length:
        return
    rows = scratch_row(batch, head, heads, first, rows_per_head, PACKED, PADDED) + row
    rows += tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D).to(tl.int64)[:, None]
    sums = tl.load(sums_ptr + cols * all_rows + rows[None, :])
    store_rows(
        sums.T * tl.full((), scale, ACC), dq_ptr, index, head, first, row, length,
        (dq_batch, dq_row, dq_head), D, ROWS, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["len_q", "heads"])
def attention_backward_unpack_kernel(
    sums_ptr, dq_ptr, cu_q_ptr,
    # float64, so that it is as exact as elsewhere.
    # pyrefly: ignore[not-a-type]
    scale: tl.float64,
    len_q, heads, rows_per_head, dq_batch, dq_row, dq_head,
    D: tl.constexpr, PACKED: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """dq = scale · sums [64, 64] of 64 queries, which lie as backward_hopper.py adds them up.

    That is by warp of four, half of the columns, eight columns, row of eight, pair of columns,
    half of the 16 rows, and column of the pair.
    """
    tiles = tl.cdiv(len_q, 64)
    row = tl.program_id(0) % tiles * 64
    head = tl.program_id(0) // tiles % heads
    batch = tl.program_id(0) // tiles // heads
    index, first, length, _, _ = sequence(batch, len_q, len_q, cu_q_ptr, cu_q_ptr)
    if row >= length:
        return
    at = scratch_row(batch, head, heads, first, rows_per_head, PACKED, PADDED) + row
    sums_ptr += at * 64
    sums = tl.load(sums_ptr + tl.arange(0, 64 * 64))
    sums = sums.reshape(4, 2, 4, 8, 4, 2, 2).permute(0, 5, 3, 1, 2, 4, 6)
    sums = sums.reshape(64, 64) * tl.full((), scale, tl.float32)
    store_rows(
        sums, dq_ptr, index, head, first, row, length, (dq_batch, dq_row, dq_head), D, 64, 64
    )
