"""Third rung: the second, with the tiles of the next steps on their way while one is multiplied.

NUM_STAGES buffers for A and for B lie in shared memory. Asynchronous copies fill NUM_STAGES - 1 of
them ahead of the tensor cores, which no longer wait for memory. Pointers take any strides and any
sizes, so this is also the kernel for all that tensor descriptors cannot describe.
"""

from tilewright_kernels._triton import tl, triton
from tilewright_kernels.matmul.tiles import (
    batch_offset,
    dot_pointers,
    epilogue,
    store_pointers,
    tile_in_groups,
)


@triton.jit
def matmul_pipelined_kernel(
    a_ptr, b_ptr, out_ptr, other_ptr, bias_ptr, scale, M, N, K, inner,
    a_outer_stride, a_inner_stride, a_m_stride, a_k_stride,
    b_outer_stride, b_inner_stride, b_k_stride, b_n_stride,
    out_outer_stride, out_inner_stride, out_m_stride, out_n_stride,
    other_outer_stride, other_inner_stride, other_m_stride, other_n_stride,
    ACTIVATION: tl.constexpr, MULTIPLY: tl.constexpr, ACCUMULATE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """out = activation(scale · A·B + bias) + other, a tile a program; grid (tiles, batch)."""
    m, n = tile_in_groups(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    batch = tl.program_id(1)
    a_ptr += batch_offset(batch, inner, a_outer_stride, a_inner_stride)
    b_ptr += batch_offset(batch, inner, b_outer_stride, b_inner_stride)
    out_ptr += batch_offset(batch, inner, out_outer_stride, out_inner_stride)
    if other_ptr is not None:
        other_ptr += batch_offset(batch, inner, other_outer_stride, other_inner_stride)
    acc = dot_pointers(
        a_ptr, b_ptr, m, n, M, N, K, a_m_stride, a_k_stride, b_k_stride, b_n_stride,
        ACC, PRECISION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES,
    )  # fmt: skip
    cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = epilogue(acc, scale, bias_ptr, cols, N, ACTIVATION)
    store_pointers(
        acc, out_ptr, other_ptr, m, n, M, N,
        out_m_stride, out_n_stride, other_m_stride, other_n_stride,
        MULTIPLY, ACCUMULATE, BLOCK_M, BLOCK_N,
    )  # fmt: skip
