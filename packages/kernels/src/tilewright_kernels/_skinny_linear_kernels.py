"""Kernels of `skinny_linear`: one row by sums in registers, up to 64 rows by tensor cores."""

from tilewright_kernels._math import silu
from tilewright_kernels._overlap import await_previous_launch
from tilewright_kernels._triton import tl, triton


@triton.jit
def weight_rows(n, N, weight_ptr, row_stride, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the rows of a tile of W begin: BLOCK_N of them, and if gated as many of up below."""
    if GATED:
        r = tl.arange(0, 2 * BLOCK_N)
        up = (r // BLOCK_N).to(tl.int64) * N
        rows = weight_ptr + (tl.program_id(0) * BLOCK_N + r % BLOCK_N + up) * row_stride
    else:
        rows = weight_ptr + n.to(tl.int64) * row_stride
    return rows


@triton.jit
def skinny_linear_row_kernel(
    x_ptr, weight_ptr, norm_weight_ptr, residual_ptr, out_ptr, weight_row_stride, N,
    EPS: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr,
    OVERLAP: tl.constexpr, PREFETCH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[n] = x̂ · W[n] (+ residual[n]), or silu(x̂ · W[n]) · (x̂ · W[N + n]); grid (N / BLOCK_N).

    x̂ = x · r · norm_weight, and r, one number, is applied to the sums: nobody waits for it. All
    weights of a step are in flight at once; the next step's are asked for before they are used.
    """
    HEIGHT: tl.constexpr = BLOCK_N * (2 if GATED else 1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (tl.program_id(0) * BLOCK_N + tl.arange(0, HEIGHT) % BLOCK_N < N)[:, None]
    cols = tl.arange(0, BLOCK_K)
    rows = weight_rows(n, N, weight_ptr, weight_row_stride, GATED, BLOCK_N)[:, None] + cols[None, :]
    if not PREFETCH:
        await_previous_launch(OVERLAP)
    w = tl.load(
        rows, mask=there & (cols < K)[None, :], other=0.0, eviction_policy="evict_first"
    )  # fmt: skip
    if PREFETCH:
        await_previous_launch(OVERLAP)

    acc = tl.zeros((HEIGHT,), dtype=ACC)
    squares = tl.zeros((BLOCK_K,), dtype=ACC)
    for k in tl.static_range(0, K, BLOCK_K):
        here = k + cols < K
        x = tl.load(x_ptr + k + cols, mask=here, other=0.0).to(ACC)
        if norm_weight_ptr is not None:
            squares += x * x
            x *= tl.load(norm_weight_ptr + k + cols, mask=here, other=0.0).to(ACC)
        now = w
        if k + BLOCK_K < K:
            w = tl.load(
                rows + k + BLOCK_K, mask=there & (k + BLOCK_K + cols < K)[None, :], other=0.0,
                eviction_policy="evict_first",
            )  # fmt: skip
        acc += tl.sum(now.to(ACC) * x[None, :], 1)
    if norm_weight_ptr is not None:
        acc *= tl.rsqrt(tl.sum(squares, 0) / K + EPS)
    if GATED:
        gate, up = tl.split(acc.reshape(2, BLOCK_N).permute(1, 0))
        out = silu(gate) * up
    else:
        out = acc
    if residual_ptr is not None:
        out += tl.load(residual_ptr + n, mask=n < N, other=0.0).to(ACC)
    tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def skinny_linear_rows_kernel(
    x_ptr, weight_ptr, norm_weight_ptr, residual_ptr, out_ptr, parts_ptr, arrived_ptr,
    x_row_stride, weight_row_stride, residual_row_stride, M, N,
    EPS: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr,
    OVERLAP: tl.constexpr, PREFETCH: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As the kernel for one row, [BLOCK_M, BLOCK_N] by tensor cores; grid (N / BLOCK_N, SPLITS).

    Weights are the left operand: their rows fill the tensor cores' 16 or 64, x's few columns of 8.
    K is shared by SPLITS programs. Each leaves its sums in parts [SPLITS, N, M] (and the squares'),
    and whoever arrives last adds them up in order, so the bits do not depend on who that was.
    """
    HEIGHT: tl.constexpr = BLOCK_N * (2 if GATED else 1)
    STEPS: tl.constexpr = (K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (tl.program_id(0) * BLOCK_N + tl.arange(0, HEIGHT) % BLOCK_N < N)[:, None]
    m = tl.arange(0, BLOCK_M)
    k = split * STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = weight_rows(n, N, weight_ptr, weight_row_stride, GATED, BLOCK_N)[:, None]
    if not PREFETCH:
        await_previous_launch(OVERLAP)
    w = tl.load(
        rows + k[None, :], mask=there & (k < K)[None, :], other=0.0, eviction_policy="evict_first"
    )  # fmt: skip
    if PREFETCH:
        await_previous_launch(OVERLAP)

    acc = tl.zeros((HEIGHT, BLOCK_M), dtype=ACC)
    square = tl.zeros((BLOCK_M,), dtype=ACC)
    for _ in tl.range(STEPS):
        here = (k < K)[None, :]
        x_at = x_ptr + m[:, None] * x_row_stride + k[None, :]
        x = tl.load(x_at, mask=(m < M)[:, None] & here, other=0.0)
        if norm_weight_ptr is not None:
            wide = x.to(ACC)
            square += tl.sum(wide * wide, 1)
            scale = tl.load(norm_weight_ptr + k[None, :], mask=here, other=0.0).to(ACC)
            x = (wide * scale).to(x.dtype)
        now = w
        k += BLOCK_K
        if STEPS > 1:
            # After the last step nobody uses it.
            w = tl.load(
                rows + k[None, :], mask=there & (k < K)[None, :], other=0.0,
                eviction_policy="evict_first",
            )  # fmt: skip
        acc = tl.dot(now, x.T, acc, input_precision="ieee", out_dtype=ACC)
    if SPLITS == 1:
        _finish_rows(
            acc, square, norm_weight_ptr, residual_ptr, out_ptr, residual_row_stride,
            n, m, M, N, EPS, K, GATED, ACC, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        # The sums of a split are a tile for each block of columns, and its squares.
        block, blocks = tl.program_id(0), tl.num_programs(0)
        SIZE: tl.constexpr = (HEIGHT + 1) * BLOCK_M
        tile = tl.arange(0, HEIGHT)[:, None] * BLOCK_M + m[None, :]
        mine = parts_ptr + (split * blocks + block) * SIZE
        tl.store(mine + tile, acc)
        tl.store(mine + HEIGHT * BLOCK_M + m, square)
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + block, 1, sem="acq_rel") == SPLITS - 1:
            acc = tl.zeros((HEIGHT, BLOCK_M), dtype=ACC)
            square = tl.zeros((BLOCK_M,), dtype=ACC)
            for other in tl.static_range(SPLITS):
                theirs = parts_ptr + (other * blocks + block) * SIZE
                acc += tl.load(theirs + tile, cache_modifier=".cg")
                square += tl.load(theirs + HEIGHT * BLOCK_M + m, cache_modifier=".cg")
            tl.store(arrived_ptr + block, 0)
            _finish_rows(
                acc, square, norm_weight_ptr, residual_ptr, out_ptr, residual_row_stride,
                n, m, M, N, EPS, K, GATED, ACC, BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit
def _finish_rows(
    acc, square, norm_weight_ptr, residual_ptr, out_ptr, residual_row_stride, n, m, M, N,
    EPS: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From sums over all of K to out."""
    if norm_weight_ptr is not None:
        acc *= tl.rsqrt(square / K + EPS)[None, :]
    if GATED:
        gate, up = tl.split(acc.reshape(2, BLOCK_N, BLOCK_M).permute(1, 2, 0))
        out = silu(gate) * up
    else:
        out = acc
    mask = (n < N)[:, None] & (m < M)[None, :]
    if residual_ptr is not None:
        at = residual_ptr + m[None, :] * residual_row_stride + n[:, None]
        out += tl.load(at, mask=mask, other=0.0).to(ACC)
    tl.store(out_ptr + m[None, :] * N + n[:, None], out.to(out_ptr.dtype.element_ty), mask=mask)
