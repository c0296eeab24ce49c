# What Gluon's decorators and annotations say of themselves is not what they do.
# pyrefly: ignore-errors
"""Rows times the matrix of their group, for Hopper, in Gluon: `_hopper` says who does what.

out[r] = a[r] · b[g]            for each row r of group g

How many tiles there are is known on the device alone, so that a program asks a table (`blocks`)
which rows and whose matrix its next tile has, one tile before it needs to know.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from tilewright_kernels._hopper import barriers, buffers, hand_over, next_product, tile_at


@gluon.jit
def block_at(blocks_ptr, index, num_blocks, tiles_n, GROUP_M: gl.constexpr):
    """Whose matrix a tile multiplies with, its first row, its group's last + 1, and its column.

    Past the last tile all but the column are 0.
    """
    m, n = tile_at(index, num_blocks, tiles_n, GROUP_M)
    inside = index < num_blocks * tiles_n
    entry = blocks_ptr + 1 + 3 * m
    group = gl.load(entry, mask=inside, other=0)
    row = gl.load(entry + 1, mask=inside, other=0)
    end = gl.load(entry + 2, mask=inside, other=0)
    return group, row, end, n


@gluon.jit
def _fetch_rows(
    a_desc, b_desc, a_bufs, b_bufs, full, slot, place, k, b_rows, second, pred,
    TRANSPOSED: gl.constexpr, STEP_N: gl.constexpr,
):  # fmt: skip
    """Start the copies of one step's operands; `full` of the slot is signalled when they are there.

    B is [groups, K, N], or TRANSPOSED [groups · b_rows, K]: then the tile is 128 columns of the
    product from n · STEP_N on, and 128 that begin `second` further.
    """
    group, row, n = place
    bar, a, b = full.index(slot), a_bufs.index(slot), b_bufs.index(slot)
    BLOCK_M: gl.constexpr = a_bufs.shape[1]
    BLOCK_K: gl.constexpr = a_bufs.shape[2]
    mbarrier.expect(bar, (BLOCK_M + 256) * BLOCK_K * 2, pred=pred)
    tma.async_copy_global_to_shared(a_desc, [row, k * BLOCK_K], bar, a, pred=pred)
    if TRANSPOSED:
        upper, lower = b.slice(0, 128), b.slice(128, 128)
        col = group * b_rows + n * STEP_N
        tma.async_copy_global_to_shared(b_desc, [col, k * BLOCK_K], bar, upper, pred=pred)
        tma.async_copy_global_to_shared(b_desc, [col + second, k * BLOCK_K], bar, lower, pred=pred)
    else:
        b = b._reinterpret(b_desc.dtype, [1, BLOCK_K, 256], b_desc.layout)
        at = [group, k * BLOCK_K, n * STEP_N]
        tma.async_copy_global_to_shared(b_desc, at, bar, b, pred=pred)


@gluon.jit
def _following(
    place, later, tile, k, k_tiles, blocks_ptr, num_blocks, tiles_n, GROUP_M: gl.constexpr
):
    """The step after this one, and the place of the tile after its tile."""
    group, row, n = place
    k += 1
    if k == k_tiles:
        k = 0
        tile += gl.num_programs(0)
        group, row, n = later
        ahead = tile + gl.num_programs(0)
        later_group, later_row, _end, later_n = block_at(
            blocks_ptr, ahead, num_blocks, tiles_n, GROUP_M
        )
    else:
        later_group, later_row, later_n = later
    return (group, row, n), (later_group, later_row, later_n), tile, k


@gluon.jit
def multiply_rows(
    a_desc, b_desc, a_bufs, b_bufs, parts, full, tile_full, tile_empty, blocks_ptr,
    tiles_n, k_tiles, b_rows, second,
    TRANSPOSED: gl.constexpr, STEP_N: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The eight warps: rows of A times their group's matrix of B, tile by tile.

    One product is always in flight. When it is started, the one before is waited for, whose
    operands' buffer then takes those of the step after the next, be they of the next tile. A tile
    of A may reach into the next group: those rows are computed in vain, and not written.
    """
    STAGES: gl.constexpr = a_bufs.shape[0]
    BLOCK_M: gl.constexpr = a_bufs.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 256, 16]
    )
    num_blocks = gl.load(blocks_ptr)
    tiles = num_blocks * tiles_n
    tile, k = gl.program_id(0), 0
    group, row, _end, n = block_at(blocks_ptr, tile, num_blocks, tiles_n, GROUP_M)
    place = (group, row, n)
    group, row, _end, n = block_at(
        blocks_ptr, tile + gl.num_programs(0), num_blocks, tiles_n, GROUP_M
    )
    later = (group, row, n)
    for slot in gl.static_range(STAGES - 1):
        _fetch_rows(
            a_desc, b_desc, a_bufs, b_bufs, full, slot, place, k, b_rows, second, tile < tiles,
            TRANSPOSED, STEP_N,
        )  # fmt: skip
        place, later, tile, k = _following(
            place, later, tile, k, k_tiles, blocks_ptr, num_blocks, tiles_n, GROUP_M
        )
    step = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        acc = gl.zeros((BLOCK_M, 256), gl.float32, layout)
        for _k in range(k_tiles):
            current = step % STAGES
            mbarrier.wait(full.index(current), step // STAGES & 1)
            b = b_bufs.index(current)
            if TRANSPOSED:
                b = b.permute((1, 0))
            acc = next_product(a_bufs.index(current), b, acc)
            _fetch_rows(
                a_desc, b_desc, a_bufs, b_bufs, full, (step + STAGES - 1) % STAGES, place, k,
                b_rows, second, tile < tiles, TRANSPOSED, STEP_N,
            )  # fmt: skip
            place, later, tile, k = _following(
                place, later, tile, k, k_tiles, blocks_ptr, num_blocks, tiles_n, GROUP_M
            )
            step += 1
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        hand_over(acc, parts, tile_full, tile_empty, index // gl.num_programs(0))


@gluon.jit
def store_chunk(ptr, chunk, row, col, end, N, stride, layout: gl.constexpr):
    """Write a chunk of a tile at (row, col) by pointers: rows before `end`, columns before N."""
    rows = row + gl.arange(0, chunk.shape[0], gl.SliceLayout(1, layout))
    cols = col + gl.arange(0, chunk.shape[1], gl.SliceLayout(0, layout))
    mask = (rows < end)[:, None] & (cols < N)[None, :]
    gl.store(ptr + rows.to(gl.int64)[:, None] * stride + cols[None, :], chunk, mask=mask)


@gluon.jit
def _write_rows(
    out_ptr, out_desc, parts, tile_full, tile_empty, blocks_ptr, N, tiles_n,
    GROUP_M: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """The four warps of `grouped_rows_hopper_kernel`: whole tiles at once, others row by row."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    BLOCK_M: gl.constexpr = parts.shape[1]
    num_blocks = gl.load(blocks_ptr)
    for index in range(gl.program_id(0), num_blocks * tiles_n, gl.num_programs(0)):
        _group, row, end, n = block_at(blocks_ptr, index, num_blocks, tiles_n, GROUP_M)
        mbarrier.wait(tile_full, index // gl.num_programs(0) & 1)
        if row + BLOCK_M <= end:
            for part in gl.static_range(4):
                at = [row, n * 256 + 64 * part]
                tma.async_copy_shared_to_global(out_desc, at, parts.index(part))
            tma.store_wait(0)
        else:
            for part in gl.static_range(4):
                for i in gl.static_range(BLOCK_M // ROWS):
                    chunk = parts.index(part).slice(ROWS * i, ROWS).load(layout)
                    store_chunk(
                        out_ptr, chunk, row + ROWS * i, n * 256 + 64 * part, end, N, N, layout
                    )
        mbarrier.arrive(tile_empty)


@gluon.jit
def grouped_rows_hopper_kernel(
    a_desc, b_desc, out_desc, out_ptr, blocks_ptr, N, K, b_rows,
    TRANSPOSED: gl.constexpr, EPILOGUE_REGISTERS: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """`grouped_rows_kernel` with a division of labour; out is contiguous."""
    tiles_n = gl.cdiv(N, 256)
    B_SHAPE: gl.constexpr = [256, BLOCK_K] if TRANSPOSED else [BLOCK_K, 256]
    b_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(B_SHAPE, a_desc.dtype)
    a_bufs, b_bufs, parts = buffers(a_desc, [128, BLOCK_K], B_SHAPE, b_layout, STAGES)
    full, tile = barriers(STAGES, 1), barriers(2, 1)
    gl.warp_specialize(
        [
            (
                multiply_rows,
                (
                    a_desc, b_desc, a_bufs, b_bufs, parts, full, tile.index(0), tile.index(1),
                    blocks_ptr, tiles_n, gl.cdiv(K, BLOCK_K), b_rows, 128, TRANSPOSED, 256,
                    GROUP_M,
                ),
            ),
            (
                _write_rows,
                (
                    out_ptr, out_desc, parts, tile.index(0), tile.index(1), blocks_ptr, N, tiles_n,
                    GROUP_M, ROWS,
                ),
            ),
        ],
        [4],
        [EPILOGUE_REGISTERS],
    )  # fmt: skip
