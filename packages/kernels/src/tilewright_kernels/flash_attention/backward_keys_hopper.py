# What Gluon's decorators and annotations say of themselves is not what they do.
# pyrefly: ignore-errors
"""The gradients of k and v for Hopper, in Gluon: backward_keys.py with a division of labour.

    s = k · qᵀ      dp = v · doutᵀ - delta      dv += p · dout      dk += (p · dp) · q

as keys by queries. As in forward_hopper.py one warp does nothing but fetch, a program takes one
tile of 128 keys after another, and two warpgroups have 64 keys each. They share the queries that
come by, and each leaves out those that none of its own keys is seen by.

Left to `backward_keys`: heads wider than 128 or narrower than 40, 64 queries or fewer, float32,
dropout, tensors that no descriptor fits, and 2³¹ rows of scratch memory or more. dq is another
kernel's: backward_hopper.py has it among its products.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tilewright_kernels._hopper import barriers
from tilewright_kernels._launch import cdiv, num_programs
from tilewright_kernels.flash_attention.backward_problem import Problem
from tilewright_kernels.flash_attention.backward_tiles import (
    SCRATCH_ROWS,
    score_scales,
    scratch_row,
)
from tilewright_kernels.flash_attention.hopper_backward_tiles import shown, weights
from tilewright_kernels.flash_attention.hopper_tasks import (
    FLAGS,
    GROUPS,
    ROWS,
    clear_rows,
    describe,
    describe_vector,
    following,
    load,
    meet,
    message_room,
    next_task,
    place_of,
    tell,
    told,
    write_rows,
)
from tilewright_kernels.flash_attention.masks import query_blocks, shift_of
from tilewright_kernels.flash_attention.operands import strides
from tilewright_kernels.flash_attention.sequence_rows import sequence
from tilewright_kernels.flash_attention.tiles import heads_together, hopper_width

BLOCK_M, STAGES = 64, {64: 6, 128: 4}
"""Queries of a tile, and how many tiles of them there is room for, by head dimension."""


@gluon.jit
def _blocks_of(
    first, count, batch, shape, BOTTOM_RIGHT: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """Where the sequence lies, its shift, and the blocks of queries that see keys first …."""
    len_q, len_k, left, right, cu_q_ptr, cu_k_ptr = shape[2:8]
    place = sequence(batch, len_q, len_k, cu_q_ptr, cu_k_ptr)
    _, _, len_q, _, len_k = place
    shift = shift_of(len_q, len_k, BOTTOM_RIGHT)
    last = gl.minimum(first + count, len_k) - 1
    blocks = query_blocks(first, last, len_q, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M)
    return place, shift, blocks


@gluon.jit
def _fetch(
    q_desc, k_desc, v_desc, dout_desc, lse2_desc, minus_delta_desc, bufs, bars, message,
    counter_ptr, tasks, shape, rows_per_head, GROUP: gl.constexpr, BOTTOM_RIGHT: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """The one warp that fetches: keys and values of each tile, and a ring of queries."""
    k_bufs, v_bufs, q_bufs, dout_bufs, lse2_bufs, minus_delta_bufs = bufs
    k_full, k_empty, v_full, v_empty, full, empty, _met, message_bars = bars
    STAGES: gl.constexpr = q_bufs.shape[0]
    BLOCK_M: gl.constexpr = q_bufs.shape[1]
    rows: gl.constexpr = [1, 1, BLOCK_M, q_bufs.shape[2]]
    turn, step, task = 0, 0, gl.program_id(0)
    while task < tasks:
        tile, batch, kv_head = _place(task, shape)
        first = tile * (GROUPS * ROWS)
        place, _, blocks = _blocks_of(
            first, GROUPS * ROWS, batch, shape, BOTTOM_RIGHT, HAS_LEFT, HAS_RIGHT, BLOCK_M
        )
        index, first_q, _, first_k, len_k = place
        begin, _, _, end = blocks
        if first < len_k:
            tell(tile, batch, kv_head, message, message_bars, turn)
            first_scratch = scratch_row(
                batch,
                kv_head * GROUP,
                shape[1] * GROUP,
                first_q,
                rows_per_head,
                PACKED,
                SCRATCH_ROWS,
            ).to(gl.int32)  # as TMA counts, and `launch_backward` sees to
            steps = (end - begin) // BLOCK_M * GROUP
            row, head, scratch = begin, kv_head * GROUP, first_scratch
            for n in range(steps + 1):
                # The keys second: the buffers of the last tile's are in use until its end.
                if n == gl.minimum(steps, 1):
                    for i in gl.static_range(GROUPS):
                        key, slot = first_k + first + i * ROWS, turn * GROUPS + i
                        load(k_desc, k_bufs, k_full, k_empty, slot, index, kv_head, key)
                        load(v_desc, v_bufs, v_full, v_empty, slot, index, kv_head, key)
                if n < steps:
                    slot = step % STAGES
                    bar = full.index(slot)
                    mbarrier.wait(empty.index(slot), step // STAGES & 1 ^ 1)
                    mbarrier.expect(bar, 4 * BLOCK_M * (q_bufs.shape[2] + 2))
                    at = [index, head, first_q + row, 0]
                    q = q_bufs.index(slot)._reinterpret(q_desc.dtype, rows, q_desc.layout)
                    tma.async_copy_global_to_shared(q_desc, at, bar, q)
                    dout = dout_bufs.index(slot)._reinterpret(q_desc.dtype, rows, q_desc.layout)
                    tma.async_copy_global_to_shared(dout_desc, at, bar, dout)
                    at = [scratch + row]
                    lse2, minus_delta = lse2_bufs.index(slot), minus_delta_bufs.index(slot)
                    tma.async_copy_global_to_shared(lse2_desc, at, bar, lse2)
                    tma.async_copy_global_to_shared(minus_delta_desc, at, bar, minus_delta)
                    step += 1
                    row, head, scratch = following(
                        row, head, scratch, begin, end, rows_per_head, GROUP, BLOCK_M
                    )
            turn += 1
        task = next_task(counter_ptr, tasks)
    tell(-1, 0, 0, message, message_bars, turn)


@gluon.jit
def _place(task, shape):
    """(tile, sequence, key head), the first keys first: under a causal mask most see them."""
    batches, kv_heads, _, len_k = shape[:4]
    by_keys = batches, kv_heads, len_k, 0, 0, 0, 0, 0, shape[8]
    tile, batch, kv_head = place_of(task, by_keys)
    return gl.cdiv(len_k, GROUPS * ROWS) - 1 - tile, batch, kv_head


@gluon.jit
def _multiply(
    WHICH: gl.constexpr, dk_ptr, dv_ptr, bufs, bars, message, shape, dk_strides, dv_strides,
    scale, softcap, CAP: gl.constexpr, GROUP: gl.constexpr, BOTTOM_RIGHT: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, PACKED: gl.constexpr,
    D: gl.constexpr, D_V: gl.constexpr,
):  # fmt: skip
    """A warpgroup: keys WHICH · 64 … of each tile."""
    k_bufs, v_bufs, q_bufs, dout_bufs, lse2_bufs, minus_delta_bufs = bufs
    k_full, k_empty, v_full, v_empty, full, empty, met, message_bars = bars
    left, right = shape[4], shape[5]
    dtype: gl.constexpr = q_bufs.dtype
    STAGES: gl.constexpr = q_bufs.shape[0]
    BLOCK_M: gl.constexpr = q_bufs.shape[1]
    BLOCK_D: gl.constexpr = q_bufs.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, dk_layout, 2)
    of_query: gl.constexpr = gl.SliceLayout(0, s_layout)
    zeros = gl.zeros((ROWS, BLOCK_M), gl.float32, s_layout)
    inner, outer = score_scales(scale, softcap, CAP)
    k, v = k_bufs.index(WHICH), v_bufs.index(WHICH)
    turn, step, meetings = 0, 0, 0
    tile, batch, kv_head = told(message, message_bars, turn)
    while tile >= 0:
        first = tile * (GROUPS * ROWS)
        place, shift, blocks = _blocks_of(
            first, GROUPS * ROWS, batch, shape, BOTTOM_RIGHT, HAS_LEFT, HAS_RIGHT, BLOCK_M
        )
        len_q, len_k = place[2], place[4]
        begin, _, _, end = blocks
        first += WHICH * ROWS
        _, _, blocks = _blocks_of(
            first, ROWS, batch, shape, BOTTOM_RIGHT, HAS_LEFT, HAS_RIGHT, BLOCK_M
        )
        own_begin, full_begin, full_end, own_end = blocks
        dk = gl.zeros((ROWS, BLOCK_D), gl.float32, dk_layout)
        dv = gl.zeros((ROWS, BLOCK_D), gl.float32, dk_layout)
        mbarrier.wait(k_full.index(WHICH), turn & 1)
        mbarrier.wait(v_full.index(WHICH), turn & 1)
        row = begin
        steps = (end - begin) // BLOCK_M * GROUP
        last = steps - 1 - (end - own_end) // BLOCK_M if own_begin < own_end else -1
        if last < 0:
            mbarrier.arrive(k_empty.index(WHICH))
            mbarrier.arrive(v_empty.index(WHICH))
        for n in range(steps):
            slot = step % STAGES
            q, dout = q_bufs.index(slot), dout_bufs.index(slot)
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            if PACKED and row + BLOCK_M > len_q:
                clear_rows(WHICH, q, len_q - row)
                clear_rows(WHICH, dout, len_q - row)
                meetings = meet(met.index(0), meetings)
            if (row >= own_begin) & (row < own_end):
                s = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
                dp = warpgroup_mma(v, dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
                lse2 = lse2_bufs.index(slot).load(of_query)[None, :]
                s = warpgroup_mma_wait(1, deps=(s,))
                if n == last:
                    mbarrier.arrive(k_empty.index(WHICH))
                t = shown(
                    s, lse2, inner, (row < full_begin) | (row >= full_end), first, row, len_k,
                    shift, (left, right), CAP, HAS_LEFT, HAS_RIGHT, True,
                )  # fmt: skip
                p, ds = weights(t, lse2, outer, CAP)
                p = gl.convert_layout(p.to(dtype), operand)
                dv = warpgroup_mma(p, dout, dv, is_async=True)
                minus_delta = minus_delta_bufs.index(slot).load(of_query)[None, :]
                dp = warpgroup_mma_wait(1, deps=(dp,))
                if n == last:
                    mbarrier.arrive(v_empty.index(WHICH))
                ds = gl.convert_layout((ds * (dp + minus_delta)).to(dtype), operand)
                dk = warpgroup_mma(ds, q, dk, is_async=True)
                dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
            mbarrier.arrive(empty.index(slot))
            step += 1
            row += BLOCK_M
            row = gl.where(row == end, begin, row)
        index, first_k = place[0], place[3]
        write_rows(dk * scale, dk_ptr, dk_strides, index, kv_head, first_k, first, len_k, D)
        write_rows(dv, dv_ptr, dv_strides, index, kv_head, first_k, first, len_k, D_V)
        turn += 1
        tile, batch, kv_head = told(message, message_bars, turn)


@gluon.jit(
    do_not_specialize=[
        "batches", "kv_heads", "len_q", "len_k", "left", "right", "together",
    ]
)  # fmt: skip
def attention_backward_keys_hopper_kernel(
    q_desc, k_desc, v_desc, dout_desc, lse2_desc, minus_delta_desc, dk_ptr, dv_ptr, counter_ptr,
    cu_q_ptr, cu_k_ptr, scale, softcap, batches, kv_heads, len_q, len_k, left, right, together,
    rows_per_head, dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head,
    CAP: gl.constexpr, GROUP: gl.constexpr, BOTTOM_RIGHT: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, D: gl.constexpr, D_V: gl.constexpr, STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """dk and dv of tiles of 128 keys of one key head; see `attention_forward_hopper_kernel`."""
    dtype: gl.constexpr = q_desc.dtype
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[2]
    BLOCK_D: gl.constexpr = q_desc.block_type.shape[3]
    PACKED: gl.constexpr = gl.constexpr(cu_q_ptr is not None)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_D], dtype)
    bufs = (
        gl.allocate_shared_memory(dtype, [GROUPS, ROWS, BLOCK_D], layout),
        gl.allocate_shared_memory(dtype, [GROUPS, ROWS, BLOCK_D], layout),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], layout),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], lse2_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], lse2_desc.layout),
    )
    message, message_bars = message_room()
    bars = (
        barriers(GROUPS, 1), barriers(GROUPS, 1), barriers(GROUPS, 1), barriers(GROUPS, 1),
        barriers(STAGES, 1), barriers(STAGES, GROUPS), barriers(1, GROUPS), message_bars,
    )  # fmt: skip
    shape = batches, kv_heads, len_q, len_k, left, right, cu_q_ptr, cu_k_ptr, together
    dk_strides, dv_strides = (dk_batch, dk_row, dk_head), (dv_batch, dv_row, dv_head)
    tasks = gl.cdiv(len_k, GROUPS * ROWS) * kv_heads * batches
    # More registers for those that multiply than in the other kernels: half of the spills of the
    # loop are gone, which is 4 to 5 % of the whole backward at D = 128. Who fetches needs few.
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0, dk_ptr, dv_ptr, bufs, bars, message, shape, dk_strides, dv_strides, scale,
                    softcap, CAP, GROUP, BOTTOM_RIGHT, HAS_LEFT, HAS_RIGHT, PACKED, D, D_V,
                ),
            ),
            (
                _multiply,
                (
                    1, dk_ptr, dv_ptr, bufs, bars, message, shape, dk_strides, dv_strides, scale,
                    softcap, CAP, GROUP, BOTTOM_RIGHT, HAS_LEFT, HAS_RIGHT, PACKED, D, D_V,
                ),
            ),
            (
                _fetch,
                (
                    q_desc, k_desc, v_desc, dout_desc, lse2_desc, minus_delta_desc, bufs, bars,
                    message, counter_ptr, tasks, shape, rows_per_head, GROUP, BOTTOM_RIGHT,
                    HAS_LEFT, HAS_RIGHT, PACKED,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def launch_backward_keys_hopper(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dk: Tensor, dv: Tensor,
    counter: Tensor,
) -> None:  # fmt: skip
    """Write dk and dv.

    Args:
        problem: whose lse2 and minus_delta are there.
        q: [B, T_q, H, D], packed ones with B = 1; like all others with adjacent columns.
        k: [B, T_k, K, D].
        v: [B, T_k, K, D_v].
        dout: [B, T_q, H, D_v].
        dk: like k.
        dv: like v.
        counter: int32 that is 0, of tiles.
    """
    (len_q, len_k), kv_heads = problem.lengths, problem.kv_heads
    width, group = hopper_width(q, v), problem.flags["GROUP"]
    bytes_per_head = len_q * group * (q.shape[3] + v.shape[3]) * q.element_size()
    together = heads_together(bytes_per_head, kv_heads * problem.batch)
    tasks = cdiv(len_k, GROUPS.value * ROWS.value) * kv_heads * problem.batch
    programs = num_programs(q.device, per_sm=1)
    problem.operator.launch(
        attention_backward_keys_hopper_kernel, (min(tasks, programs),),
        describe(q, BLOCK_M, width), describe(k, ROWS.value, width),
        describe(v, ROWS.value, width), describe(dout, BLOCK_M, width),
        describe_vector(problem.lse2, BLOCK_M), describe_vector(problem.minus_delta, BLOCK_M),
        dk, dv, counter if tasks > programs else None, problem.cu_seqlens_q,
        problem.cu_seqlens_k, problem.scale, problem.softcap, problem.batch, kv_heads,
        len_q, len_k, *problem.mask.window, together, problem.rows_per_head, *strides(dk, dv),
        **problem.constants(*FLAGS),
        D=q.shape[3], D_V=v.shape[3], STAGES=STAGES[width], num_warps=4, maxnreg=168,
    )  # fmt: skip
