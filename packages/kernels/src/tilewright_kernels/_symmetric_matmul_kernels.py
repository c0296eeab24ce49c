"""The kernels of symmetric_matmul and commuting_matmul: a triangle of tiles of X·Zᵀ.

X·Zᵀ is symmetric, because Z is X or commutes with it. Tiles are read with pointers or descriptors.
Blocks are BLOCK rows and columns of the result. Those below the diagonal are stored twice, once
transposed; those on it take their upper half from their lower.
"""

from tilewright_kernels._triton import tl, triton
from tilewright_kernels.matmul.tiles import dot_descriptors, dot_pointers


@triton.jit
def integer_sqrt(n):
    """The largest r with r² <= n, for 0 <= n < 46340², past which squares exceed 31 bits.

    float32 is exact to 2²⁴ only: past that its root may be one too small or too large.
    """
    root = tl.sqrt(n.to(tl.float32)).to(tl.int32)
    root = tl.where(root * root > n, root - 1, root)
    return tl.where((root + 1) * (root + 1) <= n, root + 1, root)


@triton.jit
def _block_of_triangle(index):
    """Row and column of a block in a triangle counted row after row: 0; 1 2; 3 4 5; …

    Row m begins at m·(m + 1)/2.
    """
    m = (integer_sqrt(8 * index + 1) - 1) // 2
    return m, index - m * (m + 1) // 2


@triton.jit
def _wide_tile_of_triangle(index):
    """Row in blocks, and column in pairs of blocks, of a wide tile in a triangle.

    Row m has m + 1 blocks: in odd rows an even number, in even rows the last one, on the diagonal,
    is in no wide tile. So rows 2p and 2p + 1 have p and p + 1 wide tiles, and p² stand before them.
    """
    p = integer_sqrt(index)
    within = index - p * p
    lower_row = within >= p
    return 2 * p + lower_row.to(tl.int32), tl.where(lower_row, within - p, within)


@triton.jit
def symmetric_matmul_pointers_kernel(
    x_ptr, z_ptr, c_ptr, y_ptr,
    # float64, so that they are exact there.
    # pyrefly: ignore[not-a-type]
    alpha: tl.float64, beta: tl.float64,
    M, K,
    x_batch_stride, x_m_stride, x_k_stride, z_batch_stride, z_m_stride, z_k_stride,
    c_batch_stride, c_m_stride, c_n_stride,
    ACC: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """A BLOCK x BLOCK block of the lower triangle and its mirror image; any strides, any sizes."""
    tiles_m = tl.cdiv(M, BLOCK)
    per_matrix = tiles_m * (tiles_m + 1) // 2
    batch = (tl.program_id(0) // per_matrix).to(tl.int64)
    m, n = _block_of_triangle(tl.program_id(0) % per_matrix)
    x_ptr += batch * x_batch_stride
    z_ptr += batch * z_batch_stride
    acc = dot_pointers(
        x_ptr, z_ptr, m, n, M, M, K, x_m_stride, x_k_stride, z_k_stride, z_m_stride,
        ACC, PRECISION, EVEN_K, BLOCK, BLOCK, BLOCK_K, NUM_STAGES,
    )  # fmt: skip
    y = acc * tl.full((), alpha, ACC)
    rows = (m * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    cols = (n * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    lower = (rows < M) & (cols <= rows)
    if c_ptr is not None:
        c_ptr += batch * c_batch_stride
        c = tl.load(c_ptr + rows * c_m_stride + cols * c_n_stride, mask=lower, other=0.0)
        y += tl.full((), beta, ACC) * c.to(ACC)
    y = y.to(y_ptr.dtype.element_ty)
    y_ptr += batch * M * M
    tl.store(y_ptr + rows * M + cols, y, mask=lower)
    tl.store(y_ptr + cols * M + rows, y, mask=lower)


@triton.jit
def _store_block(
    acc, c_desc, y_desc, alpha, beta, batch, row, col, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write α · acc + β · C at (row, col) and its mirror image at (col, row)."""
    y = acc * alpha
    if c_desc is not None:
        y += beta * c_desc.load([batch, 0, row, col]).reshape(BLOCK, BLOCK).to(acc.dtype)
    y = y.to(y_desc.dtype)
    if row == col:
        i = tl.arange(0, BLOCK)
        y = tl.where(i[:, None] >= i[None, :], y, y.T)
        y_desc.store([batch, 0, row, col], y.reshape(1, 1, BLOCK, BLOCK))
    else:
        y_desc.store([batch, 0, row, col], y.reshape(1, 1, BLOCK, BLOCK))
        y_desc.store([batch, 0, col, row], y.T.reshape(1, 1, BLOCK, BLOCK))


@triton.jit
def symmetric_matmul_descriptors_kernel(
    x_desc, z_desc, wide_desc, c_desc, y_desc,
    # pyrefly: ignore[not-a-type]
    alpha: tl.float64, beta: tl.float64,
    batches, M, K,
    TRANSPOSED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Walk the lower triangles of all matrices, in single blocks and in wide tiles of two.

    z_desc and wide_desc are both of Z, for one and for two blocks of its rows.

    A wide tile reads a quarter less for each product than a square one, and together with every
    second block of the diagonal wide tiles make up a triangle without waste.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    alpha, beta = tl.full((), alpha, ACC), tl.full((), beta, ACC)
    tiles_m = tl.cdiv(M, BLOCK)
    wide_each = tiles_m * tiles_m // 4 if WIDE else 0
    num_wide = batches * wide_each
    single_each = tiles_m * (tiles_m + 1) // 2 - 2 * wide_each
    num_single = batches * single_each

    # Programs that get one wide tile less than others take the single blocks, two each, where that
    # is enough for all of them.
    behind = programs - num_wide % programs
    first = (program + behind) % programs
    step = programs
    if num_single <= 2 * behind:
        first = tl.where(first < behind, first, num_single)
        step = behind
    for index in tl.range(first, num_single, step):
        batch, block = index // single_each, index % single_each
        if WIDE:
            m, n = 2 * block, 2 * block
        else:
            m, n = _block_of_triangle(block)
        acc = dot_descriptors(
            x_desc, z_desc, m, n, K, batch, 0, batch, 0, TRANSPOSED, not TRANSPOSED, True,
            ACC, PRECISION, BLOCK, BLOCK, BLOCK_K,
        )  # fmt: skip
        _store_block(acc, c_desc, y_desc, alpha, beta, batch, m * BLOCK, n * BLOCK, BLOCK)

    if WIDE:
        for index in tl.range(program, num_wide, programs):
            batch = index // wide_each
            m, n = _wide_tile_of_triangle(index % wide_each)
            acc = dot_descriptors(
                x_desc, wide_desc, m, n, K, batch, 0, batch, 0, TRANSPOSED, not TRANSPOSED, True,
                ACC, PRECISION, BLOCK, 2 * BLOCK, BLOCK_K,
            )  # fmt: skip
            left, right = acc.reshape(BLOCK, 2, BLOCK).permute(0, 2, 1).split()
            row, col = m * BLOCK, n * 2 * BLOCK
            _store_block(left, c_desc, y_desc, alpha, beta, batch, row, col, BLOCK)
            _store_block(right, c_desc, y_desc, alpha, beta, batch, row, col + BLOCK, BLOCK)
