# What Gluon's decorators and annotations say of themselves is not what they do.
# pyrefly: ignore-errors
"""A product over the rows of each group, for Hopper, in Gluon: `_hopper` says who does what.

    out[g] = Σ a[r]ᵀ · b[r]         over the rows r of group g

Each group has the same tiles; what differs is how long the sum is. A tile's place is computed where
the tile begins and kept from then on: to divide at each step costs a fifth of the speed.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from tilewright_kernels._hopper import barriers, buffers, hand_over, next_product, tile_at


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
def _fetch_sums(
    a_desc, b_desc, a_bufs, b_bufs, full, slot, tile, k, place, rows_of, later, offs_ptr,
    tiles, tiles_m, tiles_n, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Start the copies of a step's operands, whole rows of both; return `_following_sum`."""
    pred = tile < tiles
    bar, a, b = full.index(slot), a_bufs.index(slot), b_bufs.index(slot)
    BLOCK_K: gl.constexpr = a_bufs.shape[1]
    m, n = place
    row = rows_of[0] + k * BLOCK_K
    mbarrier.expect(bar, (128 + 256) * BLOCK_K * 2, pred=pred)
    tma.async_copy_global_to_shared(a_desc, [row, m * 128], bar, a, pred=pred)
    tma.async_copy_global_to_shared(b_desc, [row, n * 256], bar, b, pred=pred)
    return _following_sum(
        tile, k, place, rows_of, later, offs_ptr, tiles, tiles_m, tiles_n, BLOCK_K, GROUP_M
    )


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
        tile, k, place, rows_of, later = _fetch_sums(
            a_desc, b_desc, a_bufs, b_bufs, full, slot, tile, k, place, rows_of, later, offs_ptr,
            tiles, tiles_m, tiles_n, GROUP_M,
        )  # fmt: skip
    step = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        steps = _steps_of(my_rows, BLOCK_K)
        acc = gl.zeros((128, 256), gl.float32, layout)
        for _k in range(steps - 1):
            current = step % STAGES
            mbarrier.wait(full.index(current), step // STAGES & 1)
            a, b = a_bufs.index(current).permute((1, 0)), b_bufs.index(current)
            acc = next_product(a, b, acc)
            tile, k, place, rows_of, later = _fetch_sums(
                a_desc, b_desc, a_bufs, b_bufs, full, (step + STAGES - 1) % STAGES, tile, k, place,
                rows_of, later, offs_ptr, tiles, tiles_m, tiles_n, GROUP_M,
            )  # fmt: skip
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
        acc = next_product(a, b, acc)
        tile, k, place, rows_of, later = _fetch_sums(
            a_desc, b_desc, a_bufs, b_bufs, full, (step + STAGES - 1) % STAGES, tile, k, place,
            rows_of, later, offs_ptr, tiles, tiles_m, tiles_n, GROUP_M,
        )  # fmt: skip
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
    full, tile = barriers(STAGES, 1), barriers(2, 1)
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
