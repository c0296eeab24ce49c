"""y = xᵀ: one of its two sides walks across memory, unless a tile is turned on the chip.

Rows of x are columns of y. A warp that reads 32 neighbours of a row has to write them to 32 rows of
y, 32 sectors for 32 elements. The way out is a square tile: read it by rows of x, turn it, write it
by rows of y. Both sides then move whole sectors. The turning is done in shared memory, which has 32
banks and serves 32 threads at once as long as no two of them want different words of one bank.

The gradient is dx = dyᵀ: the same kernel.
"""

from typing import Any

from torch import Tensor

from tilewright_kernels._launch import cdiv
from tilewright_kernels._operator import Operator, check_floating
from tilewright_kernels._triton import tl, triton

BLOCK = 1024
"""Elements of a row that a program of `transpose_naive` takes."""

TILE_BYTES, NUM_WARPS = 256, 8
"""A row of the square that a program of `transpose_tiled` turns. Share of `copy_` on an H200 with
128 / 256 / 512 bytes: 0.87 / 0.96 / 0.94 (float32), 0.88 / 0.95 / - (bfloat16)."""

_NAIVE = Operator("transpose_naive")
_TILED = Operator("transpose_tiled")


def transpose_reference(x: Tensor) -> Tensor:
    """The definition in plain torch."""
    return x.T.contiguous()


@triton.jit
def _transpose_naive_kernel(x_ptr, y_ptr, M, N, x_row_stride, BLOCK: tl.constexpr):
    """y[j, i] = x[i, j] for a block of columns j of one row i: reads neighbours, scatters them."""
    blocks = tl.cdiv(N, BLOCK)
    i = (tl.program_id(0) // blocks).to(tl.int64)
    j = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(x_ptr + i * x_row_stride + j, mask=j < N)
    tl.store(y_ptr + j * M + i, row, mask=j < N)


@triton.jit
def _transpose_tiled_kernel(x_ptr, y_ptr, M, N, x_row_stride, TILE: tl.constexpr):
    """y[j, i] = x[i, j] for a square of both."""
    tiles = tl.cdiv(N, TILE)
    i = (tl.program_id(0) // tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    j = (tl.program_id(0) % tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = (i < M)[:, None] & (j < N)[None, :]
    x = tl.load(x_ptr + i[:, None] * x_row_stride + j[None, :], mask=mask)
    # trans renames dimensions and moves nothing. But threads that held neighbours of a row of x
    # now hold neighbours of a column of y, so the compiler passes the tile through shared memory
    # before the store, spread over the banks such that neither side of it waits.
    tl.store(y_ptr + j[:, None] * M + i[None, :], tl.trans(x), mask=tl.trans(mask))


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], x.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """The gradient of a transpose depends on nothing."""


def _naive_grad(ctx: Any, dy: Tensor) -> Tensor:
    return transpose_naive_forward(dy)


@_NAIVE.function(fake=_fake, setup_context=_save, backward=_naive_grad)
def transpose_naive_forward(x: Tensor) -> Tensor:
    """Launch one program a block of a row."""
    M, N = x.shape
    programs = M * cdiv(N, BLOCK)
    if programs >= 2**31:
        raise ValueError(
            f"x of shape {M, N} takes {programs} programs, one a row at least, and a launch has "
            f"fewer than 2**31; take transpose_tiled"
        )
    x, y = x if x.stride(1) == 1 else x.contiguous(), _fake(x)
    _NAIVE.launch(_transpose_naive_kernel, (programs,), x, y, M, N, x.stride(0), BLOCK=BLOCK)
    return y


def _tiled_grad(ctx: Any, dy: Tensor) -> Tensor:
    return transpose_tiled_forward(dy)


@_TILED.function(fake=_fake, setup_context=_save, backward=_tiled_grad)
def transpose_tiled_forward(x: Tensor) -> Tensor:
    """Launch one program a square."""
    (M, N), y, tile = x.shape, _fake(x), TILE_BYTES // x.element_size()
    x = x if x.stride(1) == 1 else x.contiguous()
    _TILED.launch(
        _transpose_tiled_kernel, (cdiv(M, tile) * cdiv(N, tile),),
        x, y, M, N, x.stride(0), TILE=tile, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y


def transpose_naive(x: Tensor) -> Tensor:
    """xᵀ, read along rows and written across them.

    Args:
        x: [M, N] in float16, bfloat16, float32 or float64; rows at any distance.

    Returns:
        [N, M], contiguous. Differentiable once.

    Raises:
        ValueError: x is not a matrix.
        TypeError: x is not floating point.
    """
    _check(x)
    return transpose_naive_forward(x) if _NAIVE.uses_triton(x) else transpose_reference(x)


def transpose_tiled(x: Tensor) -> Tensor:
    """xᵀ by squares that are turned in shared memory; arguments as `transpose_naive`."""
    _check(x)
    return transpose_tiled_forward(x) if _TILED.uses_triton(x) else transpose_reference(x)


def _check(x: Tensor) -> None:
    check_floating("x", x)
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; give a matrix, as in x.flatten(1)")
