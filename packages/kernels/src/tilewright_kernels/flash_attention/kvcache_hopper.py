# What Gluon's decorators and annotations say of themselves is not what they do.
# pyrefly: ignore-errors
"""`kvcache_kernel` for many sequences on Hopper, in Gluon: the cache's tiles are left operands.

    S = K · qᵀ  [keys, 8]          Oᵀ += Vᵀ · P  [D, 8]

With the cache on the left its rows fill the 64 of the instruction, and both products read it from
shared memory as the tensor memory accelerator put it there: it never passes through registers.
Queries that share a key head are the 8 columns. The ring's first tiles are asked for before the
launch that makes q has ended, and softmax sums are joined once, at the end.

For heads of 128 in 16 bits, at most 8 queries a key head, without softcap, where there are so many
sequences that none is split; everything else is left to `kvcache_kernel`.
"""

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tilewright_kernels._operator import Operator
from tilewright_kernels._overlap import allow_next_launch, await_previous_launch
from tilewright_kernels.flash_attention.operands import describable

# Microseconds of a step of a 0.5 B decoder, 32 sequences of 256 tokens in 12 heads, H200: rings of
# two tiles 765, of three 785, `kvcache_kernel` 809.
BLOCK_N, STAGES = 64, 2
"""Keys of a tile, and tiles of a ring: 64 KiB, of which a multiprocessor holds three."""

WIDTH, MAX_GROUP = 128, 8


@gluon.jit
def _ask(k_desc, v_desc, k_ring, v_ring, full, slot, batch, kv_head, row, end):
    """Start the copies of keys and values from `row` on, if there are any."""
    BYTES: gl.constexpr = 4 * k_ring.shape[4] * 2 * k_ring.shape[5]
    bar, at, some = full.index(slot), [0, batch, kv_head, row, 0], row < end
    mbarrier.expect(bar, BYTES, pred=some)
    tma.async_copy_global_to_shared(k_desc, at, bar, k_ring.index(slot), pred=some)
    tma.async_copy_global_to_shared(v_desc, at, bar, v_ring.index(slot), pred=some)


@gluon.jit
def attention_with_kvcache_hopper_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, lengths_ptr, cos_ptr, sin_ptr,
    q_norm_ptr, k_norm_ptr, out_ptr, k_desc, v_desc,
    capacity, table_rows, kv_heads, window,
    q_batch_stride, q_head_stride, k_batch_stride, k_head_stride, v_batch_stride, v_head_stride,
    k_cache_batch_stride, k_cache_row_stride, k_cache_head_stride,
    v_cache_batch_stride, v_cache_row_stride, v_cache_head_stride, cos_row_stride, sin_row_stride,
    EPS: gl.constexpr, FACTOR: gl.constexpr, HAS_WINDOW: gl.constexpr, GROUP: gl.constexpr,
    OVERLAP: gl.constexpr, PREFETCH: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """All query heads of one key head; grid (heads · batch).

    k_desc and v_desc are of the caches as [2, B, K, S, D / 2]. Halves of a head are what a rotation
    turns into one another, and pieces of shared memory that are 128 bytes wide.
    """
    HALF: gl.constexpr = 64
    COLS: gl.constexpr = 8
    dtype: gl.constexpr = k_desc.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HALF], dtype)
    few_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLS, HALF], dtype)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    by_head: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    by_key: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, 2, 1, 1, BLOCK_N, HALF], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, 2, 1, 1, BLOCK_N, HALF], v_desc.layout)
    k_bufs = k_ring._reinterpret(dtype, [STAGES * 2, BLOCK_N, HALF], tile_layout)
    v_bufs = v_ring._reinterpret(dtype, [STAGES * 2, BLOCK_N, HALF], tile_layout)
    q_bufs = gl.allocate_shared_memory(dtype, [2, COLS, HALF], few_layout)
    p_buf = gl.allocate_shared_memory(dtype, [COLS, BLOCK_N], few_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)

    allow_next_launch(OVERLAP)
    kv_head = gl.program_id(0) % kv_heads
    batch = gl.program_id(0) // kv_heads
    if not PREFETCH:
        await_previous_launch(OVERLAP)
    length = gl.load(lengths_ptr + batch)
    end = gl.minimum(length, capacity)
    begin = end * 0
    if HAS_WINDOW:
        begin = gl.minimum(gl.maximum(length - window, 0), end)
    for slot in gl.static_range(STAGES):
        row = begin + slot * BLOCK_N
        _ask(k_desc, v_desc, k_ring, v_ring, full, slot, batch, kv_head, row, end)
    col = gl.arange(0, HALF, gl.SliceLayout(0, by_head))
    place = length.to(gl.int64)
    if cos_ptr is not None:
        # A position outside the tables cannot raise here: it gives NaN, as in apply_rotary_emb.
        known = length < table_rows
        cos = gl.load(cos_ptr + place * cos_row_stride + col, mask=known, other=float("nan"))
        sin = gl.load(sin_ptr + place * sin_row_stride + col, mask=known, other=float("nan"))
        cos, sin = cos.to(gl.float32), sin.to(gl.float32)
    if PREFETCH:
        await_previous_launch(OVERLAP)

    # All of the new token at once: each wait is as long as that for a whole tile of the cache.
    wide = batch.to(gl.int64)
    head = gl.arange(0, COLS, gl.SliceLayout(1, by_head))
    d = gl.arange(0, HALF, gl.SliceLayout(1, mma))
    q_at = q_ptr + wide * q_batch_stride + (kv_head * GROUP + head)[:, None] * q_head_stride
    q_at += col[None, :]
    there = (head < GROUP)[:, None]
    q_low = gl.load(q_at, mask=there, other=0.0).to(gl.float32)
    q_high = gl.load(q_at + HALF, mask=there, other=0.0).to(gl.float32)
    k_at = k_ptr + wide * k_batch_stride + kv_head * k_head_stride + col
    k_low, k_high = gl.load(k_at).to(gl.float32), gl.load(k_at + HALF).to(gl.float32)
    v_at = v_ptr + wide * v_batch_stride + kv_head * v_head_stride + d
    v_low, v_high = gl.load(v_at), gl.load(v_at + HALF)
    # Rounded after the norm and after the rotation, where operators of their own would round.
    if q_norm_ptr is not None:
        r = gl.rsqrt(gl.sum(q_low * q_low + q_high * q_high, 1) / (2 * HALF) + EPS)[:, None]
        scale = gl.load(q_norm_ptr + col).to(gl.float32)[None, :]
        q_low = (q_low * r * scale).to(dtype).to(gl.float32)
        scale = gl.load(q_norm_ptr + HALF + col).to(gl.float32)[None, :]
        q_high = (q_high * r * scale).to(dtype).to(gl.float32)
    if k_norm_ptr is not None:
        r = gl.rsqrt(gl.sum(k_low * k_low + k_high * k_high, 0) / (2 * HALF) + EPS)
        k_low = (k_low * r * gl.load(k_norm_ptr + col).to(gl.float32)).to(dtype).to(gl.float32)
        scale = gl.load(k_norm_ptr + HALF + col).to(gl.float32)
        k_high = (k_high * r * scale).to(dtype).to(gl.float32)
    if cos_ptr is not None:
        low = q_low * cos[None, :] - q_high * sin[None, :]
        q_high = q_high * cos[None, :] + q_low * sin[None, :]
        q_low = low
        low = k_low * cos - k_high * sin
        k_high = k_high * cos + k_low * sin
        k_low = low
    q_low, q_high, k_low, k_high = (
        q_low.to(dtype),
        q_high.to(dtype),
        k_low.to(dtype),
        k_high.to(dtype),
    )
    q_bufs.index(0).store(q_low)
    q_bufs.index(1).store(q_high)
    fence_async_shared()
    own = q_low.to(gl.float32) * k_low.to(gl.float32)[None, :]
    own = gl.sum(own + q_high.to(gl.float32) * k_high.to(gl.float32)[None, :], 1)
    room = length < capacity
    new = k_cache_ptr + wide * k_cache_batch_stride + kv_head * k_cache_head_stride
    new += place * k_cache_row_stride
    gl.store(new + col, k_low, mask=room)
    gl.store(new + HALF + col, k_high, mask=room)
    new = v_cache_ptr + wide * v_cache_batch_stride + kv_head * v_cache_head_stride
    new += place * v_cache_row_stride
    gl.store(new + d, v_low, mask=room)
    gl.store(new + HALF + d, v_high, mask=room)

    m = gl.convert_layout(own, gl.SliceLayout(0, mma)) * FACTOR
    l_own = gl.full((COLS,), 1.0, gl.float32, gl.SliceLayout(0, mma))
    l = gl.zeros((BLOCK_N, COLS), gl.float32, mma)
    nothing = gl.zeros((HALF, COLS), gl.float32, mma)
    low, high = nothing + v_low.to(gl.float32)[:, None], nothing + v_high.to(gl.float32)[:, None]
    for j in range(gl.cdiv(end - begin, BLOCK_N)):
        now, first = j % STAGES, begin + j * BLOCK_N
        mbarrier.wait(full.index(now), j // STAGES & 1)
        s = gl.zeros((BLOCK_N, COLS), gl.float32, mma)
        q_low_t, q_high_t = q_bufs.index(0).permute((1, 0)), q_bufs.index(1).permute((1, 0))
        s = warpgroup_mma(k_bufs.index(2 * now), q_low_t, s, is_async=True)
        s = warpgroup_mma(k_bufs.index(2 * now + 1), q_high_t, s, is_async=True)
        s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))
        key = first + gl.arange(0, BLOCK_N, gl.SliceLayout(1, mma))
        s = gl.where((key < end)[:, None], s * FACTOR, float("-inf"))
        peak = gl.maximum(m, gl.max(s, 0))
        p, alpha = gl.exp2(s - peak[None, :]), gl.exp2(m - peak)
        m = peak
        l = l * alpha[None, :] + p
        l_own *= alpha
        p_buf.permute((1, 0)).store(p.to(dtype))
        if first + BLOCK_N > end:
            # What lies past the end may be no number, and a probability of zero does not help.
            inside = first + gl.arange(0, BLOCK_N, gl.SliceLayout(1, by_key)) < end
            for half in gl.static_range(2):
                tile = v_bufs.index(2 * now + half).load(by_key)
                tile = gl.where(inside[:, None], tile, gl.zeros_like(tile))
                v_bufs.index(2 * now + half).store(tile)
        fence_async_shared()
        gl.thread_barrier()
        p_shared = p_buf.permute((1, 0))
        v_low_t, v_high_t = (
            v_bufs.index(2 * now).permute((1, 0)), v_bufs.index(2 * now + 1).permute((1, 0)),
        )  # fmt: skip
        low = warpgroup_mma(v_low_t, p_shared, low * alpha[None, :], is_async=True)
        high = warpgroup_mma(v_high_t, p_shared, high * alpha[None, :], is_async=True)
        low, high = warpgroup_mma_wait(num_outstanding=0, deps=(low, high))
        gl.thread_barrier()  # all warps have left the slot
        row = first + STAGES * BLOCK_N
        _ask(k_desc, v_desc, k_ring, v_ring, full, now, batch, kv_head, row, end)
    total = gl.sum(l, 0) + l_own
    cols = gl.arange(0, COLS, gl.SliceLayout(0, mma))
    outs = ((wide * kv_heads + kv_head) * GROUP + cols)[None, :] * (2 * HALF) + d[:, None]
    mask = (cols < GROUP)[None, :] & (d < HALF)[:, None]
    gl.store(out_ptr + outs, (low / total[None, :]).to(dtype), mask=mask)
    gl.store(out_ptr + outs + HALF, (high / total[None, :]).to(dtype), mask=mask)


def takes(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cos: Tensor | None, softcap: float, scale: float,
) -> bool:  # fmt: skip
    """Whether the kernel is for these; that no sequence is split is the caller's to know."""
    return (
        q.element_size() == 2
        and q.shape[3] == WIDTH
        and q.shape[2] // k_cache.shape[2] <= MAX_GROUP
        and (cos is None or 2 * cos.shape[1] == WIDTH)
        and softcap == 0
        and scale > 0
        and describable(k_cache, v_cache)
    )


def describe(cache: Tensor) -> TensorDescriptor:
    """A tensor descriptor of [B, S, K, D] as [2, B, K, S, D / 2], for both halves of a tile."""
    batch, rows, heads, _ = cache.shape
    # Along a dimension of one the stride is nobody's, and may be none that a descriptor takes.
    used = zip(cache.shape, cache.stride(), strict=True)
    batch_stride, row_stride, head_stride, _ = (step if n > 1 else WIDTH for n, step in used)
    dtype = gl.bfloat16 if cache.dtype == torch.bfloat16 else gl.float16
    block = [2, 1, 1, BLOCK_N, WIDTH // 2]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    shape = [2, batch, heads, rows, WIDTH // 2]
    strides = [WIDTH // 2, batch_stride, head_stride, row_stride, 1]
    return TensorDescriptor(cache, shape, strides, block, layout)


def launch_hopper(
    operator: Operator, tensors: tuple[Tensor | None, ...], numbers: tuple[int, ...], **known: Any
) -> None:
    """Launch for operands that the kernel `takes`.

    Args:
        operator: whose launch it is.
        tensors: the kernel's, from q to out.
        numbers: the kernel's, from capacity on.
        **known: EPS, FACTOR, HAS_WINDOW, GROUP, OVERLAP, PREFETCH.
    """
    q, k_cache, v_cache = tensors[0], tensors[3], tensors[4]
    assert q is not None
    assert k_cache is not None
    assert v_cache is not None
    operator.launch(
        attention_with_kvcache_hopper_kernel, (k_cache.shape[0] * k_cache.shape[2],),
        *tensors, describe(k_cache), describe(v_cache), *numbers,
        **known, STAGES=STAGES, BLOCK_N=BLOCK_N, num_warps=4, launch_pdl=True,
    )  # fmt: skip
