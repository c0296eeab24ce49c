"""Kernels of softmax and log_softmax, over any dimension, with or without a causal mask.

    y = eᶻ / Σ eᶻ        log y = z - log Σ eᶻ        z = x - max(x)

With the gradient dy it is, for y and for its logarithm,

    dx = y · (dy - Σ y · dy)          dx = dy - eʸ · Σ dy

Forward reads x and writes y; backward reads dy and y and writes dx. A tensor is seen as
[outer, lanes, N] with three strides, N being the dimension that is summed over: along the last
dimension lanes are rows, elsewhere they are columns that lie side by side, and either is read where
it is. A tile of whole lanes waits in registers from its maximum to its result. Wider lanes are
walked twice, the second time backwards, from what the first walk has just left in the caches.

A lane in registers has its maximum and then its sum. Where that leaves the memory idle, and in wide
lanes, both are taken at once, online (Milakov & Gimelshein 2018, arXiv:1805.02867): parts of a lane
have a maximum and a sum of their own, which are joined.
"""

from tilewright_kernels._math import exp
from tilewright_kernels._registers import convert_again
from tilewright_kernels._triton import tl, triton

LOWEST_FLOAT32 = tl.constexpr(-3.4028234663852886e38)
"""The lowest finite float32."""


@triton.jit
def softmax_fwd_kernel(
    x_ptr, y_ptr,
    x_outer_stride, x_lane_stride, x_col_stride, y_outer_stride, y_lane_stride, y_col_stride,
    num_lanes, n_cols, num_queries,
    LOG: tl.constexpr, CAUSAL: tl.constexpr, ACC: tl.constexpr,
    LANES: tl.constexpr, BLOCK_N: tl.constexpr,
    FLAT: tl.constexpr, FULL: tl.constexpr, PAIRS: tl.constexpr,
    AGAIN: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """y for a tile of LANES whole lanes; x once in, y once out."""
    outer, lanes = _lanes_of_program(num_lanes, LANES, FLAT)
    lanes, cols = lanes[:, None], tl.arange(0, BLOCK_N)[None, :]
    inside, seen = _masks(outer, lanes, cols, num_lanes, n_cols, num_queries, CAUSAL)
    x_at = _at(x_ptr, outer, lanes, cols, x_outer_stride, x_lane_stride, x_col_stride)
    x = tl.load(x_at, mask=seen | FULL, other=-float("inf"))
    if PAIRS:
        peak, total = tl.reduce((x.to(ACC), tl.full(x.shape, 1.0, dtype=ACC)), 1, _pair)
        peak, total = peak[:, None], total[:, None]
    else:
        peak = tl.max(x.to(ACC), axis=1)[:, None]
        total = tl.sum(tl.exp(x.to(ACC) - peak), axis=1)[:, None]
    row = convert_again(x, ACC) if AGAIN else x.to(ACC)
    if ALIKE:  # in as few registers
        y_outer_stride, y_lane_stride, y_col_stride = x_outer_stride, x_lane_stride, x_col_stride
    y_at = _at(y_ptr, outer, lanes, cols, y_outer_stride, y_lane_stride, y_col_stride)
    tl.store(y_at, _result(row, peak, total, LOG), mask=inside | FULL)


@triton.jit
def softmax_fwd_wide_kernel(
    x_ptr, y_ptr,
    x_outer_stride, x_lane_stride, x_col_stride, y_outer_stride, y_lane_stride, y_col_stride,
    num_lanes, n_cols, num_queries,
    LOG: tl.constexpr, CAUSAL: tl.constexpr, ACC: tl.constexpr, LOWEST: tl.constexpr,
    LANES: tl.constexpr, BLOCK_N: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The same for lanes wider than a tile: once over x for maximum and sum, once back for y."""
    outer, lanes = _lanes_of_program(num_lanes, LANES, False)
    lanes = lanes[:, None, None]
    peaks = tl.full([LANES, BLOCK_N // VEC], LOWEST, dtype=ACC)
    totals = tl.zeros([LANES, BLOCK_N // VEC], dtype=ACC)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + _grouped(BLOCK_N, VEC)
        _, seen = _masks(outer, lanes, cols, num_lanes, n_cols, num_queries, CAUSAL)
        x_at = _at(x_ptr, outer, lanes, cols, x_outer_stride, x_lane_stride, x_col_stride)
        x = tl.load(x_at, mask=seen, other=-float("inf"), eviction_policy="evict_last")
        peaks, totals = _online(peaks, totals, x.to(ACC))
    peak, total = _joined(peaks, totals)
    last = (n_cols - 1) // BLOCK_N * BLOCK_N
    for back in range(0, n_cols, BLOCK_N):
        cols = last - back + _grouped(BLOCK_N, VEC)
        inside, seen = _masks(outer, lanes, cols, num_lanes, n_cols, num_queries, CAUSAL)
        x_at = _at(x_ptr, outer, lanes, cols, x_outer_stride, x_lane_stride, x_col_stride)
        x = tl.load(x_at, mask=seen, other=-float("inf"), eviction_policy="evict_first")
        y_at = _at(y_ptr, outer, lanes, cols, y_outer_stride, y_lane_stride, y_col_stride)
        y = _result(x.to(ACC), peak, total, LOG)
        tl.store(y_at, y, mask=inside, eviction_policy="evict_first")


@triton.jit
def softmax_bwd_kernel(
    dy_ptr, y_ptr, dx_ptr,
    dy_outer_stride, dy_lane_stride, dy_col_stride, y_outer_stride, y_lane_stride, y_col_stride,
    num_lanes, n_cols, num_queries,
    LOG: tl.constexpr, CAUSAL: tl.constexpr, ACC: tl.constexpr,
    LANES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx for a tile of LANES whole lanes; dy and y once in, dx, which lies as y does, once out."""
    outer, lanes = _lanes_of_program(num_lanes, LANES, False)
    lanes, cols = lanes[:, None], tl.arange(0, BLOCK_N)[None, :]
    inside, seen = _masks(outer, lanes, cols, num_lanes, n_cols, num_queries, CAUSAL)
    dy_at = _at(dy_ptr, outer, lanes, cols, dy_outer_stride, dy_lane_stride, dy_col_stride)
    y_at = _at(y_ptr, outer, lanes, cols, y_outer_stride, y_lane_stride, y_col_stride)
    dy = tl.load(dy_at, mask=seen, other=0.0)
    y = tl.load(y_at, mask=seen, other=-float("inf") if LOG else 0.0)
    terms = dy.to(ACC) if LOG else y.to(ACC) * dy.to(ACC)
    total = tl.sum(terms, axis=1)[:, None]
    dx = _gradient(convert_again(dy, ACC), convert_again(y, ACC), total, LOG)
    dx_at = _at(dx_ptr, outer, lanes, cols, y_outer_stride, y_lane_stride, y_col_stride)
    tl.store(dx_at, dx, mask=inside)


@triton.jit
def softmax_bwd_wide_kernel(
    dy_ptr, y_ptr, dx_ptr,
    dy_outer_stride, dy_lane_stride, dy_col_stride, y_outer_stride, y_lane_stride, y_col_stride,
    num_lanes, n_cols, num_queries,
    LOG: tl.constexpr, CAUSAL: tl.constexpr, ACC: tl.constexpr,
    LANES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same for lanes wider than a tile: once over dy and y for the sum, once back for dx."""
    outer, lanes = _lanes_of_program(num_lanes, LANES, False)
    lanes = lanes[:, None]
    totals = tl.zeros([LANES, BLOCK_N], dtype=ACC)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)[None, :]
        _, seen = _masks(outer, lanes, cols, num_lanes, n_cols, num_queries, CAUSAL)
        dy_at = _at(dy_ptr, outer, lanes, cols, dy_outer_stride, dy_lane_stride, dy_col_stride)
        dy = tl.load(dy_at, mask=seen, other=0.0, eviction_policy="evict_last")
        if LOG:
            totals += dy.to(ACC)
        else:
            y_at = _at(y_ptr, outer, lanes, cols, y_outer_stride, y_lane_stride, y_col_stride)
            y = tl.load(y_at, mask=seen, other=0.0, eviction_policy="evict_last")
            totals += y.to(ACC) * dy.to(ACC)
    total = tl.sum(totals, axis=1)[:, None]
    last = (n_cols - 1) // BLOCK_N * BLOCK_N
    for back in range(0, n_cols, BLOCK_N):
        cols = last - back + tl.arange(0, BLOCK_N)[None, :]
        inside, seen = _masks(outer, lanes, cols, num_lanes, n_cols, num_queries, CAUSAL)
        dy_at = _at(dy_ptr, outer, lanes, cols, dy_outer_stride, dy_lane_stride, dy_col_stride)
        dy = tl.load(dy_at, mask=seen, other=0.0, eviction_policy="evict_first")
        y_at = _at(y_ptr, outer, lanes, cols, y_outer_stride, y_lane_stride, y_col_stride)
        unseen = -float("inf") if LOG else 0.0
        y = tl.load(y_at, mask=seen, other=unseen, eviction_policy="evict_first")
        dx = _gradient(dy.to(ACC), y.to(ACC), total, LOG)
        dx_at = _at(dx_ptr, outer, lanes, cols, y_outer_stride, y_lane_stride, y_col_stride)
        tl.store(dx_at, dx, mask=inside, eviction_policy="evict_first")


@triton.jit
def _lanes_of_program(num_lanes, LANES: tl.constexpr, FLAT: tl.constexpr):
    """Outer index and lanes [LANES] of this program; FLAT spares a division if outer is 0 alone."""
    tile, lanes = tl.program_id(0), tl.arange(0, LANES)
    if FLAT:
        return 0, tile * LANES + lanes
    lane_tiles = tl.cdiv(num_lanes, LANES)
    return tile // lane_tiles, tile % lane_tiles * LANES + lanes


@triton.jit
def _grouped(BLOCK_N: tl.constexpr, VEC: tl.constexpr):
    """Columns [1, BLOCK_N / VEC, VEC]; one thread holds those of the last dimension."""
    groups = tl.arange(0, BLOCK_N // VEC) * VEC
    return groups[None, :, None] + tl.arange(0, VEC)[None, None, :]


@triton.jit
def _at(ptr, outer, lanes, cols, outer_stride, lane_stride, col_stride):
    """Pointers to a tile, of the rank that lanes and cols have; offsets are int64.

    Each lane's pointer first: an int64 offset for every element would take its registers.
    """
    lane_ptr = ptr + tl.cast(outer, tl.int64) * outer_stride + lanes.to(tl.int64) * lane_stride
    return lane_ptr + cols.to(tl.int64) * col_stride


@triton.jit
def _masks(outer, lanes, cols, num_lanes, n_cols, num_queries, CAUSAL: tl.constexpr):
    """What of a tile lies in the tensor, and what of that takes part: key <= query if CAUSAL."""
    inside = cols < n_cols
    if lanes.shape[0] > 1:  # a program has one lane, or its last ones may not exist
        inside = (lanes < num_lanes) & inside
    if not CAUSAL:
        return inside, inside
    query = (tl.cast(outer, tl.int64) * num_lanes + lanes) % num_queries
    return inside, inside & (cols <= query)


@triton.jit
def _online(peaks, totals, x):
    """Maxima and sums of eˣ⁻ᵐᵃˣ of each group after a block; those before it are given.

    Maxima start at the lowest finite number: -inf - lowest is -inf, where -inf - -inf is NaN.
    """
    former = peaks
    peaks = tl.maximum(former, tl.max(x, axis=2))
    totals = totals * exp(former - peaks) + tl.sum(exp(x - peaks[:, :, None]), axis=2)
    return peaks, totals


@triton.jit
def _pair(peak, total, other_peak, other_total):
    """Maximum and sum of two parts of a lane, in one reduction where two maxima and sums take two.

    The maximum is never below the lowest finite number: see `_online`.
    """
    highest = tl.maximum(tl.maximum(peak, other_peak), LOWEST_FLOAT32)
    return highest, total * exp(peak - highest) + other_total * exp(other_peak - highest)


@triton.jit
def _joined(peaks, totals):
    """Maximum and sum [LANES, 1, 1] of whole lanes. A lane of nothing but -inf has the sum 0."""
    peak = tl.max(peaks, axis=1)
    total = tl.sum(totals * exp(peaks - peak[:, None]), axis=1)
    return peak[:, None, None], total[:, None, None]


@triton.jit
def _result(x, peak, total, LOG: tl.constexpr):
    """y or log y; NaN where the sum is 0, by 0 · inf or -inf - -inf.

    tl.exp, not `exp`: with that one ptxas takes 128 registers for a row of 32768, which has 64.
    """
    z = x - peak
    return z - tl.log(total) if LOG else tl.exp(z) * (1.0 / total)


@triton.jit
def _gradient(dy, y, total, LOG: tl.constexpr):
    """dx, given the lane's Σ dy or Σ y · dy."""
    return dy - exp(y) * total if LOG else y * (dy - total)
