"""Fifth rung: the fourth, with what is left over after whole waves divided evenly (stream-K).

132 programs compute 132 tiles at a time. Of 192 tiles the last 60 keep 72 programs waiting, and 72
tiles never occupy the device at all. Here whole waves are walked as in the fourth rung. Of the
tiles after them all steps along K stand in one row, and each program takes an equal stretch of it,
which may begin and end in the middle of a tile (Osama et al. 2023, arXiv:2301.03598).

A tile that several programs share is put together without waiting: each writes its part, then
counts itself; who counts last adds up all parts, always in the same order, and writes the tile. So
two runs give the same bits, and no program depends on another one running at the same time.
"""

from tilewright_kernels._triton import tl, triton
from tilewright_kernels.matmul.tiles import (
    columns,
    dot_descriptor_steps,
    dot_descriptors,
    epilogue,
    store_descriptor,
    tile_in_batch,
)


@triton.jit
def matmul_stream_k_kernel(
    a_desc, b_desc, out_desc, other_desc, parts_ptr, arrived_ptr, bias_ptr, scale,
    M, N, K, batch, inner, whole, stretch,
    A_OUTER: tl.constexpr, A_INNER: tl.constexpr, B_OUTER: tl.constexpr, B_INNER: tl.constexpr,
    OTHER_OUTER: tl.constexpr, OTHER_INNER: tl.constexpr,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, BATCHED: tl.constexpr,
    ACTIVATION: tl.constexpr, MULTIPLY: tl.constexpr, ACCUMULATE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out = activation(scale · A·B + bias) + other; the first `whole` tiles one a program.

    Program p then takes steps p · stretch to (p + 1) · stretch - 1 of all tiles after them.
    parts_ptr has room for two tiles a program, arrived_ptr a zero for each of those tiles.
    """
    program = tl.program_id(0)
    PART_N: tl.constexpr = BLOCK_N // PARTS
    for index in tl.range(program, whole, tl.num_programs(0), flatten=True):
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
    shared = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N) * batch - whole
    begin = program * stretch
    end = tl.minimum(begin + stretch, shared * steps)
    first = begin // steps
    for tile in tl.range(first, tl.cdiv(end, steps)):
        outer, within, m, n = tile_in_batch(
            whole + tile, M, N, inner, BATCHED, BLOCK_M, BLOCK_N, GROUP_M
        )  # fmt: skip
        acc = dot_descriptor_steps(
            a_desc, b_desc, m, n,
            tl.maximum(begin - tile * steps, 0), tl.minimum(end - tile * steps, steps),
            outer * A_OUTER, within * A_INNER, outer * B_OUTER, within * B_INNER,
            A_TRANSPOSED, B_TRANSPOSED, BATCHED, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        _store_part(parts_ptr + (2 * program + tile - first) * BLOCK_M * BLOCK_N, acc, PARTS)
        first_program = tile * steps // stretch
        last_program = (tile * steps + steps - 1) // stretch
        tl.debug_barrier()  # all threads' stores before the one thread that counts
        before = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel")
        if before == last_program - first_program:
            for part in tl.static_range(PARTS):
                total = _sum_parts(
                    parts_ptr, part, tile, steps, stretch, first_program, last_program,
                    ACC, BLOCK_M, BLOCK_N, PART_N,
                )  # fmt: skip
                col = n * BLOCK_N + part * PART_N
                cols = col + tl.arange(0, PART_N)
                total = epilogue(total, scale, bias_ptr, cols, N, ACTIVATION)
                store_descriptor(
                    total, out_desc, other_desc, outer, within,
                    outer * OTHER_OUTER, within * OTHER_INNER, m * BLOCK_M, col,
                    MULTIPLY, ACCUMULATE, BATCHED, BLOCK_M, PART_N,
                )  # fmt: skip


@triton.jit
def _offsets(ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]


@triton.jit
def _store_part(part_ptr, acc, PARTS: tl.constexpr):
    """Write a tile, one half of its columns after the other."""
    ROWS: tl.constexpr = acc.shape[0]
    COLS: tl.constexpr = acc.shape[1] // PARTS
    halves = columns(acc, PARTS)
    for half in tl.static_range(PARTS):
        tl.store(part_ptr + half * ROWS * COLS + _offsets(ROWS, COLS), halves[half])


@triton.jit
def _sum_parts(
    parts_ptr, part, tile, steps, stretch, first_program, last_program,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART_N: tl.constexpr,
):  # fmt: skip
    """Sum of half a tile over the programs that share it, in their order."""
    total = tl.zeros((BLOCK_M, PART_N), dtype=ACC)
    offsets = part * BLOCK_M * PART_N + _offsets(BLOCK_M, PART_N)
    for program in tl.range(first_program, last_program + 1):
        slot = 2 * program + tile - program * stretch // steps
        # .cg: from the second-level cache, where other multiprocessors have written it.
        total += tl.load(
            parts_ptr + slot * BLOCK_M * BLOCK_N + offsets, cache_modifier=".cg"
        )  # fmt: skip
    return total
