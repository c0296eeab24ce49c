"""Kernels of rms_norm, add_rms_norm and layer_norm: one formula, from which each leaves terms out.

    h = x + residual                        add_rms_norm alone; otherwise h = x
    ĥ = (h - mean(h)) · r                   layer_norm alone; otherwise ĥ = h · r
    r = 1 / sqrt(mean((h - mean(h))²) + eps)
    y = ĥ · (w + offset) + b

Means run over a row. With g = dy · (w + offset) and dh for what reaches h from elsewhere

    dx = dh + r · (g - mean(g) - ĥ · mean(g · ĥ))
    dw = Σ_rows dy · ĥ          db = Σ_rows dy

A pointer that is None leaves its term out of the compiled kernel. Rows that fit in registers are
read once; wider ones twice, in blocks.
"""

from tilewright_kernels._registers import convert_again
from tilewright_kernels._triton import tl, triton

LARGE_TILE = tl.constexpr(8192)
"""Elements of a row in registers from which on every register counts."""


@triton.jit
def _load_vector(pointer, cols, mask):
    """A weight as it lies in memory, [1, N]; without one the number 1, as [1, 1]."""
    if pointer is None:
        vector = tl.full([1, 1], 1.0, dtype=tl.float32)
    else:
        vector = tl.load(pointer + cols, mask=mask, other=0.0)[None, :]
    return vector


@triton.jit
def _scale(weight, OFFSET: tl.constexpr):
    """w + offset; not even + 0.0, which the compiler must keep, where it is 0."""
    return weight if OFFSET == 0.0 else weight + OFFSET


@triton.jit
def _masks(rows, num_rows, cols, n_cols, ROWS: tl.constexpr, FULL: tl.constexpr):
    """Of rows, of columns, of the tile. Where they surely hold, nothing of them is compiled."""
    row_mask, col_mask = (rows < num_rows) | (ROWS == 1), (cols < n_cols) | FULL
    return row_mask, col_mask, row_mask[:, None] & col_mask[None, :]


@triton.jit
def norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    x_row_stride, residual_row_stride, num_rows, n_cols,
    EPS: tl.constexpr, OFFSET: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """y (and h) of a tile of ROWS whole rows: each input once in, each output once out."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    row_mask, col_mask, mask = _masks(rows, num_rows, cols, n_cols, ROWS, FULL)
    out = rows[:, None] * n_cols + cols[None, :]
    h = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0)
    if residual_ptr is not None:
        residual_at = residual_ptr + rows[:, None] * residual_row_stride + cols[None, :]
        residual = tl.load(residual_at, mask=mask, other=0.0)
        h = (h.to(ACC) + residual.to(ACC)).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + out, h, mask=mask)
    row = h.to(ACC)
    mean = 0.0
    if mean_ptr is None:
        weight = _load_vector(weight_ptr, cols, col_mask)  # on its way while the row is summed
        rstd = tl.rsqrt(tl.sum(row * row, axis=1) / n_cols + EPS)
        if BLOCK_N >= LARGE_TILE:
            row = convert_again(h, ACC)
    else:
        mean = tl.sum(row, axis=1) / n_cols
        row = tl.where(mask, row - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(row * row, axis=1) / n_cols + EPS)
        weight = _load_vector(weight_ptr, cols, col_mask)  # no sooner: registers are short
        if BLOCK_N >= LARGE_TILE:
            row = convert_again(h, ACC) - mean[:, None]
    y = row * rstd[:, None] * _scale(weight.to(ACC), OFFSET)
    if bias_ptr is not None:
        y += _load_vector(bias_ptr, cols, col_mask).to(ACC)
    tl.store(y_ptr + out, y, mask=mask)
    # Last: to hand a number to the thread that stores it, all wait for each other.
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=row_mask)
    tl.store(rstd_ptr + rows, rstd, mask=row_mask)


@triton.jit
def norm_fwd_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    x_row_stride, residual_row_stride, n_cols,
    EPS: tl.constexpr, OFFSET: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same for one row wider than a tile: once over x for mean and r, once over h for y.

    The first walk keeps the row in L2 for the second. Each lane has a mean and a sum of squares
    about it of its own (Welford 1962), put together after the walk.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_N)
    h_row = x_ptr + row * x_row_stride
    lane_mean = tl.zeros([BLOCK_N], dtype=ACC)
    squares = tl.zeros([BLOCK_N], dtype=ACC)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + lanes
        mask = cols < n_cols
        x = x_ptr + row * x_row_stride + cols
        h = tl.load(x, mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
        if residual_ptr is not None:
            residual = residual_ptr + row * residual_row_stride + cols
            h += tl.load(residual, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
            h = h.to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + row * n_cols + cols, h, mask=mask, eviction_policy="evict_last")
            h = h.to(ACC)
        deviation = tl.where(mask, h - lane_mean, 0.0)
        if mean_ptr is not None:
            lane_mean += deviation / (start // BLOCK_N + 1)
        squares += deviation * tl.where(mask, h - lane_mean, 0.0)
    if residual_ptr is not None:
        h_row = h_ptr + row * n_cols
        tl.debug_barrier()  # h may be read by other threads than wrote it
    mean = 0.0
    if mean_ptr is not None:
        counts = tl.cdiv(n_cols - lanes, BLOCK_N).to(ACC)
        mean = tl.sum(lane_mean * counts, axis=0) / n_cols
        squares += counts * (lane_mean - mean) * (lane_mean - mean)
        tl.store(mean_ptr + row, mean)
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / n_cols + EPS)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + lanes
        mask = cols < n_cols
        h = tl.load(h_row + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        weight = _load_vector(weight_ptr, cols, mask)
        y = ((h - mean) * rstd)[None, :] * _scale(weight.to(ACC), OFFSET)
        if bias_ptr is not None:
            y += _load_vector(bias_ptr, cols, mask).to(ACC)
        y_row = y_ptr + row * n_cols + cols[None, :]
        tl.store(y_row, y, mask=mask[None, :], eviction_policy="evict_first")


@triton.jit
def norm_bwd_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, mean_gh_ptr, mean_g_ptr,
    dx_ptr, partial_ptr,
    dy_row_stride, dh_row_stride, h_row_stride, num_rows, n_cols,
    OFFSET: tl.constexpr, SUMS: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, FULL: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """dx of every num_programs-th tile of rows; this program's share of dw, db stays in registers.

    Persistent: a few programs an SM walk all rows, so that the weight is read once a program, the
    partial sums are few, and the loads of the next tiles are in flight during this one. A tile is
    as wide as the row, except where mean(g · ĥ) and mean(g) are given.
    """
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = (cols < n_cols) | FULL
    weight = _load_vector(weight_ptr, cols, col_mask)
    if BLOCK_N < LARGE_TILE:
        weight = weight.to(ACC)
    dweight = tl.zeros([ROWS, BLOCK_N], dtype=ACC)
    dbias = tl.zeros([ROWS, BLOCK_N], dtype=ACC)
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=NUM_STAGES
    ):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        row_mask, _, mask = _masks(rows, num_rows, cols, n_cols, ROWS, FULL)
        dy = tl.load(dy_ptr + rows[:, None] * dy_row_stride + cols[None, :], mask=mask, other=0.0)
        h = tl.load(h_ptr + rows[:, None] * h_row_stride + cols[None, :], mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)[:, None]
        mean, mean_g = 0.0, 0.0
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + rows, mask=row_mask, other=0.0)[:, None]
        if mean_gh_ptr is not None:
            mean_gh = tl.load(mean_gh_ptr + rows, mask=row_mask, other=0.0)[:, None]
            if mean_g_ptr is not None:
                mean_g = tl.load(mean_g_ptr + rows, mask=row_mask, other=0.0)[:, None]
        else:
            g = dy.to(ACC) * _scale(convert_again(weight, ACC, rstd < 0.0), OFFSET)
            gh = g * (h.to(ACC) - mean)
            if mean_ptr is None:
                mean_gh = tl.sum(gh, axis=1)[:, None] * rstd / n_cols
            else:  # both sums in one walk through the threads
                sum_gh, sum_g = tl.split(tl.sum(tl.join(gh, g), axis=1))
                mean_gh, mean_g = sum_gh[:, None] * rstd / n_cols, sum_g[:, None] / n_cols
        dbias += dy.to(ACC)
        dy_again = convert_again(dy, ACC)
        h_hat = (convert_again(h, ACC) - mean) * rstd
        dweight += dy_again * h_hat
        g = dy_again * _scale(convert_again(weight, ACC, rstd < -1.0), OFFSET)
        dx = (g - h_hat * mean_gh - mean_g) * rstd
        if dh_ptr is not None:
            dh = dh_ptr + rows[:, None] * dh_row_stride + cols[None, :]
            dx += tl.load(dh, mask=mask, other=0.0).to(ACC)
        tl.store(dx_ptr + rows[:, None] * n_cols + cols[None, :], dx, mask=mask)
    if SUMS > 0:
        partial = partial_ptr + tl.program_id(0).to(tl.int64) * SUMS * n_cols + cols
        tl.store(partial, tl.sum(dweight, axis=0), mask=col_mask)
        if SUMS > 1:
            tl.store(partial + n_cols, tl.sum(dbias, axis=0), mask=col_mask)


@triton.jit
def norm_bwd_means_kernel(
    dy_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, mean_gh_ptr, mean_g_ptr,
    dy_row_stride, h_row_stride, n_cols,
    OFFSET: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """mean(g · ĥ) and mean(g) of one row wider than a tile: what dx needs to know of its row."""
    row = tl.program_id(0).to(tl.int64)
    mean = 0.0
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row)
    sum_gh = tl.zeros([1, BLOCK_N], dtype=ACC)
    sum_g = tl.zeros([1, BLOCK_N], dtype=ACC)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = cols < n_cols
        dy = _load_vector(dy_ptr + row * dy_row_stride, cols, mask).to(ACC)
        h = _load_vector(h_ptr + row * h_row_stride, cols, mask).to(ACC)
        g = dy * _scale(_load_vector(weight_ptr, cols, mask).to(ACC), OFFSET)
        sum_gh += g * (h - mean)
        sum_g += g
    rstd = tl.load(rstd_ptr + row)
    one = tl.arange(0, 1)
    tl.store(mean_gh_ptr + row + one, tl.sum(sum_gh, axis=1) * rstd / n_cols)
    if mean_g_ptr is not None:
        tl.store(mean_g_ptr + row + one, tl.sum(sum_g, axis=1) / n_cols)
