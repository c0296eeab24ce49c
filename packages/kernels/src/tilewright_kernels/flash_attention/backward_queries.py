"""The gradient of q: a program owns a block of queries and walks the keys that they see.

    p = exp(s - lse)      dp = dout · vᵀ      ds = p · (dp - delta)      dq = ds · k

Each sum has one owner and one order: the same bits in every run. The price is that s and dp are
computed here and in backward_keys.py, which runs afterwards: as dout is here anyway, so is delta.
"""

from tilewright_kernels._triton import tl, triton
from tilewright_kernels.flash_attention.backward_rows import row_terms
from tilewright_kernels.flash_attention.backward_tiles import (
    probabilities,
    score_scales,
    scratch_row,
)
from tilewright_kernels.flash_attention.masks import keep, key_blocks, shift_of, visible
from tilewright_kernels.flash_attention.online_softmax import as_operand, product
from tilewright_kernels.flash_attention.sequence_rows import load_rows, sequence, store_rows


@triton.jit
def _walk_keys(
    dq, q, dout, q_ptr, dout_ptr, head, first_q, first_query, len_q, q_strides, dout_strides,
    lse2, minus_delta, query, k_source, v_source, seed_ptr,
    begin, full_begin, full_end, end, index, kv_head, dropout_head, first_k, len_k,
    num_q, num_k, shift, left, right, inner, outer, kept, k_strides, v_strides,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    CAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Add what keys begin … end - 1 contribute to dq.

    Those from full_begin to full_end - 1 are seen by all queries, and need no mask.
    """
    for row in tl.range(begin, end, BLOCK_N):
        key = (row + tl.arange(0, BLOCK_N))[None, :]
        k = load_rows(
            k_source, index, kv_head, first_k, row, len_k, k_strides, D,
            BLOCK_N, BLOCK_D, TMA, False,
        )  # fmt: skip
        if PIECE > 0:  # as in backward_keys.py
            again = first_query + tl.minimum(row, 0)
            q = load_rows(
                q_ptr, index, head, first_q, again, len_q, q_strides, D,
                BLOCK_M, BLOCK_D, False, False,
            )  # fmt: skip
            dout = load_rows(
                dout_ptr, index, head, first_q, again, len_q, dout_strides, D_V,
                BLOCK_M, BLOCK_DV, False, False,
            )  # fmt: skip
        products = product(q, k.T, tl.zeros((BLOCK_M, BLOCK_N), ACC), PRECISION, PIECE)
        v = load_rows(
            v_source, index, kv_head, first_k, row, len_k, v_strides, D_V,
            BLOCK_N, BLOCK_DV, TMA, False,
        )  # fmt: skip
        p, slope = probabilities(products, lse2, inner, outer, CAP)
        if (row < full_begin) | (row >= full_end):
            seen = visible(query, key, len_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
            p = tl.where(seen, p, 0.0)
        if HAS_DROPOUT:
            dp = product(dout, v.T, tl.zeros((BLOCK_M, BLOCK_N), ACC), PRECISION, PIECE)
            seed = tl.load(seed_ptr)
            kept_here = keep(seed, dropout_head, query, key, num_q, num_k, kept)
            dp = tl.where(kept_here, dp * (4294967296.0 / tl.maximum(kept, 1).to(ACC)), 0.0)
            dp += minus_delta
        else:
            # The sum starts at -delta: nothing is subtracted afterwards.
            dp = tl.broadcast_to(minus_delta, (BLOCK_M, BLOCK_N))
            dp = product(dout, v.T, dp, PRECISION, PIECE)
        ds = p * dp
        if CAP != "":
            ds = ds * slope
        dq = product(as_operand(ds, k.dtype, PRECISION), k, dq, PRECISION, PIECE)
    return dq


@triton.jit(
    do_not_specialize=["kept", "num_q", "num_k", "heads", "left", "right", "lse_head", "dlse_head"]
)
def attention_backward_queries_kernel(
    k_source, v_source, q_ptr, k_ptr, v_ptr, dout_ptr, out_ptr, lse_ptr, dlse_ptr,
    lse2_ptr, minus_delta_ptr, dq_ptr, seed_ptr, cu_q_ptr, cu_k_ptr,
    # float64, so that they are exact there.
    # pyrefly: ignore[not-a-type]
    scale: tl.float64, softcap: tl.float64,
    kept, num_q, num_k, heads, left, right, rows_per_head,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    dout_batch, dout_row, dout_head, out_batch, out_row, out_head, dq_batch, dq_row, dq_head,
    lse_batch, lse_head, lse_row, dlse_batch, dlse_head, dlse_row,
    GROUP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    CAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PACKED: tl.constexpr, PADDED: tl.constexpr, TMA: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head, and `row_terms`, for the kernel of the keys.

    The last queries have most keys to see and are started first.
    """
    tiles = tl.cdiv(num_q, PADDED) * (PADDED // BLOCK_M)
    first_query = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    head = tl.program_id(0) // tiles % heads
    batch = tl.program_id(0) // tiles // heads
    kv_head = head // GROUP
    index, first_q, len_q, first_k, len_k = sequence(batch, num_q, num_k, cu_q_ptr, cu_k_ptr)
    if first_query >= tl.cdiv(len_q, PADDED) * PADDED:
        return
    shift = shift_of(len_q, len_k, BOTTOM_RIGHT)
    begin, full_begin, full_end, end = key_blocks(
        first_query, tl.minimum(first_query + BLOCK_M, len_q) - 1, len_k, shift, left, right,
        HAS_LEFT, HAS_RIGHT, BLOCK_N,
    )  # fmt: skip
    if first_query >= len_q:  # scratch memory alone
        end = begin
    # Past the end of a packed sequence lies another one, or anything, and zero times NaN is NaN:
    # the last block is read through pointers.
    BY_POINTER: tl.constexpr = PACKED and TMA
    last = end
    if BY_POINTER:
        last = tl.minimum(end, tl.maximum(begin, len_k // BLOCK_N * BLOCK_N))

    q = load_rows(
        q_ptr, index, head, first_q, first_query, len_q, (q_batch, q_row, q_head), D,
        BLOCK_M, BLOCK_D, False, False,
    )  # fmt: skip
    dout = load_rows(
        dout_ptr, index, head, first_q, first_query, len_q, (dout_batch, dout_row, dout_head),
        D_V, BLOCK_M, BLOCK_DV, False, False,
    )  # fmt: skip
    query = first_query + tl.arange(0, BLOCK_M)
    rows = scratch_row(batch, head, heads, first_q, rows_per_head, PACKED, PADDED) + query
    out = load_rows(
        out_ptr, index, head, first_q, first_query, len_q, (out_batch, out_row, out_head), D_V,
        BLOCK_M, BLOCK_DV, False, False,
    )  # fmt: skip
    lse2, minus_delta = row_terms(
        out, dout, lse_ptr, dlse_ptr, index, head, first_q, query, len_q,
        (lse_batch, lse_head, lse_row), (dlse_batch, dlse_head, dlse_row), ACC,
    )  # fmt: skip
    tl.store(lse2_ptr + rows, lse2)
    tl.store(minus_delta_ptr + rows, minus_delta)
    lse2, minus_delta = lse2[:, None], minus_delta[:, None]
    scale = tl.full((), scale, ACC)
    inner, outer = score_scales(scale, tl.full((), softcap, ACC), CAP)
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=ACC)
    for part in tl.static_range(2 if BY_POINTER else 1):
        dq = _walk_keys(
            dq, q, dout, q_ptr, dout_ptr, head, first_q, first_query, len_q,
            (q_batch, q_row, q_head), (dout_batch, dout_row, dout_head),
            lse2, minus_delta, query[:, None],
            k_source if part == 0 else k_ptr, v_source if part == 0 else v_ptr, seed_ptr,
            begin if part == 0 else last, full_begin, full_end, last if part == 0 else end,
            index, kv_head, batch * heads + head, first_k, len_k, num_q, num_k, shift,
            left, right, inner, outer, kept,
            (k_batch, k_row, k_head), (v_batch, v_row, v_head),
            D, D_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, CAP,
            HAS_DROPOUT, TMA and part == 0, ACC, PRECISION, PIECE,
        )  # fmt: skip
    store_rows(
        dq * scale, dq_ptr, index, head, first_q, first_query, len_q,
        (dq_batch, dq_row, dq_head), D, BLOCK_M, BLOCK_D,
    )  # fmt: skip
