# What Gluon's decorators and annotations say of themselves is not what they do.
# pyrefly: ignore-errors
"""The products of groups for Hopper, in Gluon: who multiplies does nothing else.

As in `gated_mlp._hopper`, a program of twelve warps stays on its multiprocessor and walks tiles of
128 x 256. Eight warps multiply and fetch their own operands by the tensor memory accelerator, two
steps ahead and across the ends of tiles; four take each finished tile from shared memory and write
it, while the eight are at the next one. `moe_mlp` has other work for the four.

How many tiles there are is known on the device alone, so that a program asks a table (`blocks`)
which rows and whose matrix its next tile has, one tile before it needs to know.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def tile_at(index, tiles_m, tiles_n, GROUP_M: gl.constexpr):
    """Row and column of a tile, counted down GROUP_M rows of tiles, then in the next column."""
    group = index // (GROUP_M * tiles_n)
    rows = gl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = index - group * (GROUP_M * tiles_n)
    return group * GROUP_M + within % rows, within // rows


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
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr = 1):
    """COUNT barriers, each of which waits for so many arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def hand_over(acc, parts, tile_full, tile_empty, turn):
    """Give a tile to the other warps, in four parts [128, 64] and the operands' dtype."""
    BLOCK_M: gl.constexpr = parts.shape[1]
    mbarrier.wait(tile_empty, turn & 1 ^ 1)
    left, right = acc.reshape((BLOCK_M, 2, 128)).permute((0, 2, 1)).split()
    part_0, part_1 = left.reshape((BLOCK_M, 2, 64)).permute((0, 2, 1)).split()
    part_2, part_3 = right.reshape((BLOCK_M, 2, 64)).permute((0, 2, 1)).split()
    parts.index(0).store(part_0.to(parts.dtype))
    parts.index(1).store(part_1.to(parts.dtype))
    parts.index(2).store(part_2.to(parts.dtype))
    parts.index(3).store(part_3.to(parts.dtype))
    fence_async_shared()
    mbarrier.arrive(tile_full)


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
    ROWS: gl.constexpr = 256 if a_desc is None else 256 + BLOCK_M
    mbarrier.expect(bar, ROWS * BLOCK_K * 2, pred=pred)
    if a_desc is not None:
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
    tiles_n, k_tiles, b_rows, second, a_full, a_empty,
    TRANSPOSED: gl.constexpr, STEP_N: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The eight warps: rows of A times their group's matrix of B, tile by tile.

    One product is always in flight. When it is started, the one before is waited for, whose
    operands' buffer then takes those of the step after the next, be they of the next tile. A tile
    of A may reach into the next group: those rows are computed in vain, and not written.

    Where a_desc is None other warps bring A: a_full says that it is there, a_empty that it was
    used.
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
            if a_desc is None:
                mbarrier.wait(a_full.index(current), step // STAGES & 1)
                fence_async_shared()
            b = b_bufs.index(current)
            if TRANSPOSED:
                b = b.permute((1, 0))
            token = warpgroup_mma(a_bufs.index(current), b, acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(token,))
            gl.thread_barrier()
            if a_desc is None:
                mbarrier.arrive(a_empty.index((step + STAGES - 1) % STAGES), pred=step > 0)
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
def buffers(
    a_desc, A_SHAPE: gl.constexpr, B_SHAPE: gl.constexpr, b_layout: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Shared memory for the operands of STAGES steps, and for a tile in four parts."""
    dtype: gl.constexpr = a_desc.dtype
    part_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, 64], dtype)
    a_bufs = gl.allocate_shared_memory(dtype, [STAGES, A_SHAPE[0], A_SHAPE[1]], a_desc.layout)
    b_bufs = gl.allocate_shared_memory(dtype, [STAGES, B_SHAPE[0], B_SHAPE[1]], b_layout)
    parts = gl.allocate_shared_memory(dtype, [4, 128, 64], part_layout)
    return a_bufs, b_bufs, parts


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
    full, tile = barriers(STAGES), barriers(2)
    gl.warp_specialize(
        [
            (
                multiply_rows,
                (
                    a_desc, b_desc, a_bufs, b_bufs, parts, full, tile.index(0), tile.index(1),
                    blocks_ptr, tiles_n, gl.cdiv(K, BLOCK_K), b_rows, 128, None, None,
                    TRANSPOSED, 256, GROUP_M,
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


@gluon.jit
def _group_at(offs_ptr, index, tiles, tiles_of_group):
    """First row of a tile's group, and how many it has; none past the last tile."""
    group = index // tiles_of_group
    inside = index < tiles
    start = gl.load(offs_ptr + group - 1, mask=inside & (group > 0), other=0)
    return start, gl.load(offs_ptr + group, mask=inside, other=0) - start


@gluon.jit
def _steps_of(rows, BLOCK_K: gl.constexpr):
    """Steps of a tile. A group without rows has one, all of which is padding."""
    return gl.maximum(gl.cdiv(rows, BLOCK_K), 1)


@gluon.jit
def _fetch_sums(a_desc, b_desc, a_bufs, b_bufs, full, slot, place, start, k, pred):
    """Start the copies of one step's operands, whole rows of both."""
    bar, a, b = full.index(slot), a_bufs.index(slot), b_bufs.index(slot)
    BLOCK_K: gl.constexpr = a_bufs.shape[1]
    m, n = place
    row = start + k * BLOCK_K
    mbarrier.expect(bar, (128 + 256) * BLOCK_K * 2, pred=pred)
    tma.async_copy_global_to_shared(a_desc, [row, m * 128], bar, a, pred=pred)
    tma.async_copy_global_to_shared(b_desc, [row, n * 256], bar, b, pred=pred)


@gluon.jit
def _place_in_group(tile, tiles_m, tiles_n, GROUP_M: gl.constexpr):
    """Row and column of a tile among those of its group's product."""
    m, n = tile_at(tile % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    return m, n


@gluon.jit
def _following_sum(
    tile, k, place, rows_of, later, offs_ptr, tiles, tiles_m, tiles_n,
    BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The step after this one, its tile's place and group, and the group of the tile after."""
    m, n = place
    start, rows = rows_of
    later_start, later_rows = later
    k += 1
    if k == _steps_of(rows, BLOCK_K):
        k = 0
        tile += gl.num_programs(0)
        m, n = _place_in_group(tile, tiles_m, tiles_n, GROUP_M)
        start, rows = later_start, later_rows
        later_start, later_rows = _group_at(
            offs_ptr, tile + gl.num_programs(0), tiles, tiles_m * tiles_n
        )
    return tile, k, (m, n), (start, rows), (later_start, later_rows)


@gluon.jit
def _clear_rows(tile, valid, layout: gl.constexpr):
    """Make the rows from `valid` on zeros: they are another group's."""
    ROWS: gl.constexpr = 16
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    for i in gl.static_range(tile.shape[0] // ROWS):
        if ROWS * (i + 1) > valid:
            part = tile.slice(ROWS * i, ROWS)
            values = part.load(layout)
            part.store(gl.where((ROWS * i + rows < valid)[:, None], values, 0.0).to(tile.dtype))


@gluon.jit
def _multiply_sums(
    a_desc, b_desc, a_bufs, b_bufs, parts, full, tile_full, tile_empty, offs_ptr,
    tiles, tiles_m, tiles_n, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The eight warps: Aᵀ · B over the rows of each group; `multiply_rows` explains the order.

    The last step of a tile stands apart: what it has of another group's rows is cleared, of both
    operands, because 0 times another group's NaN would be NaN.
    """
    STAGES: gl.constexpr = a_bufs.shape[0]
    BLOCK_K: gl.constexpr = a_bufs.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 256, 16]
    )
    a_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    b_layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    tile, k = gl.program_id(0), 0
    place = _place_in_group(tile, tiles_m, tiles_n, GROUP_M)
    rows_of = _group_at(offs_ptr, tile, tiles, tiles_m * tiles_n)
    later = _group_at(offs_ptr, tile + gl.num_programs(0), tiles, tiles_m * tiles_n)
    _start, my_rows = rows_of
    _start, my_later_rows = later
    for slot in gl.static_range(STAGES - 1):
        _fetch_sums(a_desc, b_desc, a_bufs, b_bufs, full, slot, place, rows_of[0], k, tile < tiles)
        tile, k, place, rows_of, later = _following_sum(
            tile, k, place, rows_of, later, offs_ptr, tiles, tiles_m, tiles_n, BLOCK_K, GROUP_M
        )
    step = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        steps = _steps_of(my_rows, BLOCK_K)
        acc = gl.zeros((128, 256), gl.float32, layout)
        for _k in range(steps - 1):
            current = step % STAGES
            mbarrier.wait(full.index(current), step // STAGES & 1)
            a, b = a_bufs.index(current).permute((1, 0)), b_bufs.index(current)
            token = warpgroup_mma(a, b, acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(token,))
            gl.thread_barrier()
            _fetch_sums(
                a_desc, b_desc, a_bufs, b_bufs, full, (step + STAGES - 1) % STAGES,
                place, rows_of[0], k, tile < tiles,
            )  # fmt: skip
            tile, k, place, rows_of, later = _following_sum(
                tile, k, place, rows_of, later, offs_ptr, tiles, tiles_m, tiles_n, BLOCK_K, GROUP_M
            )
            step += 1
        current = step % STAGES
        mbarrier.wait(full.index(current), step // STAGES & 1)
        valid = my_rows - (steps - 1) * BLOCK_K
        if valid < BLOCK_K:
            _clear_rows(a_bufs.index(current), valid, a_layout)
            _clear_rows(b_bufs.index(current), valid, b_layout)
            fence_async_shared()
        gl.thread_barrier()
        a, b = a_bufs.index(current).permute((1, 0)), b_bufs.index(current)
        token = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(token,))
        gl.thread_barrier()
        _fetch_sums(
            a_desc, b_desc, a_bufs, b_bufs, full, (step + STAGES - 1) % STAGES,
            place, rows_of[0], k, tile < tiles,
        )  # fmt: skip
        tile, k, place, rows_of, later = _following_sum(
            tile, k, place, rows_of, later, offs_ptr, tiles, tiles_m, tiles_n, BLOCK_K, GROUP_M
        )
        step += 1
        my_rows = my_later_rows
        _start, my_later_rows = _group_at(
            offs_ptr, index + 2 * gl.num_programs(0), tiles, tiles_m * tiles_n
        )
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        hand_over(acc, parts, tile_full, tile_empty, index // gl.num_programs(0))


@gluon.jit
def _write_sums(
    out_desc, parts, tile_full, tile_empty, tiles, tiles_m, tiles_n, GROUP_M: gl.constexpr
):
    """The four warps of `grouped_sums_hopper_kernel`."""
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        group = index // (tiles_m * tiles_n)
        m, n = tile_at(index - group * (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
        mbarrier.wait(tile_full, index // gl.num_programs(0) & 1)
        for i in gl.static_range(4):
            part = parts.index(i)._reinterpret(parts.dtype, [1, 128, 64], out_desc.layout)
            at = [group, m * 128, n * 256 + 64 * i]
            tma.async_copy_shared_to_global(out_desc, at, part)
        tma.store_wait(0)
        mbarrier.arrive(tile_empty)


@gluon.jit
def grouped_sums_hopper_kernel(
    a_desc, b_desc, out_desc, offs_ptr, groups, M, N,
    EPILOGUE_REGISTERS: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """`grouped_sums_kernel` with a division of labour; A is [rows, M] and B [rows, N]."""
    tiles_m, tiles_n = gl.cdiv(M, 128), gl.cdiv(N, 256)
    tiles = groups * tiles_m * tiles_n
    b_layout: gl.constexpr = b_desc.layout
    a_bufs, b_bufs, parts = buffers(a_desc, [BLOCK_K, 128], [BLOCK_K, 256], b_layout, STAGES)
    full, tile = barriers(STAGES), barriers(2)
    gl.warp_specialize(
        [
            (
                _multiply_sums,
                (
                    a_desc, b_desc, a_bufs, b_bufs, parts, full, tile.index(0), tile.index(1),
                    offs_ptr, tiles, tiles_m, tiles_n, GROUP_M,
                ),
            ),
            (
                _write_sums,
                (
                    out_desc, parts, tile.index(0), tile.index(1), tiles, tiles_m, tiles_n,
                    GROUP_M,
                ),
            ),
        ],
        [4],
        [EPILOGUE_REGISTERS],
    )  # fmt: skip
