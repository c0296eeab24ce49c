"""The kernel of `flash_attn_with_kvcache`: one new token a sequence, from its projections to out.

    q', k' = turn(norm(q)), turn(norm(k))        cache ← k', v        out = softmax(q' · Kᵀ) · V

Five launches in one: norm and rotation, two writes to the cache, attention of each split, the join
of the splits. The new key is not read back: split 0 starts its softmax with it.
"""

from tilewright_kernels._overlap import allow_next_launch, await_previous_launch, fetch_rows_to_l2
from tilewright_kernels._triton import tl, triton
from tilewright_kernels.flash_attention.online_softmax import finish_rows, scores, take_piece
from tilewright_kernels.flash_attention.sequence_rows import load_rows


@triton.jit
def attention_with_kvcache_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, lengths_ptr, cos_ptr, sin_ptr,
    q_norm_ptr, k_norm_ptr, out_ptr, parts_ptr, part_lse_ptr, counters_ptr,
    capacity, table_rows, kv_heads, window,
    q_batch_stride, q_head_stride, k_batch_stride, k_head_stride, v_batch_stride, v_head_stride,
    k_cache_batch_stride, k_cache_row_stride, k_cache_head_stride,
    v_cache_batch_stride, v_cache_row_stride, v_cache_head_stride, cos_row_stride, sin_row_stride,
    EPS: tl.constexpr, BEFORE: tl.constexpr, FACTOR: tl.constexpr, CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    OVERLAP: tl.constexpr, EARLY: tl.constexpr, PREFETCH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All query heads of one key head over one split of its keys; grid (SPLITS · heads · batch).

    parts is [SPLITS, batch, heads, D], part_lse the same without D. The program that arrives last
    joins them, in the order of the splits.
    """
    allow_next_launch(EARLY)
    split = tl.program_id(0) % SPLITS
    kv_head = tl.program_id(0) // SPLITS % kv_heads
    batch = tl.program_id(0) // SPLITS // kv_heads
    k_strides = k_cache_batch_stride, k_cache_row_stride, k_cache_head_stride
    v_strides = v_cache_batch_stride, v_cache_row_stride, v_cache_head_stride
    if not PREFETCH:
        await_previous_launch(OVERLAP)
    length = tl.load(lengths_ptr + batch)
    held = tl.minimum(length, capacity)
    begin = length * 0
    if HAS_WINDOW:
        begin = tl.minimum(tl.maximum(length - window, 0), held)
    stretch = tl.cdiv(tl.cdiv(held - begin, BLOCK_N), SPLITS) * BLOCK_N
    begin += split * stretch
    end = tl.minimum(begin + stretch, held)
    cols = tl.arange(0, BLOCK_D)[None, :]
    cos, sin = _rotation(
        cos_ptr, sin_ptr, length, cols, cos_row_stride, sin_row_stride, table_rows, ROTARY, ACC
    )
    if PREFETCH > 0:
        # Past the end the last row again, which costs nothing.
        key = tl.minimum(begin + tl.arange(0, PREFETCH), tl.maximum(end - 1, 0)).to(tl.int64)
        of_batch = tl.cast(batch, tl.int64)
        k_at = k_cache_ptr + of_batch * k_cache_batch_stride + kv_head * k_cache_head_stride
        v_at = v_cache_ptr + of_batch * v_cache_batch_stride + kv_head * v_cache_head_stride
        fetch_rows_to_l2(k_at + key * k_cache_row_stride, D)
        fetch_rows_to_l2(v_at + key * v_cache_row_stride, D)
        await_previous_launch(OVERLAP)

    row = tl.arange(0, ROWS)
    head = kv_head * GROUP + row
    there = (row < GROUP)[:, None]
    inside = cols < D
    wide = tl.cast(batch, tl.int64)
    q_rows = q_ptr + wide * q_batch_stride + head[:, None] * q_head_stride
    one = tl.zeros((1, 1), dtype=tl.int32)
    k_rows = k_ptr + wide * k_batch_stride + (kv_head + one) * k_head_stride
    # All of the new token at once: each wait is as long as that for a whole block of the cache.
    q, q_partner = _with_partner(q_rows, there, cols, D, ROTARY)
    k, k_partner = _with_partner(k_rows, one == 0, cols, D, ROTARY)
    v = tl.load(v_ptr + wide * v_batch_stride + kv_head * v_head_stride + cols, mask=inside)
    q = _turned(q, q_partner, q_norm_ptr, cos, sin, cols, EPS, D, ROTARY, ACC)
    k = _turned(k, k_partner, k_norm_ptr, cos, sin, cols, EPS, D, ROTARY, ACC)
    is_first = split == 0
    new_row = inside & is_first & (length < capacity)
    at = wide * k_cache_batch_stride + kv_head * k_cache_head_stride
    at += length.to(tl.int64) * k_cache_row_stride
    tl.store(k_cache_ptr + at + cols, k, mask=new_row)
    at = wide * v_cache_batch_stride + kv_head * v_cache_head_stride
    at += length.to(tl.int64) * v_cache_row_stride
    tl.store(v_cache_ptr + at + cols, v, mask=new_row)

    own = scores(tl.sum(q.to(ACC) * k.to(ACC), 1), BEFORE, CAP) * FACTOR
    m = tl.where(is_first, own, float("-inf"))
    l = tl.where(is_first, 1.0, tl.zeros((ROWS,), dtype=ACC))
    acc = tl.zeros((ROWS, BLOCK_D), dtype=ACC) + tl.where(inside & is_first, v, 0.0).to(ACC)
    for j in tl.range(begin, end, BLOCK_N):
        keys = load_rows(
            k_cache_ptr, batch, kv_head, 0, j, end, k_strides, D, BLOCK_N, BLOCK_D, False, False
        )
        s = scores(tl.dot(q, keys.T, input_precision="ieee", out_dtype=ACC), BEFORE, CAP)
        s = tl.where((j + tl.arange(0, BLOCK_N))[None, :] < end, s, float("-inf"))
        p, m, l, alpha = take_piece(s, m, l, FACTOR, True)
        values = load_rows(
            v_cache_ptr, batch, kv_head, 0, j, end, v_strides, D, BLOCK_N, BLOCK_D, False, False
        )
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(values.dtype), values, acc, input_precision="ieee", out_dtype=ACC)
    acc, lse = finish_rows(m, l, acc)

    heads = kv_heads * GROUP
    outs = wide * heads + head
    if SPLITS == 1:
        tl.store(
            out_ptr + outs[:, None] * D + cols, acc.to(out_ptr.dtype.element_ty),
            mask=there & inside,
        )  # fmt: skip
    else:
        groups = tl.num_programs(0) // SPLITS
        step = groups * GROUP
        mine = split.to(tl.int64) * step + outs
        tl.store(parts_ptr + mine[:, None] * D + cols, acc, mask=there & inside)
        tl.store(part_lse_ptr + mine, lse, mask=row < GROUP)
        tl.debug_barrier()
        counter = counters_ptr + batch * kv_heads + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
            for g in tl.static_range(GROUP):
                _join(
                    parts_ptr, part_lse_ptr, out_ptr, wide * heads + kv_head * GROUP + g, step,
                    D, BLOCK_D, SPLITS, ACC,
                )  # fmt: skip
            tl.store(counter, 0)


@triton.jit
def _partner(cols, ROTARY: tl.constexpr):
    """The column that each one is turned with."""
    HALF: tl.constexpr = ROTARY // 2
    return tl.where(cols < HALF, cols + HALF, cols - HALF)


@triton.jit
def _rotation(
    cos_ptr, sin_ptr, position, cols, cos_row_stride, sin_row_stride, table_rows,
    ROTARY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What each column, and its partner, is multiplied by; columns past ROTARY stay."""
    cos, sin = 1.0, 0.0
    if ROTARY > 0:
        HALF: tl.constexpr = ROTARY // 2
        turning = cols < ROTARY
        # A position outside the tables cannot raise here: it gives NaN, as in apply_rotary_emb.
        known = turning & (position < table_rows)
        at = position.to(tl.int64)
        cos = tl.load(cos_ptr + at * cos_row_stride + cols % HALF, mask=known, other=float("nan"))
        sin = tl.load(sin_ptr + at * sin_row_stride + cols % HALF, mask=known, other=float("nan"))
        cos = tl.where(turning, cos.to(ACC), 1.0)
        sin = tl.where(turning, tl.where(cols < HALF, -sin.to(ACC), sin.to(ACC)), 0.0)
    return cos, sin


@triton.jit
def _with_partner(rows, there, cols, D: tl.constexpr, ROTARY: tl.constexpr):
    """Heads at `rows` [R, 1] as they are, zeros past D, and with the columns' partners."""
    x = tl.load(rows + cols, mask=there & (cols < D), other=0.0)
    partner = x
    if ROTARY > 0:
        partner = tl.load(
            rows + _partner(cols, ROTARY), mask=there & (cols < ROTARY), other=0.0
        )  # fmt: skip
    return x, partner


@triton.jit
def _turned(
    raw, raw_partner, norm_ptr, cos, sin, cols,
    EPS: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Heads [R, BLOCK_D], normalized and rotated.

    Rounded after the norm and after the rotation, where operators of their own would round.
    """
    x, y = raw.to(ACC), raw_partner.to(ACC)
    if norm_ptr is not None:
        r = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)[:, None]
        weight = tl.load(norm_ptr + cols, mask=cols < D, other=0.0).to(ACC)
        x = (x * r * weight).to(raw.dtype).to(ACC)
        if ROTARY > 0:
            weight = tl.load(norm_ptr + _partner(cols, ROTARY), mask=cols < ROTARY, other=0.0)
            y = (y * r * weight.to(ACC)).to(raw.dtype).to(ACC)
    if ROTARY > 0:
        x = x * cos + y * sin
    return x.to(raw.dtype)


@triton.jit
def _join(
    parts_ptr, part_lse_ptr, out_ptr, at, step,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out of one head from its splits, which are `step` rows apart; split 0 is never empty."""
    ROUNDED: tl.constexpr = triton.next_power_of_2(SPLITS)
    split = tl.arange(0, ROUNDED)
    cols = tl.arange(0, BLOCK_D)
    row = at + split.to(tl.int64) * step
    lse = tl.load(
        part_lse_ptr + row, mask=split < SPLITS, other=float("-inf"), cache_modifier=".cg"
    )  # fmt: skip
    weight = tl.exp(lse - tl.max(lse, 0))
    parts = tl.load(
        parts_ptr + row[:, None] * D + cols[None, :],
        mask=(split < SPLITS)[:, None] & (cols < D)[None, :], other=0.0, cache_modifier=".cg",
    )  # fmt: skip
    out = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_ptr + at * D + cols, out.to(out_ptr.dtype.element_ty), mask=cols < D)
