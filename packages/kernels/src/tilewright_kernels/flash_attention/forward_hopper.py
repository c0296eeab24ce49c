# What Gluon's decorators and annotations say of themselves is not what they do.
# pyrefly: ignore-errors
"""The forward for Hopper, in Gluon: softmax of one tile while the tensor cores are at another.

`forward` waits for each product before it goes on. Here a program has two warpgroups of 64 queries
each, and one warp more that does nothing but fetch keys and values (FlashAttention-3, Shah et al.
2024, arXiv:2407.08608). Within a warpgroup the products of step j are started together,

    S(j) = Q · K(j)ᵀ          acc += P(j - 1) · V(j - 1)

and while the second runs, exponentials are taken of what the first gave. One
warpgroup is at its exponentials while the other multiplies: by chance, or because they take turns
in starting products (TURNS).

A program stays on its multiprocessor and takes one tile of 128 queries after another, so that the
keys of the next are fetched while the last is written.

H200, bfloat16, causal, TFLOP/s; softcap is 20, window 1024 (of which only visible pairs count):

    D, T, query and key heads             here   forward.py   cuDNN
    128, 1024, 16 and 16                   418                  442
    128, 4096, 16 and 16                   615          408     581
    128, 4096, 32 and 8                    617          421     592
    128, 4096, 16 and 16, softcap          555          366
    128, 16384, 16 and 16                  694          444     630
    128, 16384, 16 and 16, window          495          331
    64, 4096, 32 and 32                    416          392     436
    128, packed documents of 8192 … 128    615          398           (torch's varlen_attn 295)

Scale and softcap are constants here, and another one compiles anew: as arguments, whose registers
are spilled, they cost 1.6 % at D = 128 without and 0.6 % with a softcap.

Left to `forward`: heads wider than 128, float32, dropout, and tensors that no descriptor fits.
"""

import torch
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
from tilewright_kernels._operator import Operator
from tilewright_kernels.flash_attention.hopper_tasks import (
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
from tilewright_kernels.flash_attention.masks import Mask, visible
from tilewright_kernels.flash_attention.online_softmax import finish_rows, scores
from tilewright_kernels.flash_attention.operands import strides
from tilewright_kernels.flash_attention.tiles import hopper_width

BLOCK_N, STAGES = 128, {64: 4, 128: 2}
"""Keys of a tile, and how many tiles of keys and of values there is room for, by head dimension."""

HIGHEST = 80.0
"""Scores in base 2 that need no maximum: 2⁸⁰ for each of 2²⁰ keys, times values, is a float32."""


@gluon.jit
def _fetch(
    q_desc, k_desc, v_desc, bufs, bars, message, counter_ptr, tasks, shape,
    GROUP: gl.constexpr, BOTTOM_RIGHT: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """The one warp that fetches: queries of each tile, and a ring of keys and one of values."""
    q_bufs, k_bufs, v_bufs = bufs
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _met, message_bars, _turn_bars = bars
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
                row = first_q + first + i * ROWS
                load(q_desc, q_bufs, q_full, q_empty, turn * GROUPS + i, index, head, row)
            # Keys before the values of the block before: that is the order they are wanted in.
            load(k_desc, k_bufs, k_full, k_empty, step, index, kv_head, first_k + begin)
            for j in range(begin, end, BLOCK_N):
                if j + BLOCK_N < end:
                    row = first_k + j + BLOCK_N
                    load(k_desc, k_bufs, k_full, k_empty, step + 1, index, kv_head, row)
                load(v_desc, v_bufs, v_full, v_empty, step, index, kv_head, first_k + j)
                step += 1
            turn += 1
        task = next_task(counter_ptr, tasks)
    tell(-1, 0, 0, message, message_bars, turn)


@gluon.jit
def _hide(s, query, j, len_k, shift, left, right, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """-inf where a query does not see a key of the block at j."""
    BLOCK_N: gl.constexpr = s.shape[1]
    key = (j + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s.type.layout)))[None, :]
    seen = visible(query[:, None], key, len_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def _weights(s, m, FACTOR: gl.constexpr, MASKED: gl.constexpr, BOUNDED: gl.constexpr):
    """`take_piece` without the sum: exp(s - m), the maxima with this block's, and alpha.

    The maximum of every sixteenth number first, which are short chains side by side. A softcap
    bounds scores: BOUNDED ones need no maximum, m stays 0, and nothing is ever rescaled.
    """
    if BOUNDED:
        p, alpha = gl.exp2(s * FACTOR), m
    else:
        largest = gl.max(gl.max(s.reshape((s.shape[0], 8, s.shape[1] // 8)), 1), 1)
        m_new = gl.maximum(m, gl.convert_layout(largest, m.type.layout) * FACTOR)
        base = m_new
        if MASKED:  # -inf - -inf is NaN
            base = gl.where(m_new == float("-inf"), 0.0, m_new)
        p = gl.exp2(s * FACTOR - base[:, None])
        alpha = gl.exp2(m - base)
        m = m_new
    return p, m, alpha


@gluon.jit
def _partial_sums(p):
    """Sums of each row over the columns that one thread holds, [rows, 4]."""
    return gl.sum(gl.sum(p.reshape((p.shape[0], p.shape[1] // 8, 4, 2)), 3), 1)


@gluon.jit
def _scaled(x, factors):
    """Rows times factors, whatever the layouts of the two."""
    return x * gl.convert_layout(factors, gl.SliceLayout(1, x.type.layout))[:, None]


@gluon.jit
def _write(
    acc, m, l, out_ptr, lse_ptr, place, head, first, out_strides, lse_strides, D_V: gl.constexpr
):
    """out and lse of a warpgroup's rows."""
    index, first_q, len_q, _, _ = place
    rows_of: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    index, head = index.to(gl.int64), head.to(gl.int64)
    acc, lse = finish_rows(gl.convert_layout(m, rows_of), gl.convert_layout(l, rows_of), acc)
    lse_batch_stride, lse_head_stride = lse_strides
    row = first + gl.arange(0, ROWS, rows_of)
    lse_ptr += index * lse_batch_stride + head * lse_head_stride
    gl.store(lse_ptr + first_q + row, lse, mask=row < len_q)
    write_rows(acc, out_ptr, out_strides, index, head, first_q, first, len_q, D_V)


@gluon.jit
def _attend(
    WHICH: gl.constexpr, out_ptr, lse_ptr, bufs, bars, message, shape, out_strides, lse_strides,
    BEFORE: gl.constexpr, FACTOR: gl.constexpr, CAP: gl.constexpr, BOUNDED: gl.constexpr,
    BOTTOM_RIGHT: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    D_V: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """A warpgroup: rows WHICH · 64 … of each tile."""
    q_bufs, k_bufs, v_bufs = bufs
    q_full, q_empty, k_full, k_empty, v_full, v_empty, met, message_bars, turn_bars = bars
    left, right = shape[4], shape[5]
    dtype: gl.constexpr = k_bufs.dtype
    STAGES: gl.constexpr = k_bufs.shape[0]
    BLOCK_N: gl.constexpr = k_bufs.shape[1]
    BLOCK_D: gl.constexpr = k_bufs.shape[2]
    PACKED: gl.constexpr = gl.constexpr(shape[6] is not None)
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    rows_of: gl.constexpr = gl.SliceLayout(1, s_layout)
    zeros = gl.zeros((ROWS, BLOCK_N), gl.float32, s_layout)
    q = q_bufs.index(WHICH)
    turn, step, rounds, meetings = 0, 0, 0, 0
    tile, batch, head = told(message, message_bars, turn)
    while tile >= 0:
        place, first, shift, blocks = blocks_of(
            tile, batch, shape, BOTTOM_RIGHT, HAS_LEFT, HAS_RIGHT, BLOCK_N
        )
        len_k = place[4]
        begin, full_begin, full_end, end = blocks
        first += WHICH * ROWS
        query = first + gl.arange(0, ROWS, rows_of)
        m = gl.full((ROWS,), 0.0 if BOUNDED else float("-inf"), gl.float32, rows_of)
        acc = gl.zeros((ROWS, BLOCK_D), gl.float32, acc_layout)

        mbarrier.wait(q_full.index(WHICH), turn & 1)
        mbarrier.wait(k_full.index(step % STAGES), step // STAGES & 1)
        k = k_bufs.index(step % STAGES).permute((1, 0))
        s = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_empty.index(step % STAGES))
        s = scores(s, BEFORE, CAP)
        if (begin < full_begin) | (begin >= full_end):
            s = _hide(s, query, begin, len_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
        weights, m, alpha = _weights(s, m, FACTOR, True, BOUNDED)
        l = _partial_sums(weights)
        p = gl.convert_layout(weights.to(dtype), p_layout)
        if begin + BLOCK_N < end:
            mbarrier.wait(k_full.index((step + 1) % STAGES), (step + 1) // STAGES & 1)

        for part in gl.static_range(3):
            if part == 0:
                part_begin, part_end = begin, full_begin
            elif part == 1:
                part_begin, part_end = full_begin, full_end
            else:
                part_begin, part_end = full_end, end
            if HAS_LEFT or part > 0:
                for j in range(gl.maximum(part_begin, begin + BLOCK_N), part_end, BLOCK_N):
                    before, now = step % STAGES, (step + 1) % STAGES
                    v_phase = step // STAGES & 1
                    step += 1
                    if TURNS:
                        mbarrier.wait(turn_bars.index(WHICH), (rounds & 1) ^ (WHICH == 0))
                        rounds += 1
                    k = k_bufs.index(now).permute((1, 0))
                    s = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
                    mbarrier.wait(v_full.index(before), v_phase)
                    acc = warpgroup_mma(p, v_bufs.index(before), acc, is_async=True)
                    if TURNS:
                        mbarrier.arrive(turn_bars.index((WHICH + 1) % GROUPS))
                    s = warpgroup_mma_wait(1, deps=(s,))
                    mbarrier.arrive(k_empty.index(now))
                    s = scores(s, BEFORE, CAP)
                    if part != 1:
                        s = _hide(s, query, j, len_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
                    weights, m, alpha = _weights(s, m, FACTOR, part != 1, BOUNDED)
                    if not BOUNDED:
                        l = _scaled(l, alpha)
                    l += _partial_sums(weights)
                    # The next block's keys. A branch, too: without one the compiler moves the wait
                    # for acc up before the exponentials, and nothing overlaps.
                    if j + BLOCK_N < end:
                        mbarrier.wait(k_full.index((step + 1) % STAGES), (step + 1) // STAGES & 1)
                    acc = warpgroup_mma_wait(0, deps=(acc,))
                    mbarrier.arrive(v_empty.index(before))
                    p = gl.convert_layout(weights.to(dtype), p_layout)
                    if not BOUNDED:
                        acc = _scaled(acc, alpha)

        mbarrier.arrive(q_empty.index(WHICH))
        slot = step % STAGES
        mbarrier.wait(v_full.index(slot), step // STAGES & 1)
        if PACKED and end > len_k:
            clear_rows(WHICH, v_bufs.index(slot), len_k - (end - BLOCK_N))
            meetings = meet(met.index(0), meetings)
        acc = warpgroup_mma(p, v_bufs.index(slot), acc, is_async=True)
        step += 1
        turn += 1
        tile, batch, next_head = told(message, message_bars, turn)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_empty.index(slot))
        _write(
            acc, m, gl.sum(l, 1), out_ptr, lse_ptr, place, head, first, out_strides, lse_strides,
            D_V,
        )  # fmt: skip
        head = next_head


@gluon.jit(
    do_not_specialize=[
        *("batches", "heads", "len_q", "len_k", "left", "right", "together"),
        *("lse_batch_stride", "lse_head_stride"),
    ]
)
def attention_forward_hopper_kernel(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, counter_ptr, cu_q_ptr, cu_k_ptr,
    batches, heads, len_q, len_k, left, right, together,
    out_batch_stride, out_row_stride, out_head_stride, lse_batch_stride, lse_head_stride,
    BEFORE: gl.constexpr, FACTOR: gl.constexpr, CAP: gl.constexpr, BOUNDED: gl.constexpr,
    GROUP: gl.constexpr, BOTTOM_RIGHT: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, D_V: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """`attention_forward_kernel` with a division of labour; lengths are those of `forward`.

    Tiles are counted in counter_ptr, which is 0 at first, or None where each program has but one.
    """
    dtype: gl.constexpr = k_desc.dtype
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[2]
    BLOCK_D: gl.constexpr = k_desc.block_type.shape[3]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], dtype)
    bufs = (
        gl.allocate_shared_memory(dtype, [GROUPS, ROWS, BLOCK_D], layout),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], layout),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], layout),
    )
    message, message_bars = message_room()
    bars = (
        barriers(GROUPS, 1), barriers(GROUPS, 1), barriers(STAGES, 1),
        barriers(STAGES, GROUPS), barriers(STAGES, 1), barriers(STAGES, GROUPS),
        barriers(1, GROUPS), message_bars, barriers(GROUPS, 1),
    )  # fmt: skip
    shape = batches, heads, len_q, len_k, left, right, cu_q_ptr, cu_k_ptr, together
    out_strides = out_batch_stride, out_row_stride, out_head_stride
    lse_strides = lse_batch_stride, lse_head_stride
    tasks = gl.cdiv(len_q, GROUPS * ROWS) * heads * batches
    # Of 168 registers a thread of the twelve warps (three of the last four are idle) those that
    # multiply get 232.
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    0, out_ptr, lse_ptr, bufs, bars, message, shape, out_strides, lse_strides,
                    BEFORE, FACTOR, CAP, BOUNDED, BOTTOM_RIGHT, HAS_LEFT, HAS_RIGHT, D_V,
                    TURNS,
                ),
            ),
            (
                _attend,
                (
                    1, out_ptr, lse_ptr, bufs, bars, message, shape, out_strides, lse_strides,
                    BEFORE, FACTOR, CAP, BOUNDED, BOTTOM_RIGHT, HAS_LEFT, HAS_RIGHT, D_V,
                    TURNS,
                ),
            ),
            (
                _fetch,
                (
                    q_desc, k_desc, v_desc, bufs, bars, message, counter_ptr, tasks, shape,
                    GROUP, BOTTOM_RIGHT, HAS_LEFT, HAS_RIGHT,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def launch_forward_hopper(
    operator: Operator, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
    mask: Mask, before: float | None, factor: float, cap: str, together: int,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    batches: int, len_q: int, len_k: int,
) -> None:  # fmt: skip
    """`launch_forward` of tensors [B, T, H, D], packed ones with B = 1.

    Args:
        operator: whose launch it is.
        q: likewise, and so k, v and out.
        k: likewise.
        v: likewise.
        out: likewise.
        lse: [B, H, T].
        mask: what a query sees.
        before: of `score_factors`, with the next.
        factor: the other.
        cap: of `cap_of`.
        together: heads whose keys and values stay in L2.
        cu_seqlens_q: where sequences are packed.
        cu_seqlens_k: likewise.
        batches: sequences.
        len_q: of the longest.
        len_k: likewise.
    """
    heads, width_v = q.shape[2], v.shape[3]
    width = hopper_width(q, v)
    tasks = cdiv(len_q, GROUPS.value * ROWS.value) * heads * batches
    programs = num_programs(q.device, per_sm=1)
    counter = None if tasks <= programs else q.new_zeros((1,), dtype=torch.int32)
    left, right = mask.window
    operator.launch(
        attention_forward_hopper_kernel, (min(tasks, programs),),
        describe(q, ROWS.value, width), describe(k, BLOCK_N, width),
        describe(v, BLOCK_N, width), out, lse, counter, cu_seqlens_q, cu_seqlens_k,
        batches, heads, len_q, len_k, left, right, together, *strides(out), *lse.stride()[:2],
        BEFORE=before, FACTOR=factor, CAP=cap,
        # Weights of up to 2⁸⁰ are bfloat16, too, and no float16.
        BOUNDED=cap != "" and factor <= HIGHEST and q.dtype == torch.bfloat16,
        GROUP=heads // k.shape[2], BOTTOM_RIGHT=mask.bottom_right,
        HAS_LEFT=left >= 0, HAS_RIGHT=right >= 0, D_V=width_v, STAGES=STAGES[width],
        TURNS=_takes_turns(width, cap), num_warps=4, maxnreg=168,
    )  # fmt: skip


def _takes_turns(width: int, cap: str) -> bool:
    """Whether a warpgroup starts its products when the other has started its own, not before.

    TFLOP/s on an H200 at T = 4096, with and without: D = 128, softcap 20: 555, 522; D = 128:
    606, 615. D = 64 was measured with turns alone.
    """
    return cap != "" or width == 64
