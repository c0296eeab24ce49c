"""First rung: one program a tile of the result, in the order of a page, and nothing overlapped.

Each program waits for its tiles of A and B, multiplies them, and only then asks for the next two.
And programs that run at one time cover a few whole rows of tiles: they share little of A and all of
B, which has to come from memory again for each row of them.
"""

from tilewright_kernels._triton import tl, triton
from tilewright_kernels.matmul.tiles import (
    batch_offset,
    dot_pointers,
    epilogue,
    store_pointers,
    tile_in_rows,
)


@triton.jit
def matmul_naive_kernel(
    a_ptr, b_ptr, out_ptr, other_ptr, bias_ptr, scale, M, N, K, inner,
    a_outer_stride, a_inner_stride, a_m_stride, a_k_stride,
    b_outer_stride, b_inner_stride, b_k_stride, b_n_stride,
    out_outer_stride, out_inner_stride, out_m_stride, out_n_stride,
    other_outer_stride, other_inner_stride, other_m_stride, other_n_stride,
    ACTIVATION: tl.constexpr, MULTIPLY: tl.constexpr, ACCUMULATE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = activation(scale · A·B + bias) + other, a tile a program; grid (tiles, batch)."""
    m, n = tile_in_rows(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    batch = tl.program_id(1)
    a_ptr += batch_offset(batch, inner, a_outer_stride, a_inner_stride)
    b_ptr += batch_offset(batch, inner, b_outer_stride, b_inner_stride)
    out_ptr += batch_offset(batch, inner, out_outer_stride, out_inner_stride)
    if other_ptr is not None:
        other_ptr += batch_offset(batch, inner, other_outer_stride, other_inner_stride)
    acc = dot_pointers(
        a_ptr, b_ptr, m, n, M, N, K, a_m_stride, a_k_stride, b_k_stride, b_n_stride,
        ACC, PRECISION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES=1,
    )  # fmt: skip
    cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = epilogue(acc, scale, bias_ptr, cols, N, ACTIVATION)
    store_pointers(
        acc, out_ptr, other_ptr, m, n, M, N,
        out_m_stride, out_n_stride, other_m_stride, other_n_stride,
        MULTIPLY, ACCUMULATE, BLOCK_M, BLOCK_N,
    )  # fmt: skip
