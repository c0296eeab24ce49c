# What Gluon's decorators and annotations say of themselves is not what they do.
# pyrefly: ignore-errors
"""What the warps of Hopper's kernels agree on: which tile is next, and what lies in which buffer.

A task is a tile of queries of one head of one sequence. The warp that fetches finds out which is
next and tells the others. Buffers are rings: step n uses slot n % SLOTS for the n // SLOTS-th time,
and the parity of that is the phase that a barrier is waited for.

`shape` everywhere is (sequences, heads, len_q, len_k, left, right, cu_q_ptr, cu_k_ptr, together):
lengths as `forward` takes them, the window, and how many heads are worked on at one time.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tilewright_kernels.flash_attention.masks import key_blocks, shift_of
from tilewright_kernels.flash_attention.operands import extents
from tilewright_kernels.flash_attention.sequence_rows import place_of_program, sequence

ROWS, GROUPS = gl.constexpr(64), gl.constexpr(2)
"""Rows of a warpgroup, and the warpgroups that multiply."""

FLAGS = "CAP", "GROUP", "BOTTOM_RIGHT", "HAS_LEFT", "HAS_RIGHT"
"""Constants of a backward's kernels, whichever products they have."""


@gluon.jit
def place_of(task, shape):
    """(tile, sequence, head) of `place_of_program`, which a task is to these kernels."""
    batches, heads, len_q, together = shape[0], shape[1], shape[2], shape[8]
    tiles = gl.cdiv(len_q, GROUPS * ROWS)
    tile, batch_head = place_of_program(task, tiles, heads * batches, together)
    return tile, batch_head // heads, batch_head % heads


@gluon.jit
def next_task(counter_ptr, tasks):
    """The first task that no program has taken; none is left where there is no counter."""
    task = tasks
    if counter_ptr is not None:
        task = gl.atomic_add(counter_ptr, 1, sem="relaxed") + gl.num_programs(0)
    return task


@gluon.jit
def blocks_of(
    tile, batch, shape, BOTTOM_RIGHT: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Where its sequence lies, its first query, the sequence's shift, and the blocks of keys."""
    _, _, len_q, len_k, left, right, cu_q_ptr, cu_k_ptr, _ = shape
    place = sequence(batch, len_q, len_k, cu_q_ptr, cu_k_ptr)
    _, _, len_q, _, len_k = place
    first = tile * (GROUPS * ROWS)
    shift = shift_of(len_q, len_k, BOTTOM_RIGHT)
    last = gl.minimum(first + GROUPS * ROWS, len_q) - 1
    begin, full_begin, full_end, end = key_blocks(
        first, last, len_k, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    # One block at least, be it all hidden.
    return place, first, shift, (begin, full_begin, full_end, gl.maximum(end, begin + BLOCK_N))


@gluon.jit
def load(desc, bufs, full, empty, step, index, head, row):
    """Start the copy of a tile's rows of one head into its buffer, as soon as that is empty."""
    SLOTS: gl.constexpr = bufs.shape[0]
    slot, bar = step % SLOTS, full.index(step % SLOTS)
    shape: gl.constexpr = [1, 1, bufs.shape[1], bufs.shape[2]]
    mbarrier.wait(empty.index(slot), step // SLOTS & 1 ^ 1)
    mbarrier.expect(bar, 2 * bufs.shape[1] * bufs.shape[2])
    buffer = bufs.index(slot)._reinterpret(desc.dtype, shape, desc.layout)
    tma.async_copy_global_to_shared(desc, [index, head, row, 0], bar, buffer)


@gluon.jit
def clear_rows(WHICH: gl.constexpr, buffer, rows):
    """Zeros in a warpgroup's share of the rows of a buffer from `rows` on, before they `meet`.

    There may be NaN, which 0 does not cancel. The shares are every other 32 rows.
    """
    SLICE: gl.constexpr = 32
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, SLICE, gl.SliceLayout(1, layout))[:, None]
    for i in gl.static_range(WHICH, buffer.shape[0] // SLICE, GROUPS):
        if rows < (i + 1) * SLICE:
            part = buffer.slice(i * SLICE, SLICE)
            part.store(gl.where(i * SLICE + row < rows, part.load(layout), 0.0))


@gluon.jit
def meet(bar, meetings):
    """Wait until both warpgroups have written what either will multiply; meetings, with this."""
    fence_async_shared()
    mbarrier.arrive(bar)
    mbarrier.wait(bar, meetings & 1)
    return meetings + 1


@gluon.jit
def message_room():
    """Room for what is told, and two barriers: that it is there, and that both have heard it."""
    message = gl.allocate_shared_memory(gl.int32, [3, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    mbarrier.init(bars.index(1), count=GROUPS)
    return message, bars


@gluon.jit
def tell(tile, batch, head, message, bars, turn):
    """Give the warpgroups a tile; one of -1 ends them."""
    zero = gl.full((1,), 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    mbarrier.wait(bars.index(1), turn & 1 ^ 1)
    message.index(0).store(zero + tile)
    message.index(1).store(zero + batch)
    message.index(2).store(zero + head)
    mbarrier.arrive(bars.index(0))


@gluon.jit
def told(message, bars, turn):
    """What `tell` said."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(bars.index(0), turn & 1)
    tile = gl.sum(message.index(0).load(layout), 0)
    batch = gl.sum(message.index(1).load(layout), 0)
    head = gl.sum(message.index(2).load(layout), 0)
    mbarrier.arrive(bars.index(1))
    return tile, batch, head


@gluon.jit
def following(row, head, scratch, begin, end, rows_per_head, GROUP: gl.constexpr, BLOCK_M):
    """The next queries: those below, or the first ones of the next head of the group."""
    row += BLOCK_M
    if GROUP > 1:
        over = row == end
        row = gl.where(over, begin, row)
        head = gl.where(over, head + 1, head)
        scratch = gl.where(over, scratch + rows_per_head, scratch)
    return row, head, scratch


@gluon.jit
def write_rows(
    x, pointer, strides, index, head, first, row, length, D: gl.constexpr
):  # fmt: skip
    """Rows row … of a head of the sequence that begins at `first`, as far as there are any."""
    batch_stride, row_stride, head_stride = strides
    BLOCK_D: gl.constexpr = x.shape[1]
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // BLOCK_D, BLOCK_D // 8], [gl.num_warps(), 1], [1, 0]
    )
    x = gl.convert_layout(x.to(pointer.dtype.element_ty), layout)
    rows = row + gl.arange(0, x.shape[0], gl.SliceLayout(1, layout))[:, None]
    cols = gl.arange(0, BLOCK_D, gl.SliceLayout(0, layout))[None, :]
    pointer += index.to(gl.int64) * batch_stride + head.to(gl.int64) * head_stride
    to = pointer + (first + rows).to(gl.int64) * row_stride + cols
    gl.store(to, x, mask=(rows < length) & (cols < D))


def describe(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """A descriptor of [B, H, T, D] for tiles of one head, which lie in memory as wgmma wants."""
    block = [1, 1, rows, width]
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(*extents(x), block, layout)


def describe_vector(x: Tensor, count: int) -> TensorDescriptor:
    """A descriptor of float32 numbers that lie one after another, for `count` of them at a time."""
    layout = gl.NVMMASharedLayout.get_default_for([count], gl.float32)
    return TensorDescriptor(x, list(x.shape), [1], [count], layout)
