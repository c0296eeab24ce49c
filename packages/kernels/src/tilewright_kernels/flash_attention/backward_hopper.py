# What Gluon's decorators and annotations say of themselves is not what they do.
# pyrefly: ignore-errors
"""The backward for Hopper, in Gluon: five products, and the tensor cores always have the next one.

    s = k · qᵀ     dp = v · doutᵀ - delta     dv += p · dout     dk += ds · q     dq = dsᵀ · k

as keys by queries. backward_keys.py computes the same where it adds dq up, but waits for each
product before it goes on. Here dq of the last queries, s and dp are started at once, and while
exponentials are taken of s and dq is added to memory, dp is multiplied; while p · dp is taken, dv;
while ds goes to shared memory, dk (FlashAttention-3, Shah et al. 2024, arXiv:2407.08608).

dq is added up in float32, atomically and so in no fixed order, in sums whose elements lie as the
tensor cores leave them: each warp adds 512 adjacent bytes at a time. `attention_backward_unpack`
puts them in order.

Left to the other kernels: heads wider than 64, for whose tiles the registers do not suffice, heads
narrower than 40, 64 queries or fewer, float32, dropout, tensors that no descriptor fits, and 2³¹
rows of scratch memory or more.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from tilewright_kernels._launch import cdiv
from tilewright_kernels.flash_attention.backward_problem import Problem
from tilewright_kernels.flash_attention.backward_tiles import (
    SCRATCH_ROWS,
    score_scales,
    scratch_row,
)
from tilewright_kernels.flash_attention.hopper_backward_tiles import shown, weights
from tilewright_kernels.flash_attention.hopper_tasks import (
    FLAGS,
    describe,
    describe_vector,
    following,
    write_rows,
)
from tilewright_kernels.flash_attention.masks import query_blocks, shift_of
from tilewright_kernels.flash_attention.operands import strides
from tilewright_kernels.flash_attention.sequence_rows import sequence
from tilewright_kernels.flash_attention.tiles import heads_together

BLOCK_M, BLOCK_N, STAGES = 64, 128, 3


@gluon.jit
def _copy(desc, bar, buffer, index, head, row, pred):
    """Start a copy of rows of one head."""
    shape: gl.constexpr = [1, 1, buffer.shape[0], buffer.shape[1]]
    buffer = buffer._reinterpret(desc.dtype, shape, desc.layout)
    tma.async_copy_global_to_shared(desc, [index, head, row, 0], bar, buffer, pred=pred)


@gluon.jit
def _fetch(descs, bufs, full, slot, batch, head, row, scratch, pred):
    """Start the copies of BLOCK_M queries; `full` of the slot is signalled when they are there."""
    q_desc, dout_desc, lse2_desc, minus_delta_desc = descs
    q_bufs, dout_bufs, lse2_bufs, minus_delta_bufs = bufs
    bar = full.index(slot)
    mbarrier.expect(bar, 4 * q_bufs.shape[1] * (q_bufs.shape[2] + 2), pred=pred)
    _copy(q_desc, bar, q_bufs.index(slot), batch, head, row, pred)
    _copy(dout_desc, bar, dout_bufs.index(slot), batch, head, row, pred)
    at = [scratch]
    tma.async_copy_global_to_shared(lse2_desc, at, bar, lse2_bufs.index(slot), pred=pred)
    tma.async_copy_global_to_shared(
        minus_delta_desc, at, bar, minus_delta_bufs.index(slot), pred=pred
    )


@gluon.jit
def _clear(buffer, count):
    """Zeros in all rows but the first `count`: there lies another sequence, and 0 · NaN is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    rows = gl.arange(0, buffer.shape[0], gl.SliceLayout(1, layout))
    x = buffer.load(layout)
    buffer.store(gl.where((rows < count)[:, None], x, 0.0))


@gluon.jit
def _clear_tail(q, dout, count, PACKED: gl.constexpr):
    """`_clear` of queries past the end of a packed sequence."""
    if PACKED and count < q.shape[0]:
        _clear(q, count)
        _clear(dout, count)
        fence_async_shared()
        gl.thread_barrier()


@gluon.jit
def _add(sums_ptr, dq):
    """sums += dq [64, 64], atomically, in the order of `attention_backward_unpack_kernel`."""
    parts = dq.reshape((4, 2, 8, 2, 4, 4, 2)).permute((0, 3, 4, 2, 5, 1, 6))
    flat = parts.reshape((64 * 64,))
    layout: gl.constexpr = flat.type.layout
    gl.atomic_add(sums_ptr + gl.arange(0, 64 * 64, layout), flat, sem="relaxed")


@gluon.jit(
    do_not_specialize=[
        "num_q", "num_k", "kv_heads", "batches", "heads_together", "left", "right",
    ]
)  # fmt: skip
def attention_backward_hopper_kernel(
    q_desc, k_desc, v_desc, dout_desc, lse2_desc, minus_delta_desc, sums_ptr, dk_ptr, dv_ptr,
    cu_q_ptr, cu_k_ptr, scale, softcap, num_q, num_k, kv_heads, batches, heads_together, left,
    right, rows_per_head, dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head,
    GROUP: gl.constexpr, BOTTOM_RIGHT: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, CAP: gl.constexpr, PACKED: gl.constexpr,
    D: gl.constexpr, D_V: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key head, and their part of dq, unscaled.

    heads_together key heads are worked on at one time, and of these the first keys are taken
    first: under a causal mask most queries see them.
    """
    dtype: gl.constexpr = q_desc.dtype
    BLOCK_D: gl.constexpr = q_desc.block_type.shape[3]
    tiles = gl.cdiv(num_k, BLOCK_N)
    first_head = gl.program_id(0) // (tiles * heads_together) * heads_together
    together = gl.minimum(kv_heads * batches - first_head, heads_together)
    within = gl.program_id(0) - first_head * tiles
    first_key = within // together * BLOCK_N
    batch = (first_head + within % together) // kv_heads
    kv_head = (first_head + within % together) % kv_heads
    index, first_q, len_q, first_k, len_k = sequence(batch, num_q, num_k, cu_q_ptr, cu_k_ptr)
    if first_key >= len_k:
        return
    shift = shift_of(len_q, len_k, BOTTOM_RIGHT)
    last_key = gl.minimum(first_key + BLOCK_N, len_k) - 1
    begin, full_begin, full_end, end = query_blocks(
        first_key, last_key, len_q, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M
    )
    if first_key + BLOCK_N > len_k:
        full_begin, full_end = end, end
    steps = (end - begin) // BLOCK_M * GROUP

    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_D], dtype)
    k = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_D], tile)
    v = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_D], tile)
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], tile)
    dout_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], tile)
    lse2_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], lse2_desc.layout)
    minus_delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], lse2_desc.layout)
    ds_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)
    ds_bufs = gl.allocate_shared_memory(dtype, [2, BLOCK_N, BLOCK_M], ds_tile)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    mbarrier.init(keys_full, count=1)
    fence_async_shared()
    gl.thread_barrier()
    descs = q_desc, dout_desc, lse2_desc, minus_delta_desc
    bufs = q_bufs, dout_bufs, lse2_bufs, minus_delta_bufs

    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_D, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_D // 2, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, dk_layout, 2)
    zeros = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, s_layout)
    dq_zeros = gl.zeros((BLOCK_M, BLOCK_D), gl.float32, dq_layout)
    dk = warpgroup_mma_init(gl.zeros((BLOCK_N, BLOCK_D), gl.float32, dk_layout))
    dv = warpgroup_mma_init(gl.zeros((BLOCK_N, BLOCK_D), gl.float32, dk_layout))
    inner, outer = score_scales(scale, softcap, CAP)
    row, head = begin, kv_head * GROUP
    scratch = scratch_row(
        batch, head, kv_heads * GROUP, first_q, rows_per_head, PACKED, SCRATCH_ROWS
    ).to(gl.int32)  # as TMA counts, and `launch_backward` sees to
    if steps > 0:
        mbarrier.expect(keys_full, 4 * BLOCK_N * BLOCK_D)
        _copy(k_desc, keys_full, k, index, kv_head, first_k + first_key, True)
        _copy(v_desc, keys_full, v, index, kv_head, first_k + first_key, True)
        _fetch(descs, bufs, full, 0, index, head, first_q + row, scratch + row, True)
        mbarrier.wait(keys_full, 0)
        if PACKED and first_key + BLOCK_N > len_k:
            _clear(k, len_k - first_key)
            _clear(v, len_k - first_key)
        # The sums of the step before, whose dq is still to be multiplied.
        sums = sums_ptr
        for step in range(steps):
            slot = step % STAGES
            q, dout = q_bufs.index(slot), dout_bufs.index(slot)
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            _clear_tail(q, dout, len_q - row, PACKED)
            s = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
            fence_async_shared()
            gl.thread_barrier()
            next_row, next_head, next_scratch = following(
                row, head, scratch, begin, end, rows_per_head, GROUP, BLOCK_M
            )
            _fetch(
                descs, bufs, full, (step + 1) % STAGES, index, next_head,
                first_q + next_row, next_scratch + next_row, step + 1 < steps,
            )  # fmt: skip
            # Before the first step this multiplies what is there, and nobody looks at it.
            dq = warpgroup_mma(
                ds_bufs.index(step + 1 & 1).permute((1, 0)), k, dq_zeros,
                use_acc=False, is_async=True,
            )  # fmt: skip
            dp = warpgroup_mma(v, dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
            lse2 = lse2_bufs.index(slot).load(gl.SliceLayout(0, s_layout))
            s, dk, dv = warpgroup_mma_wait(2, deps=(s, dk, dv))
            lse2 = lse2[None, :]
            t = shown(
                s, lse2, inner, (row < full_begin) | (row >= full_end), first_key, row, len_k,
                shift, (left, right), CAP, HAS_LEFT, HAS_RIGHT, True,
            )  # fmt: skip
            p, ds = weights(t, lse2, outer, CAP)
            dq = warpgroup_mma_wait(1, deps=(dq,))
            if step > 0:
                _add(sums, dq)
            p_operand = gl.convert_layout(p.to(dtype), operand)
            dv = warpgroup_mma(p_operand, dout, dv, is_async=True)
            minus_delta = minus_delta_bufs.index(slot).load(gl.SliceLayout(0, s_layout))
            dp = warpgroup_mma_wait(1, deps=(dp,))
            ds = (ds * (dp + minus_delta[None, :])).to(dtype)
            ds_operand = gl.convert_layout(ds, operand)
            dk = warpgroup_mma(ds_operand, q, dk, is_async=True)
            ds_bufs.index(step & 1).store(ds)
            sums = sums_ptr + (scratch + row).to(gl.int64) * BLOCK_D
            row, head, scratch = next_row, next_head, next_scratch
        fence_async_shared()
        gl.thread_barrier()
        dq = warpgroup_mma(
            ds_bufs.index(steps + 1 & 1).permute((1, 0)), k, dq_zeros, use_acc=False, is_async=True
        )
        dq = warpgroup_mma_wait(0, deps=(dq,))
        _add(sums, dq)
    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
    dk_strides, dv_strides = (dk_batch, dk_row, dk_head), (dv_batch, dv_row, dv_head)
    write_rows(dk * scale, dk_ptr, dk_strides, index, kv_head, first_k, first_key, len_k, D)
    write_rows(dv, dv_ptr, dv_strides, index, kv_head, first_k, first_key, len_k, D_V)


def launch_backward_hopper(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, sums: Tensor,
    dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Write dk and dv, and add dq to sums.

    Args:
        problem: whose lse2 and minus_delta are there.
        q: [B, T_q, H, D], packed ones with B = 1; like all others with adjacent columns.
        k: [B, T_k, K, D].
        v: [B, T_k, K, D_v].
        dout: [B, T_q, H, D_v].
        sums: [rows of scratch memory, 64] float32.
        dk: like k.
        dv: like v.
    """
    (len_q, len_k), kv_heads, width = problem.lengths, problem.kv_heads, sums.shape[1]
    bytes_per_head = len_q * problem.flags["GROUP"] * width * 8
    problem.operator.launch(
        attention_backward_hopper_kernel, (cdiv(len_k, BLOCK_N) * kv_heads * problem.batch,),
        describe(q, BLOCK_M, width), describe(k, BLOCK_N, width),
        describe(v, BLOCK_N, width), describe(dout, BLOCK_M, width),
        describe_vector(problem.lse2, BLOCK_M), describe_vector(problem.minus_delta, BLOCK_M),
        sums, dk, dv, problem.cu_seqlens_q, problem.cu_seqlens_k, problem.scale, problem.softcap,
        len_q, len_k, kv_heads, problem.batch,
        heads_together(bytes_per_head, kv_heads * problem.batch), *problem.mask.window,
        problem.rows_per_head, *strides(dk, dv), **problem.constants(*FLAGS, "PACKED"),
        D=problem.widths["D"], D_V=problem.widths["D_V"], BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        STAGES=STAGES, num_warps=8,
    )  # fmt: skip
