"""Fifth rung: the fourth, with what is left over after whole waves divided evenly (stream-K).

132 programs compute 132 tiles at a time. Of 192 tiles the last 60 keep 72 programs waiting, and 72
tiles never occupy the device at all. Here whole waves are walked as in the fourth rung. Of the
tiles after them all steps along K stand in one row, each program takes an equal stretch of it, and
what several programs have summed of a tile is added up by a second kernel (Osama et al. 2023,
arXiv:2301.03598). Nobody waits for anybody, and parts are added in one order: two runs give the
same bits.

The order of that row decides the speed. Tile after tile, programs that run at one time would stand
anywhere along K, and each would read parts of A and B that no other one reads. So K is cut into
bands as high as a stretch is long, and the row goes band after band, tile after tile within a band.
The first band is then one tile a program, all at the same step along K, as in the rungs before.
"""

from tilewright_kernels._triton import tl, triton
from tilewright_kernels.matmul.tiles import (
    columns,
    dot_descriptor_steps,
    dot_descriptors,
    epilogue,
    store_descriptor,
    store_pointers,
    tile_in_batch,
)


@triton.jit
def matmul_stream_k_kernel(
    a_desc, b_desc, out_desc, other_desc, parts_desc, bias_ptr, scale,
    M, N, K, batch, inner, waves, stretch,
    A_OUTER: tl.constexpr, A_INNER: tl.constexpr, B_OUTER: tl.constexpr, B_INNER: tl.constexpr,
    OTHER_OUTER: tl.constexpr, OTHER_INNER: tl.constexpr,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, BATCHED: tl.constexpr,
    ACTIVATION: tl.constexpr, MULTIPLY: tl.constexpr, ACCUMULATE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Whole tiles of out for `waves` waves of programs, then a stretch of steps of the others.

    Sums of these go to parts_desc, [anything, BLOCK_N], a tile at each `_slot`.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    PART_N: tl.constexpr = BLOCK_N // PARTS
    for index in tl.range(program, waves * programs, programs, flatten=True):
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

    steps = tl.cdiv(K, BLOCK_K)
    shared = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N) * batch - waves * programs
    at = program * stretch
    end = tl.minimum(at + stretch, shared * steps)
    while at < end:
        band = tl.minimum(at // (shared * stretch), (steps - 1) // stretch)
        height = tl.minimum(stretch, steps - band * stretch)
        cell = (at - band * shared * stretch) // height
        above = (at - band * shared * stretch) % height
        count = tl.minimum(height - above, end - at)
        outer, within, m, n = tile_in_batch(
            waves * programs + cell, M, N, inner, BATCHED, BLOCK_M, BLOCK_N, GROUP_M
        )  # fmt: skip
        first = band * stretch + above
        acc = dot_descriptor_steps(
            a_desc, b_desc, m, n, first, first + count,
            outer * A_OUTER, within * A_INNER, outer * B_OUTER, within * B_INNER,
            A_TRANSPOSED, B_TRANSPOSED, BATCHED, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        parts = columns(acc, PARTS)
        for part in tl.static_range(PARTS):
            row = _slot(band, cell, shared, program) * BLOCK_M
            parts_desc.store([row, part * PART_N], parts[part])
        at += count


@triton.jit
def _slot(band, cell, shared, program):
    """Where a program's part of a tile is kept: no two parts have the same sum of these."""
    return band * shared + cell + program


@triton.jit
def matmul_stream_k_sum_kernel(
    parts_ptr, out_ptr, other_ptr, bias_ptr, scale, M, N, K, inner, first_tile, shared, stretch,
    out_outer_stride, out_inner_stride, out_m_stride, out_n_stride,
    other_outer_stride, other_inner_stride, other_m_stride, other_n_stride,
    BATCHED: tl.constexpr, ACTIVATION: tl.constexpr, MULTIPLY: tl.constexpr,
    ACCUMULATE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a shared tile of out from its parts; grid (shared tiles, BLOCK_M / ROWS)."""
    cell = tl.program_id(0)
    outer, within, m, n = tile_in_batch(
        first_tile + cell, M, N, inner, BATCHED, BLOCK_M, BLOCK_N, GROUP_M
    )  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    offsets = rows[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((ROWS, BLOCK_N), dtype=ACC)
    steps = tl.cdiv(K, BLOCK_K)
    for band in tl.range(0, tl.cdiv(steps, stretch)):
        height = tl.minimum(stretch, steps - band * stretch)
        at = band * shared * stretch + cell * height
        for program in tl.range(at // stretch, (at + height - 1) // stretch + 1):
            slot = _slot(band, cell, shared, program)
            acc += tl.load(parts_ptr + tl.cast(slot, tl.int64) * BLOCK_M * BLOCK_N + offsets)
    cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = epilogue(acc, scale, bias_ptr, cols, N, ACTIVATION)
    outer, within = tl.cast(outer, tl.int64), tl.cast(within, tl.int64)
    out_ptr += outer * out_outer_stride + within * out_inner_stride
    if other_ptr is not None:
        other_ptr += outer * other_outer_stride + within * other_inner_stride
    store_pointers(
        acc, out_ptr, other_ptr, m * (BLOCK_M // ROWS) + tl.program_id(1), n, M, N,
        out_m_stride, out_n_stride, other_m_stride, other_n_stride,
        MULTIPLY, ACCUMULATE, ROWS, BLOCK_N,
    )  # fmt: skip
