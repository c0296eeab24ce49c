"""The kernels of cross_entropy: rows of logits to losses, their reduction, and the gradient.

For a row s of V logits (after the softcap), target y, class weights w and W = Σ_v w_v:

    lse  = log Σ_v exp(s_v)             p_v = exp(s_v - lse)
    loss = w_y · [(1 - ε) · (lse - s_y) + z · lse²] + ε/V · Σ_v w_v · (lse - s_v)
    ds_v = a · (p_v - [v = y]) + b · p_v - c · w_v
           a = g · w_y · (1 - ε)        b = g · (2z · w_y · lse + ε/V · W) + dlse        c = g · ε/V

where g is the gradient that arrives at the row's loss, and dlse the one that arrives at its lse.

Forward walks a row once and keeps a running maximum and sum (Milakov & Gimelshein 2018,
arXiv:1805.02867) of every class but the target. With r = Σ_{v≠y} exp(s_v - s_y) a sure prediction
then has the loss log1p(r) and the gradient -r / (1 + r) at its target, both to full precision where
p_y rounds to 1.

Bytes: forward reads the logits (L bytes) and keeps four numbers a row; backward reads them again
and writes their gradient: 3L. A gradient written in forward already would move 2L, but 4L wherever
the loss is scaled afterwards (accumulation, division by a token count, GradScaler); it would round
twice, lose in float16 what the scaling is to save, and hold L more bytes from forward on. Rows
whose target is ignored are not read at all, unless their lse is asked for.
"""

from tilewright_kernels._math import exp, log1p, logistic
from tilewright_kernels._triton import tl, triton


@triton.jit
def _softcapped(x, SOFTCAP: tl.constexpr):
    """c · tanh(x / c) = c · (2Λ(2x/c) - 1), to about a rounding of c; x where there is no cap."""
    if SOFTCAP is not None:
        distribution, _ = logistic(x * (2.0 / SOFTCAP))
        x = 2.0 * SOFTCAP * distribution - SOFTCAP
    return x


@triton.jit
def _softcapped_grad(x, SOFTCAP: tl.constexpr):
    """1 - tanh²(x / c) = 4λ(2x/c), which does not cancel."""
    _, density = logistic(x * (2.0 / SOFTCAP))
    return 4.0 * density


@triton.jit
def _targets(
    target_ptr, weight_ptr, rows, inside, target_stride, n_cols, ignore_index,
    HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each row's target, -1 for none; whether it is a class; whether it counts; and its weight."""
    given = tl.load(target_ptr + rows * target_stride, mask=inside, other=-1)
    counts = inside & (given != ignore_index)
    known = counts & (given >= 0) & (given < n_cols)
    target = tl.where(known, given, -1).to(tl.int32)
    weight = known.to(ACC)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + target, mask=known, other=0.0).to(ACC)
    return target, known, counts, weight


@triton.jit
def cross_entropy_fwd_kernel(
    x_ptr, target_ptr, weight_ptr, weight_sum_ptr, loss_ptr, lse_ptr, stats_ptr,
    x_row_stride, target_stride, num_rows, n_cols, ignore_index,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_LSE: tl.constexpr, REDUCED: tl.constexpr,
    ACC: tl.constexpr, LOWEST: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Of ROWS rows: the losses, or the sums of losses and of w_y; lse where it is asked for; and
    for backward max s, 1 / Σ exp(s - max s), 1 - p_y and the loss's slope by lse, b / g.

    A tile is [ROWS, LANES, UNROLL, VEC]. A lane is one thread's: its VEC adjacent columns are one
    load of 16 bytes, its UNROLL loads are under way together and share one rescaling.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    target, known, counts, w_target = _targets(
        target_ptr, weight_ptr, rows, inside, target_stride, n_cols, ignore_index, HAS_WEIGHT, ACC
    )
    read = inside if HAS_LSE else known
    row_starts = rows * x_row_stride
    s_target = tl.load(x_ptr + row_starts + target, mask=known, other=0.0).to(ACC)
    s_target = tl.where(known, _softcapped(s_target, SOFTCAP), float("-inf"))

    TILE: tl.constexpr = LANES * UNROLL * VEC
    # A load of VEC elements takes an address that is a multiple of VEC. One row may start anywhere:
    # it is walked from the multiple before it. Several are walked so only where rows and n_cols are
    # such multiples, and dividing shows it to the compiler.
    aligned = row_starts // VEC * VEC
    if ROWS == 1:
        shift = (row_starts - aligned).to(tl.int32)
        end = n_cols
        stop = tl.max(tl.where(read, end + shift, 0), axis=0)
    else:
        shift = tl.zeros([ROWS], dtype=tl.int32)
        end = n_cols // VEC * VEC
        stop = end
    offsets = (
        tl.arange(0, LANES)[:, None, None] * VEC
        + tl.arange(0, UNROLL)[None, :, None] * (LANES * VEC)
        + tl.arange(0, VEC)[None, None, :]
    )[None, :, :, :]
    # Maxima start at the lowest finite number: -inf - LOWEST is -inf, but -inf - -inf is NaN.
    peak = tl.full([ROWS, LANES], LOWEST, dtype=ACC)
    total = tl.zeros([ROWS, LANES], dtype=ACC)
    weighted = tl.zeros([ROWS, LANES], dtype=ACC)
    for start in range(0, stop, TILE):
        cols = start + offsets - shift[:, None, None, None]
        in_row = (cols >= 0) & (cols < end)
        mask = read[:, None, None, None] & in_row
        others = mask & (cols != target[:, None, None, None])
        pointers = x_ptr + aligned[:, None, None, None] + (start + offsets)
        if ROWS == 1:
            first, y = start - tl.max(shift, axis=0), tl.max(target, axis=0)
            plain = (first >= 0) & (first + TILE <= n_cols) & ((y < first) | (y >= first + TILE))
        else:
            plain = False
        if plain:  # all of it in the row, and not the target
            s = _softcapped(tl.load(pointers).to(ACC), SOFTCAP)
            kept = s
        else:
            s = _softcapped(tl.load(pointers, mask=mask, other=0.0).to(ACC), SOFTCAP)
            kept = tl.where(others, s, 0.0)
            s = tl.where(others, s, float("-inf"))
        if SMOOTHING != 0:
            if HAS_WEIGHT:
                kept *= tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(ACC)
            weighted += tl.sum(tl.sum(kept, axis=3), axis=2)
        new_peak = tl.maximum(peak, tl.max(tl.max(s, axis=3), axis=2))
        terms = exp(s - new_peak[:, :, None, None])
        total = total * exp(peak - new_peak) + tl.sum(tl.sum(terms, axis=3), axis=2)
        peak = new_peak

    others_max = tl.max(peak, axis=1)
    s_max = tl.maximum(others_max, s_target)
    others = tl.sum(total * exp(peak - s_max[:, None]), axis=1)
    everything = others + exp(s_target - s_max)
    lse = s_max + tl.log(everything)
    # everything - 1, where the 1 is the largest term: the target's own, or one of the others.
    excess = tl.where(s_target >= others_max, others, everything - 1.0)
    loss = w_target * (1.0 - SMOOTHING) * ((s_max - s_target) + log1p(excess))
    slope = tl.zeros([ROWS], dtype=ACC)
    if Z_LOSS != 0:
        loss += w_target * Z_LOSS * lse * lse
        slope += 2.0 * Z_LOSS * w_target * lse
    if SMOOTHING != 0:
        weight_sum = tl.load(weight_sum_ptr) if HAS_WEIGHT else n_cols
        spread = weight_sum * lse - (tl.sum(weighted, axis=1) + w_target * s_target)
        loss += SMOOTHING * spread / n_cols
        slope += SMOOTHING * weight_sum / n_cols if HAS_WEIGHT else SMOOTHING

    # A target that counts and is no class: its loss and gradient are NaN. An ignored one: both 0.
    missing = tl.where(counts, float("nan"), 0.0)
    loss = tl.where(known, loss, missing)
    inverse = tl.where(tl.where(counts, known, read), 1.0 / everything, missing)
    if REDUCED:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(loss, axis=0))
        tl.store(loss_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(w_target, axis=0))
    else:
        tl.store(loss_ptr + rows, loss, mask=inside)
    if HAS_LSE:
        tl.store(lse_ptr + rows, lse, mask=inside)
    tl.store(stats_ptr + 4 * rows, s_max, mask=inside)
    tl.store(stats_ptr + 4 * rows + 1, inverse, mask=inside)
    tl.store(stats_ptr + 4 * rows + 2, others * inverse, mask=inside)
    tl.store(stats_ptr + 4 * rows + 3, tl.where(known, slope, missing), mask=inside)


@triton.jit
def cross_entropy_reduce_kernel(
    sums_ptr, loss_ptr, scale_ptr, num_sums,
    MEAN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The programs' sums [2, num_sums] of losses and weights, added in a fixed order; one program.

    Two runs give the same bits, which atomics would not. The mean's scale, 1 / Σ w_y, stays on the
    device, for backward.
    """
    losses = tl.zeros([BLOCK], dtype=ACC)
    weights = tl.zeros([BLOCK], dtype=ACC)
    for start in range(0, num_sums, BLOCK):
        i = start + tl.arange(0, BLOCK)
        losses += tl.load(sums_ptr + i, mask=i < num_sums, other=0.0)
        if MEAN:
            weights += tl.load(sums_ptr + num_sums + i, mask=i < num_sums, other=0.0)
    loss = tl.sum(losses, axis=0)
    if MEAN:
        divisor = tl.sum(weights, axis=0)
        tl.store(scale_ptr, 1.0 / divisor)
        loss = loss / divisor
    tl.store(loss_ptr, loss)


@triton.jit
def cross_entropy_bwd_kernel(
    dloss_ptr, dlse_ptr, scale_ptr, x_ptr, target_ptr, weight_ptr, stats_ptr, dx_ptr,
    dloss_stride, dlse_stride, x_row_stride, dx_row_stride, target_stride,
    num_rows, n_cols, ignore_index,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_SLOPE: tl.constexpr, HAS_DLSE: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx of one tile; dx may be x."""
    column_tiles = tl.cdiv(n_cols, BLOCK_N)
    rows = (tl.program_id(0) // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, in_row = rows < num_rows, cols < n_cols
    target, _, counts, w_target = _targets(
        target_ptr, weight_ptr, rows, inside, target_stride, n_cols, ignore_index, HAS_WEIGHT, ACC
    )
    # An ignored row gets g = 0 whatever dloss is: the mean over no target at all is 0/0.
    g = tl.load(dloss_ptr + rows * dloss_stride, mask=counts, other=0.0)
    if MEAN:
        g = tl.where(counts, g * tl.load(scale_ptr), 0.0)
    read = inside if HAS_DLSE else counts
    s_max = tl.load(stats_ptr + 4 * rows, mask=read, other=0.0)
    inverse = tl.load(stats_ptr + 4 * rows + 1, mask=read, other=0.0)
    complement = tl.load(stats_ptr + 4 * rows + 2, mask=read, other=0.0)
    a = g * w_target * (1.0 - SMOOTHING)

    mask = read[:, None] & in_row[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0).to(ACC)
    p = exp(_softcapped(x, SOFTCAP) - s_max[:, None]) * inverse[:, None]
    dx = tl.where(cols[None, :] == target[:, None], -complement[:, None], p) * a[:, None]
    if HAS_SLOPE or HAS_DLSE:
        b = tl.zeros([ROWS], dtype=ACC)
        if HAS_SLOPE:
            b += g * tl.load(stats_ptr + 4 * rows + 3, mask=read, other=0.0)
        if HAS_DLSE:
            b += tl.load(dlse_ptr + rows * dlse_stride, mask=inside, other=0.0)
        dx += p * b[:, None]
    if SMOOTHING != 0:
        c = g * SMOOTHING / n_cols
        if HAS_WEIGHT:
            w = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(ACC)
            dx -= w[None, :] * c[:, None]
        else:
            dx -= c[:, None]
    if SOFTCAP is not None:
        dx *= _softcapped_grad(x, SOFTCAP)
    out = dx_ptr + rows[:, None] * dx_row_stride + cols[None, :]
    tl.store(out, dx, mask=inside[:, None] & in_row[None, :])
