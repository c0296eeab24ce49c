"""y = x four ways: what a memory system likes, and what it does not.

Device memory is moved in sectors of 32 bytes, four of which make a line of 128. A load is one
instruction for 32 threads, a warp: whatever sectors these 32 addresses lie in are fetched whole.

| function | a warp touches | and so |
|---|---|---|
| `copy_coalesced` | 512 neighbouring bytes | every byte fetched is used |
| `copy_misaligned` | the same, from an odd start | one sector more, and narrower instructions |
| `copy_strided` | 32 elements, `stride` apart | up to 32 sectors, of each one element |
| `copy_tiled` | shared memory | the next tiles are fetched while this one is stored |

The least traffic of all is x once in and y once out; what is fetched in vain comes on top. The
gradient is dy itself, and takes no kernel.
"""

from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv, num_programs
from tilewright_kernels._operator import Operator, check_floating
from tilewright_kernels._triton import tl, triton

BLOCK, NUM_WARPS = 1024, 4
"""As in vector_add.py."""

TILE_BYTES, STAGES, PROGRAMS_PER_SM = 8192, 8, 1
"""Of `copy_tiled`: few bytes a program, so that it shows what the stages do. On an H200 it reaches
64 / 52 / 87 / 92 % of `copy_` with 1 / 2 / 4 / 8 stages."""

_COALESCED = Operator("copy_coalesced")
_MISALIGNED = Operator("copy_misaligned")
_STRIDED = Operator("copy_strided")
_TILED = Operator("copy_tiled")


def copy_reference(x: Tensor) -> Tensor:
    """The definition in plain torch, of every copy here."""
    return x.clone(memory_format=torch.contiguous_format)


@triton.jit
def _copy_coalesced_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Program p copies elements p · BLOCK and up: neighbouring threads, neighbouring addresses."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask), mask=mask)


@triton.jit
def _copy_misaligned_kernel(x_ptr, y_ptr, n, shift, BLOCK: tl.constexpr):
    """The same with every block moved down by `shift` elements; the first has less to do."""
    # From a start that is no multiple of 16 bytes the compiler may not load 16 bytes at once. It
    # decides by what it knows when it compiles: that `shift` is a multiple of 16, or not.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK - shift + tl.arange(0, BLOCK)
    mask = (offsets >= 0) & (offsets < n)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask), mask=mask)


@triton.jit
def _copy_strided_kernel(x_ptr, y_ptr, n, stride, blocks_per_column, BLOCK: tl.constexpr):
    """Seen as rows of `stride` elements, a program copies BLOCK elements of one column."""
    # Columns one after the other: when the next one wants the rest of a sector, the caches have
    # long forgotten it.
    column = tl.program_id(0) // blocks_per_column
    block = (tl.program_id(0) % blocks_per_column).to(tl.int64)
    offsets = (block * BLOCK + tl.arange(0, BLOCK)) * stride + column
    mask = offsets < n
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask), mask=mask)


@triton.jit
def _copy_tiled_kernel(x_ptr, y_ptr, n, TILE: tl.constexpr, STAGES: tl.constexpr):
    """A few programs, each copies every num_programs-th tile through shared memory."""
    # num_stages makes the compiler rewrite the loop: loads become asynchronous copies from global
    # to shared memory (cp.async) into a ring of STAGES - 1 buffers, and run as far ahead of the
    # stores. A tile on its way takes no registers and stops no thread.
    first = tl.program_id(0).to(tl.int64)
    for tile in tl.range(first, tl.cdiv(n, TILE), tl.num_programs(0), num_stages=STAGES):
        offsets = tile * TILE + tl.arange(0, TILE)
        mask = offsets < n
        tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask), mask=mask)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """A copy's gradient depends on nothing."""


def _grad(ctx: Any, dy: Tensor) -> Tensor:
    return dy


def _grads(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return dy, None


@_COALESCED.function(fake=_fake, setup_context=_save, backward=_grad)
def copy_coalesced_forward(x: Tensor) -> Tensor:
    """Launch one program a block."""
    x, y, n = x.contiguous(), _fake(x), x.numel()
    _COALESCED.launch(
        _copy_coalesced_kernel, (cdiv(n, BLOCK),), x, y, n, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    return y


@_MISALIGNED.function(fake=_fake, setup_context=_save, backward=_grads)
def copy_misaligned_forward(x: Tensor, shift: int) -> Tensor:
    """Launch one program a block, and one more for what the shift leaves over."""
    x, y, n = x.contiguous(), _fake(x), x.numel()
    _MISALIGNED.launch(
        _copy_misaligned_kernel, (cdiv(n + shift, BLOCK) if n else 0,),
        x, y, n, shift, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y


@_STRIDED.function(fake=_fake, setup_context=_save, backward=_grads)
def copy_strided_forward(x: Tensor, stride: int) -> Tensor:
    """Launch one program a block of each column."""
    n = x.numel()
    blocks_per_column = cdiv(cdiv(n, stride), BLOCK)
    programs = blocks_per_column * min(stride, n)
    if programs >= 2**31:
        raise ValueError(
            f"stride {stride} over {n} elements takes {programs} programs, and a launch has fewer "
            f"than 2**31; give a smaller stride"
        )
    x, y = x.contiguous(), _fake(x)
    _STRIDED.launch(
        _copy_strided_kernel, (programs,),
        x, y, n, stride, blocks_per_column, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y


@_TILED.function(fake=_fake, setup_context=_save, backward=_grads)
def copy_tiled_forward(x: Tensor, stages: int) -> Tensor:
    """Launch a few programs on each multiprocessor, however long x is."""
    x, y, n = x.contiguous(), _fake(x), x.numel()
    tile = TILE_BYTES // x.element_size()
    programs = min(cdiv(n, tile), num_programs(x.device, per_sm=PROGRAMS_PER_SM))
    _TILED.launch(
        _copy_tiled_kernel, (programs,), x, y, n, TILE=tile, STAGES=stages, num_warps=NUM_WARPS
    )
    return y


def copy_coalesced(x: Tensor) -> Tensor:
    """A copy of x in which neighbouring threads take neighbouring elements.

    Args:
        x: of any shape, in float16, bfloat16, float32 or float64. It is seen as a vector; what is
            not contiguous is copied to be so first, here and in the other functions.

    Returns:
        Like x, contiguous. Differentiable once.
    """
    check_floating("x", x)
    return copy_coalesced_forward(x) if _COALESCED.uses_triton(x) else copy_reference(x)


def copy_misaligned(x: Tensor, shift: int = 1) -> Tensor:
    """A copy of x in blocks that begin `shift` ≥ 0 elements before a multiple of their length."""
    check_floating("x", x)
    if shift < 0:
        raise ValueError(f"shift is {shift}; give 0 or more elements")
    return copy_misaligned_forward(x, shift) if _MISALIGNED.uses_triton(x) else copy_reference(x)


def copy_strided(x: Tensor, stride: int) -> Tensor:
    """A copy of x in which neighbouring threads take elements that lie `stride` ≥ 1 apart."""
    check_floating("x", x)
    if stride < 1:
        raise ValueError(f"stride is {stride}; give 1 (neighbours) or more elements")
    return copy_strided_forward(x, stride) if _STRIDED.uses_triton(x) else copy_reference(x)


def copy_tiled(x: Tensor, stages: int = STAGES) -> Tensor:
    """A copy of x through shared memory, `stages` - 1 tiles ahead; 1 goes through registers."""
    check_floating("x", x)
    if stages < 1:
        raise ValueError(f"stages is {stages}; give 1 (no shared memory) or more")
    return copy_tiled_forward(x, stages) if _TILED.uses_triton(x) else copy_reference(x)
