"""Kernels of `skinny_linear`: one row by sums in registers, up to 64 rows by tensor cores.

Programmatic dependent launch (OVERLAP): a kernel may begin while the one before it still runs, and
`gdc_wait` holds it until that one has ended. What lies before the wait, here the first weights, is
fetched during the other's tail. Each kernel lets the next one begin only after its own wait, so
that whatever is two launches back has ended before a kernel begins.
"""

from tilewright_kernels._math import silu
from tilewright_kernels._triton import HAS_TRITON, tl, triton

if HAS_TRITON:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def await_previous_launch(OVERLAP: tl.constexpr):
    """Wait until the launch before this one has ended, and let the next one begin."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


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
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_K)
    there = (n < N)[:, None]
    rows = weight_ptr + n.to(tl.int64)[:, None] * weight_row_stride + cols[None, :]
    up_rows = rows + N.to(tl.int64) * weight_row_stride if GATED else rows
    if not PREFETCH:
        await_previous_launch(OVERLAP)
    mask = there & (cols < K)[None, :]
    w = tl.load(rows, mask=mask, other=0.0, eviction_policy="evict_first")
    up = tl.load(up_rows, mask=mask, other=0.0, eviction_policy="evict_first") if GATED else w
    if PREFETCH:
        await_previous_launch(OVERLAP)

    acc = tl.zeros((BLOCK_N,), dtype=ACC)
    up_acc = tl.zeros((BLOCK_N,), dtype=ACC)
    squares = tl.zeros((BLOCK_K,), dtype=ACC)
    for k in tl.static_range(0, K, BLOCK_K):
        here = k + cols < K
        x = tl.load(x_ptr + k + cols, mask=here, other=0.0).to(ACC)
        if norm_weight_ptr is not None:
            squares += x * x
            x *= tl.load(norm_weight_ptr + k + cols, mask=here, other=0.0).to(ACC)
        now, up_now = w, up
        if k + BLOCK_K < K:
            mask = there & (k + BLOCK_K + cols < K)[None, :]
            w = tl.load(
                rows + k + BLOCK_K, mask=mask, other=0.0, eviction_policy="evict_first"
            )  # fmt: skip
            if GATED:
                up = tl.load(
                    up_rows + k + BLOCK_K, mask=mask, other=0.0, eviction_policy="evict_first"
                )  # fmt: skip
        acc += tl.sum(now.to(ACC) * x[None, :], 1)
        if GATED:
            up_acc += tl.sum(up_now.to(ACC) * x[None, :], 1)
    if norm_weight_ptr is not None:
        r = tl.rsqrt(tl.sum(squares, 0) / K + EPS)
        acc *= r
        up_acc *= r
    if GATED:
        acc = silu(acc) * up_acc
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + n, mask=n < N, other=0.0).to(ACC)
    tl.store(out_ptr + n, acc.to(out_ptr.dtype.element_ty), mask=n < N)


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
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_K)
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    begin = split * STEPS // SPLITS * BLOCK_K
    end = (split + 1) * STEPS // SPLITS * BLOCK_K
    rows = weight_ptr + n.to(tl.int64)[:, None] * weight_row_stride + cols[None, :]
    up_rows = rows + N.to(tl.int64) * weight_row_stride if GATED else rows
    x_rows = x_ptr + m[:, None] * x_row_stride + cols[None, :]
    if PREFETCH:
        LINE: tl.constexpr = min(BLOCK_K, 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth)
        first = tl.minimum(n, N - 1).to(tl.int64)[:, None] * weight_row_stride
        for k in tl.range(begin, end, BLOCK_K):
            col = tl.minimum(k + tl.arange(0, BLOCK_K // LINE) * LINE, K - 1)
            lines = weight_ptr + first + col[None, :]
            fetch_to_l2(lines)
            if GATED:
                fetch_to_l2(lines + N.to(tl.int64) * weight_row_stride)
    await_previous_launch(OVERLAP)

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC)
    up_acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC)
    squares = tl.zeros((BLOCK_M, BLOCK_K), dtype=ACC)
    for k in tl.range(begin, end, BLOCK_K):
        here = k + cols < K
        mask = (n < N)[:, None] & here[None, :]
        x = tl.load(x_rows + k, mask=(m < M)[:, None] & here[None, :], other=0.0)
        w = tl.load(rows + k, mask=mask, other=0.0, eviction_policy="evict_first")
        if norm_weight_ptr is not None:
            wide = x.to(ACC)
            squares += wide * wide
            scale = tl.load(norm_weight_ptr + k + cols, mask=here, other=0.0).to(ACC)
            x = (wide * scale[None, :]).to(x.dtype)
        acc = tl.dot(w, x.T, acc, input_precision="ieee", out_dtype=ACC)
        if GATED:
            up = tl.load(up_rows + k, mask=mask, other=0.0, eviction_policy="evict_first")
            up_acc = tl.dot(up, x.T, up_acc, input_precision="ieee", out_dtype=ACC)
    square = tl.sum(squares, 1)
    if SPLITS == 1:
        _finish_rows(
            acc, up_acc, square, norm_weight_ptr, residual_ptr, out_ptr, residual_row_stride,
            m, n, M, N, EPS, K, GATED, ACC,
        )  # fmt: skip
    else:
        # Sums of a split: one tile or two, then the squares, which every block of columns has too.
        block, blocks = tl.program_id(0), tl.num_programs(0)
        width = blocks * BLOCK_N
        size = (width * (2 if GATED else 1) + blocks) * BLOCK_M
        tile = n[:, None] * BLOCK_M + m[None, :]
        square_at = size - (blocks - block) * BLOCK_M + m
        mine = parts_ptr + split * size
        tl.store(mine + tile, acc)
        if GATED:
            tl.store(mine + width * BLOCK_M + tile, up_acc)
        tl.store(mine + square_at, square)
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + block, 1, sem="acq_rel") == SPLITS - 1:
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC)
            up_acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC)
            square = tl.zeros((BLOCK_M,), dtype=ACC)
            for other in tl.static_range(SPLITS):
                theirs = parts_ptr + other * size
                acc += tl.load(theirs + tile, cache_modifier=".cg")
                if GATED:
                    up_acc += tl.load(theirs + width * BLOCK_M + tile, cache_modifier=".cg")
                square += tl.load(theirs + square_at, cache_modifier=".cg")
            tl.store(arrived_ptr + block, 0)
            _finish_rows(
                acc, up_acc, square, norm_weight_ptr, residual_ptr, out_ptr, residual_row_stride,
                m, n, M, N, EPS, K, GATED, ACC,
            )  # fmt: skip


@triton.jit
def _finish_rows(
    acc, up_acc, square, norm_weight_ptr, residual_ptr, out_ptr, residual_row_stride,
    m, n, M, N, EPS: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """From sums over all of K to out."""
    if norm_weight_ptr is not None:
        r = tl.rsqrt(square / K + EPS)[None, :]
        acc *= r
        up_acc *= r
    if GATED:
        acc = silu(acc) * up_acc
    mask = (n < N)[:, None] & (m < M)[None, :]
    if residual_ptr is not None:
        at = residual_ptr + m[None, :] * residual_row_stride + n[:, None]
        acc += tl.load(at, mask=mask, other=0.0).to(ACC)
    tl.store(out_ptr + m[None, :] * N + n[:, None], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def fetch_to_l2(pointers):
    """Ask for the 128 bytes at each address, without waiting and without a register for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
