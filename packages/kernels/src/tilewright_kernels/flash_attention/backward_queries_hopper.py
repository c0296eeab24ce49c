# What Gluon's decorators and annotations say of themselves is not what they do.
# pyrefly: ignore-errors
"""The gradient of q for Hopper, in Gluon: backward_queries.py with a division of labour.

    s = q · kᵀ      dp = dout · vᵀ      ds = p · (dp - delta)      dq += ds · k

As in forward_hopper.py one warp does nothing but fetch, two warpgroups have 64 queries each, and a
program takes one tile of 128 queries after another. dp is multiplied while exponentials are taken
of s, dq while s of the next keys is; for the rest one warpgroup multiplies while the other does
arithmetic. Nothing is added up in memory: the same bits in every run.

The kernel of the keys runs afterwards, and finds lse2 and -delta in scratch memory.

Left to `backward_queries`: heads wider than 128 or narrower than 40, 64 queries or fewer, float32,
dropout, tensors that no descriptor fits, and 2³¹ rows of scratch memory or more.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tilewright_kernels._hopper import barriers
from tilewright_kernels._launch import cdiv, num_programs
from tilewright_kernels.flash_attention.backward_problem import Problem
from tilewright_kernels.flash_attention.backward_rows import row_terms
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
    blocks_of,
    clear_rows,
    describe,
    load,
    meet,
    message_room,
    next_task,
    place_of,
    tell,
    told,
    write_rows,
)
from tilewright_kernels.flash_attention.masks import key_blocks
from tilewright_kernels.flash_attention.operands import strides, strides_of
from tilewright_kernels.flash_attention.sequence_rows import sequence
from tilewright_kernels.flash_attention.tiles import heads_together, hopper_width

BLOCK_N, STAGES = {64: 128, 128: 64}, 4
"""Keys of a tile by its width, and how many tiles of keys and of values there is room for."""

LATE = {64: True, 128: False}
"""Width -> whether dp is started when dq is there, not before: dp takes its registers."""


@gluon.jit
def _fetch(
    q_desc, k_desc, v_desc, dout_desc, bufs, bars, message, counter_ptr, tasks, shape,
    GROUP: gl.constexpr, BOTTOM_RIGHT: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """The one warp that fetches: q and dout of each tile, and a ring of keys and one of values."""
    q_bufs, dout_bufs, k_bufs, v_bufs = bufs
    (
        q_full, q_empty, dout_full, dout_empty, k_full, k_empty, v_full, v_empty,
        _met, message_bars,
    ) = bars  # fmt: skip
    BLOCK_N: gl.constexpr = k_bufs.shape[1]
    turn, step, task = 0, 0, gl.program_id(0)
    while task < tasks:
        tile, batch, head = place_of(task, shape)
        place, first, _, blocks = blocks_of(
            tile, batch, shape, BOTTOM_RIGHT, HAS_LEFT, HAS_RIGHT, BLOCK_N
        )
        index, first_q, len_q, first_k, _ = place
        begin, _, _, end = blocks
        if first < len_q:
            tell(tile, batch, head, message, message_bars, turn)
            kv_head = head // GROUP
            for i in gl.static_range(GROUPS):
                row, slot = first_q + first + i * ROWS, turn * GROUPS + i
                load(q_desc, q_bufs, q_full, q_empty, slot, index, head, row)
            # dout is in use for longer than q. What is wanted after it waits for the least.
            load(k_desc, k_bufs, k_full, k_empty, step, index, kv_head, first_k + begin)
            load(v_desc, v_bufs, v_full, v_empty, step, index, kv_head, first_k + begin)
            for i in gl.static_range(GROUPS):
                row, slot = first_q + first + i * ROWS, turn * GROUPS + i
                load(dout_desc, dout_bufs, dout_full, dout_empty, slot, index, head, row)
            step += 1
            for j in range(begin + BLOCK_N, end, BLOCK_N):
                load(k_desc, k_bufs, k_full, k_empty, step, index, kv_head, first_k + j)
                load(v_desc, v_bufs, v_full, v_empty, step, index, kv_head, first_k + j)
                step += 1
            turn += 1
        task = next_task(counter_ptr, tasks)
    tell(-1, 0, 0, message, message_bars, turn)


@gluon.jit
def _load_out(
    tile, batch, head, out_ptr, strides, shape, WHICH: gl.constexpr, D_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
):  # fmt: skip
    """The warpgroup's rows of out, of a tile that there may not be."""
    batch_stride, row_stride, head_stride = strides
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    index, first_q, len_q, _, _ = sequence(batch, shape[2], shape[3], shape[6], shape[7])
    rows = tile * (GROUPS * ROWS) + WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    cols = gl.arange(0, BLOCK_D, gl.SliceLayout(0, layout))[None, :]
    there = (rows >= 0) & (rows < len_q)
    out_ptr += index.to(gl.int64) * batch_stride + head.to(gl.int64) * head_stride
    at = out_ptr + (first_q + rows).to(gl.int64)[:, None] * row_stride + cols
    return gl.load(at, mask=there[:, None] & (cols < D_V), other=0.0)


@gluon.jit
def _row_terms(
    out, dout, pointers, strides, place, batch, head, heads, first, rows_per_head,
    PACKED: gl.constexpr, rows_of: gl.constexpr,
):  # fmt: skip
    """`row_terms` of a warpgroup's rows, for itself and for the kernel of the keys."""
    _, lse_ptr, dlse_ptr, lse2_ptr, minus_delta_ptr = pointers
    _, lse_strides, dlse_strides = strides
    index, first_q, len_q, _, _ = place
    layout: gl.constexpr = out.type.layout
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    lse2, minus_delta = row_terms(
        out, dout.load(layout), lse_ptr, dlse_ptr, index, head, first_q, rows, len_q,
        lse_strides, dlse_strides, gl.float32,
    )  # fmt: skip
    to = scratch_row(batch, head, heads, first_q, rows_per_head, PACKED, SCRATCH_ROWS) + rows
    gl.store(lse2_ptr + to, lse2)
    gl.store(minus_delta_ptr + to, minus_delta)
    lse2 = gl.convert_layout(lse2, rows_of)[:, None]
    return lse2, gl.convert_layout(minus_delta, rows_of)[:, None]


@gluon.jit
def _pass_over(count, step, k_full, k_empty, v_full, v_empty):
    """Leave the next tiles of keys to the other warpgroup."""
    STAGES: gl.constexpr = k_full.shape[0]
    for _ in range(count):
        slot, phase = step % STAGES, step // STAGES & 1
        mbarrier.wait(k_full.index(slot), phase)
        mbarrier.arrive(k_empty.index(slot))
        mbarrier.wait(v_full.index(slot), phase)
        mbarrier.arrive(v_empty.index(slot))
        step += 1
    return step


@gluon.jit
def _clear_last(WHICH: gl.constexpr, k, v, rows, met, meetings):
    """Clear what lies after a sequence in its last tile of keys and of values."""
    clear_rows(WHICH, k, rows)
    clear_rows(WHICH, v, rows)
    return meet(met.index(0), meetings)


@gluon.jit
def _multiply(
    WHICH: gl.constexpr, pointers, dq_ptr, bufs, bars, message, shape, strides, dq_strides,
    rows_per_head, scale, softcap, CAP: gl.constexpr, BOTTOM_RIGHT: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, D: gl.constexpr, D_V: gl.constexpr,
    LATE: gl.constexpr,
):  # fmt: skip
    """A warpgroup: rows WHICH · 64 … of each tile."""
    q_bufs, dout_bufs, k_bufs, v_bufs = bufs
    (
        q_full, q_empty, dout_full, dout_empty, k_full, k_empty, v_full, v_empty,
        met, message_bars,
    ) = bars  # fmt: skip
    heads = shape[1]
    window = shape[4], shape[5]
    dtype: gl.constexpr = k_bufs.dtype
    STAGES: gl.constexpr = k_bufs.shape[0]
    BLOCK_N: gl.constexpr = k_bufs.shape[1]
    BLOCK_D: gl.constexpr = k_bufs.shape[2]
    PACKED: gl.constexpr = gl.constexpr(shape[6] is not None)
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, dq_layout, 2)
    rows_of: gl.constexpr = gl.SliceLayout(1, s_layout)
    zeros = gl.zeros((ROWS, BLOCK_N), gl.float32, s_layout)
    inner, outer = score_scales(scale, softcap, CAP)
    q, dout = q_bufs.index(WHICH), dout_bufs.index(WHICH)
    turn, step, meetings = 0, 0, 0
    tile, batch, head = told(message, message_bars, turn)
    out_strides = strides[0]
    out = _load_out(tile, batch, head, pointers[0], out_strides, shape, WHICH, D_V, BLOCK_D)
    while tile >= 0:
        place, first, shift, blocks = blocks_of(
            tile, batch, shape, BOTTOM_RIGHT, HAS_LEFT, HAS_RIGHT, BLOCK_N
        )
        len_k = place[4]
        begin, _, _, end = blocks
        first += WHICH * ROWS
        blocks = key_blocks(
            first, gl.minimum(first + ROWS, place[2]) - 1, len_k, shift, shape[4], shape[5],
            HAS_LEFT, HAS_RIGHT, BLOCK_N,
        )  # fmt: skip
        # Of its own at least one block, be it all hidden.
        own_begin = gl.minimum(gl.maximum(blocks[0], begin), end - BLOCK_N)
        own_end = gl.minimum(gl.maximum(blocks[3], own_begin + BLOCK_N), end)
        step = _pass_over((own_begin - begin) // BLOCK_N, step, k_full, k_empty, v_full, v_empty)
        slot, phase = step % STAGES, step // STAGES & 1
        mbarrier.wait(q_full.index(WHICH), turn & 1)
        mbarrier.wait(k_full.index(slot), phase)
        k, v = k_bufs.index(slot), v_bufs.index(slot)
        s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(dout_full.index(WHICH), turn & 1)
        lse2, minus_delta = _row_terms(
            out, dout, pointers, strides, place, batch, head, heads, first, rows_per_head, PACKED,
            rows_of,
        )  # fmt: skip
        mbarrier.wait(v_full.index(slot), phase)
        if PACKED and own_begin + BLOCK_N > len_k:
            meetings = _clear_last(WHICH, k, v, len_k - own_begin, met, meetings)
        dp = warpgroup_mma(dout, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        if own_begin + BLOCK_N >= own_end:
            mbarrier.arrive(q_empty.index(WHICH))
        t = shown(
            s, lse2, inner, (own_begin < blocks[1]) | (own_begin >= blocks[2]), first, own_begin,
            len_k, shift, window, CAP, HAS_LEFT, HAS_RIGHT, False,
        )  # fmt: skip
        dp = warpgroup_mma_wait(0, deps=(dp,))
        mbarrier.arrive(v_empty.index(slot))
        _, ds = weights(t, lse2, outer, CAP)
        ds = gl.convert_layout((ds * (dp + minus_delta)).to(dtype), ds_layout)
        dq = gl.zeros((ROWS, BLOCK_D), gl.float32, dq_layout)
        for j in range(own_begin + BLOCK_N, own_end, BLOCK_N):
            before, slot, phase = step % STAGES, (step + 1) % STAGES, (step + 1) // STAGES & 1
            k, v = k_bufs.index(slot), v_bufs.index(slot)
            mbarrier.wait(k_full.index(slot), phase)
            s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
            dq = warpgroup_mma(ds, k_bufs.index(before), dq, is_async=True)
            if not LATE:
                mbarrier.wait(v_full.index(slot), phase)
            if LATE:
                s, dq = warpgroup_mma_wait(0, deps=(s, dq))
                mbarrier.arrive(k_empty.index(before))
                mbarrier.wait(v_full.index(slot), phase)
            if PACKED and j + BLOCK_N > len_k:
                meetings = _clear_last(WHICH, k, v, len_k - j, met, meetings)
            dp = warpgroup_mma(dout, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
            if not LATE:
                s = warpgroup_mma_wait(2, deps=(s,))
            if j + BLOCK_N >= own_end:
                mbarrier.arrive(q_empty.index(WHICH))
            t = shown(
                s, lse2, inner, (j < blocks[1]) | (j >= blocks[2]), first, j, len_k, shift,
                window, CAP, HAS_LEFT, HAS_RIGHT, False,
            )  # fmt: skip
            if not LATE:
                dq = warpgroup_mma_wait(1, deps=(dq,))
                mbarrier.arrive(k_empty.index(before))
            dp = warpgroup_mma_wait(0, deps=(dp,))
            mbarrier.arrive(v_empty.index(slot))
            _, ds = weights(t, lse2, outer, CAP)
            ds = gl.convert_layout((ds * (dp + minus_delta)).to(dtype), ds_layout)
            step += 1
        mbarrier.arrive(dout_empty.index(WHICH))
        slot = step % STAGES
        dq = warpgroup_mma(ds, k_bufs.index(slot), dq, is_async=True)
        turn += 1
        tile, next_batch, next_head = told(message, message_bars, turn)
        # Here nothing else takes registers, and it is long on its way.
        out = _load_out(
            tile, next_batch, next_head, pointers[0], out_strides, shape, WHICH, D_V, BLOCK_D
        )
        dq = warpgroup_mma_wait(0, deps=(dq,))
        mbarrier.arrive(k_empty.index(slot))
        step += 1
        if PACKED and (own_end < end) & (end > len_k):
            step = _pass_over(
                (end - own_end) // BLOCK_N - 1, step, k_full, k_empty, v_full, v_empty
            )
            slot, phase = step % STAGES, step // STAGES & 1
            mbarrier.wait(k_full.index(slot), phase)
            mbarrier.wait(v_full.index(slot), phase)
            k, v = k_bufs.index(slot), v_bufs.index(slot)
            meetings = _clear_last(WHICH, k, v, len_k - (end - BLOCK_N), met, meetings)
            mbarrier.arrive(k_empty.index(slot))
            mbarrier.arrive(v_empty.index(slot))
            step += 1
        else:
            step = _pass_over((end - own_end) // BLOCK_N, step, k_full, k_empty, v_full, v_empty)
        write_rows(dq * scale, dq_ptr, dq_strides, place[0], head, place[1], first, place[2], D)
        batch, head = next_batch, next_head


@gluon.jit(
    do_not_specialize=[
        *("batches", "heads", "len_q", "len_k", "left", "right", "together"),
        *("lse_batch", "lse_head", "dlse_batch", "dlse_head"),
    ]
)
def attention_backward_queries_hopper_kernel(
    q_desc, k_desc, v_desc, dout_desc, out_ptr, lse_ptr, dlse_ptr, lse2_ptr, minus_delta_ptr,
    dq_ptr, counter_ptr, cu_q_ptr, cu_k_ptr, scale, softcap,
    batches, heads, len_q, len_k, left, right, together, rows_per_head,
    out_batch, out_row, out_head, dq_batch, dq_row, dq_head,
    lse_batch, lse_head, lse_row, dlse_batch, dlse_head, dlse_row,
    CAP: gl.constexpr, GROUP: gl.constexpr, BOTTOM_RIGHT: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, D: gl.constexpr, D_V: gl.constexpr, STAGES: gl.constexpr,
    LATE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """dq, and `row_terms`, of tiles of 128 queries; see `attention_forward_hopper_kernel`."""
    dtype: gl.constexpr = k_desc.dtype
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[2]
    BLOCK_D: gl.constexpr = k_desc.block_type.shape[3]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], dtype)
    bufs = (
        gl.allocate_shared_memory(dtype, [GROUPS, ROWS, BLOCK_D], layout),
        gl.allocate_shared_memory(dtype, [GROUPS, ROWS, BLOCK_D], layout),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], layout),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], layout),
    )
    message, message_bars = message_room()
    bars = (
        barriers(GROUPS, 1), barriers(GROUPS, 1), barriers(GROUPS, 1), barriers(GROUPS, 1),
        barriers(STAGES, 1), barriers(STAGES, GROUPS), barriers(STAGES, 1),
        barriers(STAGES, GROUPS), barriers(1, GROUPS), message_bars,
    )  # fmt: skip
    shape = batches, heads, len_q, len_k, left, right, cu_q_ptr, cu_k_ptr, together
    pointers = out_ptr, lse_ptr, dlse_ptr, lse2_ptr, minus_delta_ptr
    strides = (
        (out_batch, out_row, out_head), (lse_batch, lse_head, lse_row),
        (dlse_batch, dlse_head, dlse_row),
    )  # fmt: skip
    dq_strides = dq_batch, dq_row, dq_head
    tasks = gl.cdiv(len_q, GROUPS * ROWS) * heads * batches
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0, pointers, dq_ptr, bufs, bars, message, shape, strides, dq_strides,
                    rows_per_head, scale, softcap, CAP, BOTTOM_RIGHT, HAS_LEFT, HAS_RIGHT, D, D_V,
                    LATE,
                ),
            ),
            (
                _multiply,
                (
                    1, pointers, dq_ptr, bufs, bars, message, shape, strides, dq_strides,
                    rows_per_head, scale, softcap, CAP, BOTTOM_RIGHT, HAS_LEFT, HAS_RIGHT, D, D_V,
                    LATE,
                ),
            ),
            (
                _fetch,
                (
                    q_desc, k_desc, v_desc, dout_desc, bufs, bars, message, counter_ptr, tasks,
                    shape, GROUP, BOTTOM_RIGHT, HAS_LEFT, HAS_RIGHT,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def launch_backward_queries_hopper(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor,
    dlse: Tensor | None, dq: Tensor, counter: Tensor,
) -> None:  # fmt: skip
    """Write dq, and lse2 and minus_delta of the problem.

    Args:
        problem: one of these tensors.
        q: [B, T_q, H, D], packed ones with B = 1; like all others with adjacent columns.
        k: [B, T_k, K, D].
        v: [B, T_k, K, D_v].
        dout: [B, T_q, H, D_v].
        out: likewise.
        lse: [B, H, T_q], in base e.
        dlse: gradient of lse, like it, or None.
        dq: like q.
        counter: int32 that is 0, of tiles.
    """
    (len_q, len_k), heads = problem.lengths, problem.heads
    width, group = hopper_width(q, v), problem.flags["GROUP"]
    bytes_per_head = len_k * (q.shape[3] + v.shape[3]) * q.element_size()
    together = heads_together(bytes_per_head, problem.kv_heads * problem.batch) * group
    tasks = cdiv(len_q, GROUPS.value * ROWS.value) * heads * problem.batch
    programs = num_programs(q.device, per_sm=1)
    problem.operator.launch(
        attention_backward_queries_hopper_kernel, (min(tasks, programs),),
        describe(q, ROWS.value, width), describe(k, BLOCK_N[width], width),
        describe(v, BLOCK_N[width], width), describe(dout, ROWS.value, width), out, lse, dlse,
        problem.lse2, problem.minus_delta, dq, counter if tasks > programs else None,
        problem.cu_seqlens_q, problem.cu_seqlens_k, problem.scale, problem.softcap,
        problem.batch, heads, len_q, len_k, *problem.mask.window, together, problem.rows_per_head,
        *strides(out, dq), *strides_of(lse), *strides_of(dlse), **problem.constants(*FLAGS),
        D=q.shape[3], D_V=v.shape[3], STAGES=STAGES, LATE=LATE[width], num_warps=4, maxnreg=168,
    )  # fmt: skip
