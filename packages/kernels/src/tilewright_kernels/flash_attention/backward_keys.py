"""The gradients of k and v: a program owns a block of keys and walks the queries that see it.

    p = exp(s - lse)    dv = pᵀ · dout    dp = dout · vᵀ    ds = p · (dp - delta)    dk = dsᵀ · q

Scores are computed transposed, keys by queries: pᵀ and dsᵀ then are left operands of the next
products, and those the tensor cores take from registers. With `sums` the program multiplies once
more, dq = ds · k, and adds that to float32 sums in memory, atomically and so in no fixed order:
five products in all. Without, dq is another kernel's (backward_queries.py), which must compute s
and dp again: seven.

Query heads of one key head are walked one after another, so that nothing is added up afterwards.
"""

from tilewright_kernels import _triton
from tilewright_kernels._triton import tl, triton
from tilewright_kernels.flash_attention.backward_tiles import (
    probabilities,
    score_scales,
    scratch_row,
)
from tilewright_kernels.flash_attention.masks import keep, query_blocks, shift_of, visible
from tilewright_kernels.flash_attention.online_softmax import as_operand, product
from tilewright_kernels.flash_attention.sequence_rows import load_rows, sequence, store_rows

INTERPRETED = tl.constexpr(_triton.INTERPRETED)


@triton.jit
def _add_columns(
    tile, sums, col, cols_in_all, TMA: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """sums[:, col …] += tile, atomically. The interpreter's descriptors cannot add."""
    if TMA:
        sums.atomic_add([0, col.to(tl.int32)], tile)
    else:
        rows = tl.arange(0, ROWS).to(tl.int64)[:, None]
        cols = col + tl.arange(0, COLS)[None, :]
        tl.atomic_add(sums + rows * cols_in_all + cols, tile, sem="relaxed")


@triton.jit
def _walk_queries(
    dk, dv, k, v, k_ptr, v_ptr, first_k, first_key, k_strides, v_strides, key,
    q_source, dout_source, lse2_ptr, minus_delta_ptr, sums, seed_ptr,
    begin, full_begin, full_end, end, batch, index, kv_head, heads, first_q, len_q, len_k,
    num_q, num_k, shift, left, right, inner, outer, kept, rows_per_head, all_rows,
    q_strides, dout_strides, GROUP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PACKED: tl.constexpr, PADDED: tl.constexpr,
    TMA: tl.constexpr, SUMS_TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """Add what queries begin … end - 1 of each head of the group contribute to dk and dv.

    Those from full_begin to full_end - 1 see all keys, and need no mask.
    """
    blocks = (end - begin) // BLOCK_M
    for step in tl.range(0, blocks * GROUP):
        if GROUP == 1:
            head = kv_head
            row = begin + step * BLOCK_M
        else:
            head = kv_head * GROUP + step // blocks
            row = begin + step % blocks * BLOCK_M
        query = (row + tl.arange(0, BLOCK_M))[None, :]
        scratch = scratch_row(batch, head, heads, first_q, rows_per_head, PACKED, PADDED) + row
        rows = scratch + tl.arange(0, BLOCK_M)

        q = load_rows(
            q_source, index, head, first_q, row, len_q, q_strides, D, BLOCK_M, BLOCK_D, TMA, False
        )
        if PIECE > 0:
            # Kept as operands they are 1024 registers a thread. The row that is none of theirs,
            # and never negative, is for the compiler, which would load them before the loop.
            again = first_key + tl.minimum(row, 0)
            k = load_rows(
                k_ptr, index, kv_head, first_k, again, len_k, k_strides, D,
                BLOCK_N, BLOCK_D, False, False,
            )  # fmt: skip
            v = load_rows(
                v_ptr, index, kv_head, first_k, again, len_k, v_strides, D_V,
                BLOCK_N, BLOCK_DV, False, False,
            )  # fmt: skip
        products = product(k, q.T, tl.zeros((BLOCK_N, BLOCK_M), ACC), PRECISION, PIECE)
        p, slope = probabilities(products, tl.load(lse2_ptr + rows)[None, :], inner, outer, CAP)
        if (row < full_begin) | (row >= full_end):
            seen = visible(query, key, len_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
            p = tl.where(seen, p, 0.0)
        dout = load_rows(
            dout_source, index, head, first_q, row, len_q, dout_strides, D_V,
            BLOCK_M, BLOCK_DV, TMA, False,
        )  # fmt: skip
        minus_delta = tl.load(minus_delta_ptr + rows)[None, :]
        if HAS_DROPOUT:
            dp = product(v, dout.T, tl.zeros((BLOCK_N, BLOCK_M), ACC), PRECISION, PIECE)
            seed = tl.load(seed_ptr)
            kept_here = keep(seed, batch * heads + head, query, key, num_q, num_k, kept)
            inverse = 4294967296.0 / tl.maximum(kept, 1).to(ACC)
            p_dropped = tl.where(kept_here, p * inverse, 0.0)
            dp = tl.where(kept_here, dp * inverse, 0.0) + minus_delta
        else:
            p_dropped = p
            # The sum starts at -delta: nothing is subtracted afterwards.
            dp = tl.broadcast_to(minus_delta, (BLOCK_N, BLOCK_M))
            dp = product(v, dout.T, dp, PRECISION, PIECE)
        p_dropped = as_operand(p_dropped, dout.dtype, PRECISION)
        dv = product(p_dropped, dout, dv, PRECISION, PIECE)
        ds = p * dp
        if CAP != "":
            ds = ds * slope
        ds = as_operand(ds, q.dtype, PRECISION)
        dk = product(ds, q, dk, PRECISION, PIECE)
        if sums is not None:
            # Transposed as well: ds is a right operand as it lies.
            dq = product(k.T, ds, tl.zeros((BLOCK_D, BLOCK_M), ACC), PRECISION, PIECE)
            _add_columns(dq, sums, scratch, all_rows, SUMS_TMA, BLOCK_D, BLOCK_M)
    return dk, dv


@triton.jit(do_not_specialize=["kept", "num_q", "num_k", "kv_heads", "left", "right"])
def attention_backward_keys_kernel(
    q_source, dout_source, q_ptr, k_ptr, v_ptr, dout_ptr,
    lse2_ptr, minus_delta_ptr, sums, dk_ptr, dv_ptr, seed_ptr, cu_q_ptr, cu_k_ptr,
    # float64, so that they are exact there.
    # pyrefly: ignore[not-a-type]
    scale: tl.float64, softcap: tl.float64,
    kept, num_q, num_k, kv_heads, left, right, rows_per_head, all_rows,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    dout_batch, dout_row, dout_head, dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head,
    GROUP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    CAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, PACKED: tl.constexpr, PADDED: tl.constexpr,
    TMA: tl.constexpr, SUMS_TMA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """dk, dv of BLOCK_N keys of one key head, and their part of dq, unscaled, where sums is given.

    Blocks of one head are neighbours, and share its queries in the second-level cache. Where there
    is causality the first has most to do and is started first.
    """
    tiles = tl.cdiv(num_k, BLOCK_N)
    first_key = tl.program_id(0) % tiles * BLOCK_N
    kv_head = tl.program_id(0) // tiles % kv_heads
    batch = tl.program_id(0) // tiles // kv_heads
    index, first_q, len_q, first_k, len_k = sequence(batch, num_q, num_k, cu_q_ptr, cu_k_ptr)
    if first_key >= len_k:
        return
    shift = shift_of(len_q, len_k, BOTTOM_RIGHT)
    last_key = tl.minimum(first_key + BLOCK_N, len_k) - 1
    begin, full_begin, full_end, end = query_blocks(
        first_key, last_key, len_q, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M
    )
    # Keys past the end need a mask at every query. Queries past the end do not: their lse makes p
    # zero. But there, between packed sequences, a descriptor would read what is another one's, and
    # zero times NaN is NaN: the last block is read through pointers.
    if first_key + BLOCK_N > len_k:
        full_begin, full_end = end, end
    last = end
    BY_POINTER: tl.constexpr = PACKED and TMA
    if BY_POINTER:
        last = tl.minimum(end, tl.maximum(begin, len_q // BLOCK_M * BLOCK_M))
    k = load_rows(
        k_ptr, index, kv_head, first_k, first_key, len_k, (k_batch, k_row, k_head), D,
        BLOCK_N, BLOCK_D, False, False,
    )  # fmt: skip
    v = load_rows(
        v_ptr, index, kv_head, first_k, first_key, len_k, (v_batch, v_row, v_head), D_V,
        BLOCK_N, BLOCK_DV, False, False,
    )  # fmt: skip
    key = (first_key + tl.arange(0, BLOCK_N))[:, None]
    scale = tl.full((), scale, ACC)
    inner, outer = score_scales(scale, tl.full((), softcap, ACC), CAP)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=ACC)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), dtype=ACC)
    q_strides, dout_strides = (q_batch, q_row, q_head), (dout_batch, dout_row, dout_head)
    heads = kv_heads * GROUP
    for part in tl.static_range(2 if BY_POINTER else 1):
        dk, dv = _walk_queries(
            dk, dv, k, v, k_ptr, v_ptr, first_k, first_key, (k_batch, k_row, k_head),
            (v_batch, v_row, v_head), key, q_source if part == 0 else q_ptr,
            dout_source if part == 0 else dout_ptr, lse2_ptr, minus_delta_ptr, sums, seed_ptr,
            begin if part == 0 else last, full_begin, full_end, last if part == 0 else end,
            batch, index, kv_head, heads, first_q, len_q, len_k, num_q, num_k, shift,
            left, right, inner, outer, kept, rows_per_head, all_rows,
            q_strides, dout_strides, GROUP, D, D_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
            HAS_LEFT, HAS_RIGHT, CAP, HAS_DROPOUT,
            PACKED, PADDED, TMA and part == 0, SUMS_TMA, ACC, PRECISION, PIECE,
        )  # fmt: skip
    store_rows(
        dk * scale, dk_ptr, index, kv_head, first_k, first_key, len_k,
        (dk_batch, dk_row, dk_head), D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    store_rows(
        dv, dv_ptr, index, kv_head, first_k, first_key, len_k,
        (dv_batch, dv_row, dv_head), D_V, BLOCK_N, BLOCK_DV,
    )  # fmt: skip
