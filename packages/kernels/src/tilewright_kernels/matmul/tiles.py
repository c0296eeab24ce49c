"""The parts that a tiled product is made of, as device functions.

A program owns a tile of the result, BLOCK_M x BLOCK_N numbers in registers. It walks the shared
dimension in steps of BLOCK_K, multiplies a tile of A with a tile of B at each, and at the end does
to the sums what is to be done to them (the epilogue) and writes them once. So there are four parts:

- which tile: `tile_in_rows`, `tile_in_groups`, `batch_offset`
- the walk: `dot_pointers` (any strides), `dot_descriptors` (tensor descriptors)
- the epilogue: `epilogue`
- the write: `store_pointers`, `store_descriptor`

The rungs of the ladder are made of these and differ in nothing else; fused kernels elsewhere take
what they need.
"""

from tilewright_kernels import _triton
from tilewright_kernels._triton import tl, triton

INTERPRETED = tl.constexpr(_triton.INTERPRETED)


@triton.jit
def tile_in_rows(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row and column of a tile, counted along rows of tiles: 0 1 2 … above n, n + 1 …"""
    tiles_n = tl.cdiv(N, BLOCK_N)
    return tile // tiles_n, tile % tiles_n


@triton.jit
def tile_in_groups(
    tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
):  # fmt: skip
    """Row and column of a tile, counted down GROUP_M rows of tiles, then in the next column.

    Tiles that are computed at one time then lie in a block that is about square, and share the rows
    of A and the columns of B that the second-level cache holds.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    rows_in_group = tl.minimum(tiles_m - first_m, GROUP_M)
    within = tile - group * (GROUP_M * tiles_n)
    return first_m + within % rows_in_group, within // rows_in_group


@triton.jit
def batch_offset(batch, inner, outer_stride, inner_stride):
    """Elements before matrix `batch` of a batch [outer, inner] with these strides."""
    batch = batch.to(tl.int64)
    return batch // inner * outer_stride + batch % inner * inner_stride


@triton.jit
def tile_in_batch(
    index, M, N, inner,
    BATCHED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Matrix (outer, inner) and tile (m, n), counted through the matrices one after another."""
    tile = index
    matrix_outer = 0
    matrix_inner = 0
    if BATCHED:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        tile = index % tiles
        matrix_outer = index // tiles // inner
        matrix_inner = index // tiles % inner
    m, n = tile_in_groups(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    return matrix_outer, matrix_inner, m, n


@triton.jit
def add_product(acc, a, b, PRECISION: tl.constexpr):
    """acc + a·b.

    Tensor cores add into acc. Without them a product is a chain of additions for each element,
    whose error grows with its length; summed apart first, a chain is no longer than BLOCK_K.
    """
    if PRECISION == "ieee" and a.dtype.primitive_bitwidth > 16:
        # max_num_imprecise_acc means nothing here, but without it the compiler makes acc the first
        # term of the chain.
        acc += tl.dot(a, b, input_precision=PRECISION, out_dtype=acc.dtype, max_num_imprecise_acc=1)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def dot_pointers(
    a_ptr, b_ptr, m, n, M, N, K, a_m_stride, a_k_stride, b_k_stride, b_n_stride,
    ACC: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Tile (m, n) of A·B, read through pointers: any strides, any sizes.

    Rows and columns past the end wrap round to the first: they are read in vain, and not written.
    Only K needs a mask, and none where it is a multiple of BLOCK_K.
    """
    rows = (m * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    cols = (n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    ks = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows[:, None].to(tl.int64) * a_m_stride + ks[None, :].to(tl.int64) * a_k_stride
    b_ptrs = b_ptr + ks[:, None].to(tl.int64) * b_k_stride + cols[None, :].to(tl.int64) * b_n_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for k in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=NUM_STAGES):
        if EVEN_K:
            a, b = tl.load(a_ptrs), tl.load(b_ptrs)
        else:
            inside = ks < K - k * BLOCK_K
            a = tl.load(a_ptrs, mask=inside[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=inside[:, None], other=0.0)
        acc = add_product(acc, a, b, PRECISION)
        a_ptrs += tl.cast(BLOCK_K, tl.int64) * a_k_stride
        b_ptrs += tl.cast(BLOCK_K, tl.int64) * b_k_stride
    return acc


@triton.jit
def load_tile(
    desc, outer, inner, row, col,
    BATCHED: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A tile [ROWS, COLS] at (row, col) through a tensor descriptor.

    A descriptor wants its last dimension adjacent in memory. A matrix whose columns are adjacent
    has a descriptor of its transpose, and TRANSPOSED turns the tile round: not in memory, since the
    tensor cores read a tile of 16-bit numbers either way.
    """
    if TRANSPOSED:
        if BATCHED:
            tile = desc.load([outer, inner, col, row]).reshape(COLS, ROWS).T
        else:
            tile = desc.load([col, row]).T
    else:
        if BATCHED:
            tile = desc.load([outer, inner, row, col]).reshape(ROWS, COLS)
        else:
            tile = desc.load([row, col])
    return tile


@triton.jit
def dot_descriptors(
    a_desc, b_desc, m, n, K, a_outer, a_inner, b_outer, b_inner,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, BATCHED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile (m, n) of A·B, read through tensor descriptors, which fill with zeros past every end."""
    return dot_descriptor_steps(
        a_desc, b_desc, m, n, 0, tl.cdiv(K, BLOCK_K), a_outer, a_inner, b_outer, b_inner,
        A_TRANSPOSED, B_TRANSPOSED, BATCHED, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def dot_descriptor_steps(
    a_desc, b_desc, m, n, begin, end, a_outer, a_inner, b_outer, b_inner,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, BATCHED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The part of tile (m, n) of A·B that steps begin to end - 1 along K add up to."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for k in tl.range(begin, end):
        a = load_tile(
            a_desc, a_outer, a_inner, m * BLOCK_M, k * BLOCK_K,
            BATCHED, A_TRANSPOSED, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        b = load_tile(
            b_desc, b_outer, b_inner, k * BLOCK_K, n * BLOCK_N,
            BATCHED, B_TRANSPOSED, BLOCK_K, BLOCK_N,
        )  # fmt: skip
        acc = add_product(acc, a, b, PRECISION)
    return acc


@triton.jit
def columns(acc, PARTS: tl.constexpr):
    """The left and the right half of a tile, or the tile itself where PARTS is 1."""
    if PARTS == 1:
        parts = (acc,)
    else:
        PART_N: tl.constexpr = acc.shape[1] // 2
        parts = acc.reshape(acc.shape[0], 2, PART_N).permute(0, 2, 1).split()
    return parts


@triton.jit
def epilogue(acc, scale, bias_ptr, cols, N, ACTIVATION: tl.constexpr):
    """activation(scale · acc + bias), where scale, bias_ptr and ACTIVATION may each be None."""
    if scale is not None:
        acc = acc * scale
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0)
        acc = acc + bias.to(acc.dtype)[None, :]
    if ACTIVATION is not None:
        acc = ACTIVATION(acc)
    return acc


@triton.jit
def combine(acc, other, MULTIPLY: tl.constexpr):
    """acc · other or acc + other, in acc's type."""
    if MULTIPLY:
        return acc * other.to(acc.dtype)
    return acc + other.to(acc.dtype)


@triton.jit
def store_pointers(
    acc, out_ptr, other_ptr, m, n, M, N,
    out_m_stride, out_n_stride, other_m_stride, other_n_stride,
    MULTIPLY: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write tile (m, n), combined with the same tile of `other` and of what out holds, if asked."""
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    rows, cols = rows[:, None].to(tl.int64), cols[None, :].to(tl.int64)
    if other_ptr is not None:
        offsets = rows * other_m_stride + cols * other_n_stride
        acc = combine(acc, tl.load(other_ptr + offsets, mask=mask, other=0.0), MULTIPLY)
    out_ptrs = out_ptr + rows * out_m_stride + cols * out_n_stride
    if ACCUMULATE:
        acc = acc + tl.load(out_ptrs, mask=mask, other=0.0).to(acc.dtype)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_descriptor(
    acc, out_desc, other_desc, outer, inner, other_outer, other_inner, row, col,
    MULTIPLY: tl.constexpr, ACCUMULATE: tl.constexpr, BATCHED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """`store_pointers` through descriptors; what lies past an end is not written.

    The memory adds what is to be accumulated, one addition an element, so that nothing is loaded.
    The interpreter has no such addition.
    """
    if other_desc is not None:
        other = load_tile(
            other_desc, other_outer, other_inner, row, col, BATCHED, False, ROWS, COLS
        )
        acc = combine(acc, other, MULTIPLY)
    acc = acc.to(out_desc.dtype)
    if BATCHED:
        where = [outer, inner, row, col]
        block = acc.reshape(1, 1, ROWS, COLS)
    else:
        where = [row, col]
        block = acc
    if ACCUMULATE and INTERPRETED:
        out_desc.store(where, out_desc.load(where) + block)
    elif ACCUMULATE:
        out_desc.atomic_add(where, block)
    else:
        out_desc.store(where, block)
