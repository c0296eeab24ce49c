"""Fourth rung: one program a multiprocessor, tensor descriptors, and no pause between tiles.

Three things change. The tensor memory accelerator fetches whole tiles from a description of the
matrix, so that threads neither compute addresses nor hold them in registers. A program stays and
takes every 132nd tile. And the loop over tiles is flattened with the loop over K into one, which is
pipelined as one: the first tiles of A and B of the next result tile arrive while this one is
written.
"""

from tilewright_kernels._triton import tl, triton
from tilewright_kernels.matmul.tiles import (
    columns,
    dot_descriptors,
    epilogue,
    store_descriptor,
    tile_in_batch,
)


@triton.jit
def matmul_persistent_kernel(
    a_desc, b_desc, out_desc, other_desc, bias_ptr, scale, M, N, K, batch, inner,
    A_OUTER: tl.constexpr, A_INNER: tl.constexpr, B_OUTER: tl.constexpr, B_INNER: tl.constexpr,
    OTHER_OUTER: tl.constexpr, OTHER_INNER: tl.constexpr,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, BATCHED: tl.constexpr,
    ACTIVATION: tl.constexpr, MULTIPLY: tl.constexpr, ACCUMULATE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out = activation(scale · A·B + bias) + other; each program walks tiles of all matrices.

    A_OUTER and the like are 1, or 0 where the operand is the same along that dimension of the
    batch. PARTS is 2 where the result is written in two halves: the buffer that the accelerator
    writes from is then half as large, and shared memory has room for another stage.
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N) * batch
    PART_N: tl.constexpr = BLOCK_N // PARTS
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        outer, within, m, n = tile_in_batch(
            index, M, N, inner, BATCHED, BLOCK_M, BLOCK_N, GROUP_M
        )  # fmt: skip
        acc = dot_descriptors(
            a_desc, b_desc, m, n, K,
            outer * A_OUTER, within * A_INNER, outer * B_OUTER, within * B_INNER,
            A_TRANSPOSED, B_TRANSPOSED, BATCHED, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        parts = columns(acc, PARTS)
        for part in tl.static_range(PARTS):
            col = n * BLOCK_N + part * PART_N
            cols = col + tl.arange(0, PART_N)
            result = epilogue(parts[part], scale, bias_ptr, cols, N, ACTIVATION)
            store_descriptor(
                result, out_desc, other_desc, outer, within,
                outer * OTHER_OUTER, within * OTHER_INNER, m * BLOCK_M, col,
                MULTIPLY, ACCUMULATE, BATCHED, BLOCK_M, PART_N,
            )  # fmt: skip
