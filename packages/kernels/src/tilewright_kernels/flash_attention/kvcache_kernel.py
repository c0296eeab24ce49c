"""The kernel of `flash_attn_with_kvcache`: one new token a sequence, from its projections to out.

    q', k' = turn(norm(q)), turn(norm(k))        cache ← k', v        out = softmax(q' · Kᵀ) · V

Five launches in one: norm and rotation, two writes to the cache, attention of each split, the join
of the splits. The new key is not read back: split 0 starts its softmax with it.
"""

from tilewright_kernels._overlap import await_previous_launch, fetch_to_l2
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
    OVERLAP: tl.constexpr, PREFETCH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All query heads of one key head over one split of its keys; grid (SPLITS · heads · batch).

    parts is [SPLITS, batch, heads, D], part_lse the same without D. The program that arrives last
    joins them, in the order of the splits.
    """
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
    if PREFETCH:
        # The first block. More would push out of L2 what the launches before still read.
        key = tl.minimum(begin + tl.arange(0, BLOCK_N), capacity - 1).to(tl.int64)[:, None]
        LINE: tl.constexpr = min(
            BLOCK_D, 1024 // k_cache_ptr.dtype.element_ty.primitive_bitwidth
        )  # fmt: skip
        line = tl.minimum(tl.arange(0, BLOCK_D // LINE) * LINE, D - 1)[None, :]
        of_batch = tl.cast(batch, tl.int64)
        head_at = of_batch * k_cache_batch_stride + kv_head * k_cache_head_stride
        fetch_to_l2(k_cache_ptr + head_at + key * k_cache_row_stride + line)
        head_at = of_batch * v_cache_batch_stride + kv_head * v_cache_head_stride
        fetch_to_l2(v_cache_ptr + head_at + key * v_cache_row_stride + line)
        await_previous_launch(OVERLAP)

    row = tl.arange(0, ROWS)
    head = kv_head * GROUP + row
    there = (row < GROUP)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    inside = cols < D
    wide = tl.cast(batch, tl.int64)
    q = _turned(
        q_ptr + wide * q_batch_stride + head[:, None] * q_head_stride, there, length, q_norm_ptr,
        cos_ptr, sin_ptr, cos_row_stride, sin_row_stride, table_rows, EPS, D, ROTARY, BLOCK_D, ACC,
    )  # fmt: skip
    one = tl.zeros((1, 1), dtype=tl.int32)
    k = _turned(
        k_ptr + wide * k_batch_stride + (kv_head + one) * k_head_stride, one == 0, length,
        k_norm_ptr, cos_ptr, sin_ptr, cos_row_stride, sin_row_stride, table_rows, EPS,
        D, ROTARY, BLOCK_D, ACC,
    )  # fmt: skip
    v = tl.load(v_ptr + wide * v_batch_stride + kv_head * v_head_stride + cols, mask=inside)
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
def _turned(
    rows, there, position, norm_ptr, cos_ptr, sin_ptr, cos_row_stride, sin_row_stride, table_rows,
    EPS: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Heads at `rows` [R, 1], normalized and rotated: [R, BLOCK_D], zeros past D.

    Rounded after the norm and after the rotation, where operators of their own would round.
    """
    cols = tl.arange(0, BLOCK_D)[None, :]
    raw = tl.load(rows + cols, mask=there & (cols < D), other=0.0)
    x = raw.to(ACC)
    r = x
    if norm_ptr is not None:
        r = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)[:, None]
        weight = tl.load(norm_ptr + cols, mask=cols < D, other=0.0).to(ACC)
        x = (x * r * weight).to(raw.dtype).to(ACC)
    if ROTARY > 0:
        HALF: tl.constexpr = ROTARY // 2
        turning = cols < ROTARY
        partner = tl.where(cols < HALF, cols + HALF, cols - HALF)
        y = tl.load(rows + partner, mask=there & turning, other=0.0).to(ACC)
        if norm_ptr is not None:
            weight = tl.load(norm_ptr + partner, mask=turning, other=0.0).to(ACC)
            y = (y * r * weight).to(raw.dtype).to(ACC)
        # A position outside the tables cannot raise here: it gives NaN, as in apply_rotary_emb.
        known = turning & (position < table_rows)
        at = position.to(tl.int64)
        cos = tl.load(cos_ptr + at * cos_row_stride + cols % HALF, mask=known, other=float("nan"))
        sin = tl.load(sin_ptr + at * sin_row_stride + cols % HALF, mask=known, other=float("nan"))
        cos = tl.where(turning, cos.to(ACC), 1.0)
        sin = tl.where(turning, tl.where(cols < HALF, -sin.to(ACC), sin.to(ACC)), 0.0)
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
