# What Gluon's decorators and annotations say of themselves is not what they do.
# pyrefly: ignore-errors
"""The two products of a layer of experts that have work to do at their end, for Hopper, in Gluon.

`_hopper` says how the warps share the work. Here the four that do not multiply apply the
activation (forward), or its gradient, the weights of the router and their gradient (backward).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from tilewright_kernels._hopper import barriers, buffers
from tilewright_kernels.grouped_mm.hopper_rows import block_at, multiply_rows, store_chunk


@gluon.jit
def _gate(
    h_ptr, gate_ptr, gate_desc, up_desc, parts, tile_full, tile_empty, blocks_ptr, N, tiles_n,
    FUNCTION: gl.constexpr, GROUP_M: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """The four warps of the forward: parts 0 and 1 are gate, 2 and 3 are up."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    BLOCK_M: gl.constexpr = parts.shape[1]
    num_blocks = gl.load(blocks_ptr)
    for index in range(gl.program_id(0), num_blocks * tiles_n, gl.num_programs(0)):
        _group, row, end, n = block_at(blocks_ptr, index, num_blocks, tiles_n, GROUP_M)
        mbarrier.wait(tile_full, index // gl.num_programs(0) & 1)
        whole = row + BLOCK_M <= end
        if gate_desc is not None:  # noqa: SIM102 - known to the compiler, unlike the next
            if whole:
                for half in gl.static_range(2):
                    at = [row, n * 128 + 64 * half]
                    tma.async_copy_shared_to_global(gate_desc, at, parts.index(half))
                    tma.async_copy_shared_to_global(up_desc, at, parts.index(2 + half))
        for half in gl.static_range(2):
            col = n * 128 + 64 * half
            for i in gl.static_range(BLOCK_M // ROWS):
                first = row + ROWS * i
                gate = parts.index(half).slice(ROWS * i, ROWS).load(layout)
                up = parts.index(2 + half).slice(ROWS * i, ROWS).load(layout)
                if gate_desc is not None:  # noqa: SIM102
                    if not whole:
                        store_chunk(gate_ptr, gate, first, col, end, N, 2 * N, layout)
                        store_chunk(gate_ptr + N, up, first, col, end, N, 2 * N, layout)
                if h_ptr is not None:
                    h = FUNCTION(gate.to(gl.float32)) * up.to(gl.float32)
                    store_chunk(h_ptr, h.to(parts.dtype), first, col, end, N, N, layout)
        tma.store_wait(0)
        mbarrier.arrive(tile_empty)


@gluon.jit
def expert_gate_up_hopper_kernel(
    x_desc, w_desc, h_ptr, gate_ptr, gate_desc, up_desc, blocks_ptr, N, K,
    FUNCTION: gl.constexpr, EPILOGUE_REGISTERS: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """`expert_gate_up_kernel` with a division of labour.

    x is [rows, K] in the experts' order, w [experts · 2N, K]; h [rows, N] and gate_up [rows, 2N]
    are contiguous, and either may be None.
    """
    tiles_n = gl.cdiv(N, 128)
    b_layout: gl.constexpr = w_desc.layout
    a_bufs, b_bufs, parts = buffers(x_desc, [128, BLOCK_K], [256, BLOCK_K], b_layout, STAGES)
    full, tile = barriers(STAGES, 1), barriers(2, 1)
    gl.warp_specialize(
        [
            (
                multiply_rows,
                (
                    x_desc, w_desc, a_bufs, b_bufs, parts, full, tile.index(0), tile.index(1),
                    blocks_ptr, tiles_n, gl.cdiv(K, BLOCK_K), 2 * N, N, True, 128, GROUP_M,
                ),
            ),
            (
                _gate,
                (
                    h_ptr, gate_ptr, gate_desc, up_desc, parts, tile.index(0), tile.index(1),
                    blocks_ptr, N, tiles_n, FUNCTION, GROUP_M, ROWS,
                ),
            ),
        ],
        [4],
        [EPILOGUE_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _load_chunk(gate_ptr, weights_ptr, chunk, place, N, layout: gl.constexpr, ROWS: gl.constexpr):
    """gate, up and the rows' weights of a chunk [ROWS, 64]; four lie beside each other."""
    row, end, n = place
    rows = row + chunk // 4 * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    cols = n * 256 + chunk % 4 * 64 + gl.arange(0, 64, gl.SliceLayout(0, layout))
    mask = (rows < end)[:, None] & (cols < N)[None, :]
    gate_ptrs = gate_ptr + rows.to(gl.int64)[:, None] * (2 * N) + cols[None, :]
    gate = gl.load(gate_ptrs, mask=mask, other=0.0)
    up = gl.load(gate_ptrs + N, mask=mask, other=0.0)
    return gate, up, gl.load(weights_ptr + rows, mask=rows < end, other=0.0)


@gluon.jit
def _place(blocks_ptr, index, num_blocks, tiles_n, GROUP_M: gl.constexpr):
    _group, row, end, n = block_at(blocks_ptr, index, num_blocks, tiles_n, GROUP_M)
    return row, end, n


@gluon.jit
def _gate_grad(
    gate_ptr, dgate_ptr, h_ptr, weights_ptr, dots_ptr, parts, tile_full, tile_empty, blocks_ptr,
    N, tiles_n, FUNCTION: gl.constexpr, SLOPE: gl.constexpr, GROUP_M: gl.constexpr,
    ROWS: gl.constexpr,
):  # fmt: skip
    """The four warps of the backward: dh comes in parts, gate and up from memory.

    While one chunk is worked on, the next one's gate and up are on their way to registers.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    PARTS_M: gl.constexpr = parts.shape[1] // ROWS
    CHUNKS: gl.constexpr = 4 * PARTS_M
    dh_bufs = parts._reinterpret(parts.dtype, [CHUNKS, ROWS, 64], parts.layout)
    num_blocks = gl.load(blocks_ptr)
    tiles = num_blocks * tiles_n
    row, end, n = _place(blocks_ptr, gl.program_id(0), num_blocks, tiles_n, GROUP_M)
    gate, up, weight = _load_chunk(gate_ptr, weights_ptr, 0, (row, end, n), N, layout, ROWS)
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        later_row, later_end, later_n = _place(
            blocks_ptr, index + gl.num_programs(0), num_blocks, tiles_n, GROUP_M
        )
        mbarrier.wait(tile_full, index // gl.num_programs(0) & 1)
        dots = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, layout))
        for c in range(CHUNKS):
            last = c == CHUNKS - 1
            place = (
                gl.where(last, later_row, row), gl.where(last, later_end, end),
                gl.where(last, later_n, n),
            )  # fmt: skip
            next_gate, next_up, next_weight = _load_chunk(
                gate_ptr, weights_ptr, (c + 1) % CHUNKS, place, N, layout, ROWS
            )
            gate, up = gate.to(gl.float32), up.to(gl.float32)
            dh = dh_bufs.index(c % 4 * PARTS_M + c // 4).load(layout).to(gl.float32)
            f = FUNCTION(gate)
            h = f * up
            first, col = row + c // 4 * ROWS, n * 256 + c % 4 * 64
            if dots_ptr is not None:
                dots = gl.where(c % 4 == 0, 0.0, dots) + gl.sum(dh * h, axis=1)
                rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
                dots_ptrs = dots_ptr + rows.to(gl.int64) * tiles_n + n
                gl.store(dots_ptrs, dots, mask=(rows < end) & (c % 4 == 3))
            dh = dh * weight[:, None]
            if dgate_ptr is not None:
                dgate = (dh * up * SLOPE(gate)).to(parts.dtype)
                store_chunk(dgate_ptr, dgate, first, col, end, N, 2 * N, layout)
                dup = (dh * f).to(parts.dtype)
                store_chunk(dgate_ptr + N, dup, first, col, end, N, 2 * N, layout)
            if h_ptr is not None:
                h = (h * weight[:, None]).to(parts.dtype)
                store_chunk(h_ptr, h, first, col, end, N, N, layout)
            gate, up, weight = next_gate, next_up, next_weight
        mbarrier.arrive(tile_empty)
        row, end, n = later_row, later_end, later_n


@gluon.jit
def expert_gate_up_grad_hopper_kernel(
    dy_desc, w_desc, gate_ptr, dgate_ptr, h_ptr, weights_ptr, dots_ptr, blocks_ptr, N, K,
    FUNCTION: gl.constexpr, SLOPE: gl.constexpr, EPILOGUE_REGISTERS: gl.constexpr,
    BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """`expert_gate_up_grad_kernel` with a division of labour.

    dy is [rows, K] in the experts' order, w [experts, K, N].
    """
    tiles_n = gl.cdiv(N, 256)
    B_SHAPE: gl.constexpr = [BLOCK_K, 256]
    b_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(B_SHAPE, dy_desc.dtype)
    a_bufs, b_bufs, parts = buffers(dy_desc, [128, BLOCK_K], B_SHAPE, b_layout, STAGES)
    full, tile = barriers(STAGES, 1), barriers(2, 1)
    gl.warp_specialize(
        [
            (
                multiply_rows,
                (
                    dy_desc, w_desc, a_bufs, b_bufs, parts, full, tile.index(0), tile.index(1),
                    blocks_ptr, tiles_n, gl.cdiv(K, BLOCK_K), 0, 0, False, 256, GROUP_M,
                ),
            ),
            (
                _gate_grad,
                (
                    gate_ptr, dgate_ptr, h_ptr, weights_ptr, dots_ptr, parts, tile.index(0),
                    tile.index(1), blocks_ptr, N, tiles_n, FUNCTION, SLOPE, GROUP_M, ROWS,
                ),
            ),
        ],
        [4],
        [EPILOGUE_REGISTERS],
    )  # fmt: skip
