"""The products of groups through pointers: any dtype, any strides, any sizes, every GPU.

Two kernels, of which each is the other's gradient:

    rows    out[r] = a[r] · b[g]            for each row r of group g
    sums    out[g] = Σ a[r]ᵀ · b[r]         over the rows r of group g

Where a group ends inside of a tile, the tile ends as well; no group is padded. Programs of `rows`
ask a table which rows are theirs (`blocks`).
"""

from tilewright_kernels._triton import tl, triton
from tilewright_kernels.grouped_mm.blocks import block_of
from tilewright_kernels.matmul.tiles import add_product, tile_in_groups


@triton.jit
def dot_rows(
    a_ptr, b_ptr, rows, valid, cols, N, K, a_m_stride, a_k_stride, b_k_stride, b_n_stride,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Rows `rows` of A, in any order, times columns `cols` of B; rows not `valid` are zeros."""
    ks = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows[:, None].to(tl.int64) * a_m_stride + ks[None, :].to(tl.int64) * a_k_stride
    b_ptrs = b_ptr + ks[:, None].to(tl.int64) * b_k_stride + cols[None, :].to(tl.int64) * b_n_stride
    acc = tl.zeros((rows.shape[0], cols.shape[0]), dtype=ACC)
    for k in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=NUM_STAGES):
        inside = ks < K - k * BLOCK_K
        a = tl.load(a_ptrs, mask=valid[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=inside[:, None] & (cols < N)[None, :], other=0.0)
        acc = add_product(acc, a, b, PRECISION)
        a_ptrs += tl.cast(BLOCK_K, tl.int64) * a_k_stride
        b_ptrs += tl.cast(BLOCK_K, tl.int64) * b_k_stride
    return acc


@triton.jit
def rows_of_program(
    blocks_ptr, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
):
    """(group, rows, whether each is the group's, columns) of this program's tile.

    A program without a tile has no valid row.
    """
    num_blocks = tl.load(blocks_ptr)
    tile = tl.program_id(0)
    inside = tile < num_blocks * tl.cdiv(N, BLOCK_N)
    m, n = tile_in_groups(
        tl.where(inside, tile, 0), tl.maximum(num_blocks, 1) * BLOCK_M, N,
        BLOCK_M, BLOCK_N, GROUP_M,
    )  # fmt: skip
    group, row, end = block_of(blocks_ptr, tl.where(inside, m, num_blocks), num_blocks)
    rows = row + tl.arange(0, BLOCK_M)
    return group, rows, rows < end, n * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def store_rows(out_ptr, values, rows, valid, cols, N, m_stride, n_stride):
    """Write a tile: the rows that are valid, the columns before N."""
    offsets = rows[:, None].to(tl.int64) * m_stride + cols[None, :].to(tl.int64) * n_stride
    mask = valid[:, None] & (cols < N)[None, :]
    tl.store(out_ptr + offsets, values.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def grouped_rows_kernel(
    a_ptr, b_ptr, out_ptr, blocks_ptr, N, K,
    a_m_stride, a_k_stride, b_group_stride, b_k_stride, b_n_stride, out_m_stride, out_n_stride,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """out[r] = a[r] · b[g], one tile a program; rows past the last group's end are left alone."""
    group, rows, valid, cols = rows_of_program(blocks_ptr, N, BLOCK_M, BLOCK_N, GROUP_M)
    if tl.max(valid.to(tl.int32), axis=0) == 0:
        return
    acc = dot_rows(
        a_ptr, b_ptr + group.to(tl.int64) * b_group_stride, rows, valid, cols, N, K,
        a_m_stride, a_k_stride, b_k_stride, b_n_stride, ACC, PRECISION, BLOCK_K, NUM_STAGES,
    )  # fmt: skip
    store_rows(out_ptr, acc, rows, valid, cols, N, out_m_stride, out_n_stride)


@triton.jit
def grouped_sums_kernel(
    a_ptr, b_ptr, out_ptr, offs_ptr, M, N,
    a_r_stride, a_m_stride, b_r_stride, b_n_stride, out_group_stride, out_m_stride, out_n_stride,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """out[g] = Σ a[r]ᵀ · b[r] over the group's rows; zeros for a group without any."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // tiles
    m, n = tile_in_groups(tl.program_id(0) % tiles, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    start = tl.load(offs_ptr + group - 1, mask=group > 0, other=0)
    num_rows = tl.load(offs_ptr + group) - start
    ms, cols = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    start = start.to(tl.int64)
    acc = dot_rows(
        a_ptr + start * a_r_stride, b_ptr + start * b_r_stride, ms, ms < M, cols, N, num_rows,
        a_m_stride, a_r_stride, b_r_stride, b_n_stride, ACC, PRECISION, BLOCK_K, NUM_STAGES,
    )  # fmt: skip
    out_ptr += group.to(tl.int64) * out_group_stride
    store_rows(out_ptr, acc, ms, ms < M, cols, N, out_m_stride, out_n_stride)


@triton.jit
def clear_rows_kernel(
    out_ptr, offs_ptr, groups, rows, N, out_m_stride, out_n_stride,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Zeros in the rows that are no group's: from offs[-1] on."""
    first = tl.load(offs_ptr + groups - 1)
    for row in range(first + tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        rs = row + tl.arange(0, ROWS)
        for col in range(0, N, BLOCK_N):
            cols = col + tl.arange(0, BLOCK_N)
            zeros = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
            store_rows(out_ptr, zeros, rs, rs < rows, cols, N, out_m_stride, out_n_stride)
