"""X·Xᵀ at half the work: the result is symmetric, so only its lower triangle is computed.

    Y = α · X·Xᵀ + β · C          C symmetric, as Y is
    dX = α · (dY + dYᵀ) · X          dC = β · dY

Newton–Schulz iterations are made of it. For a symmetric A, A² is A·Aᵀ, so that their polynomial
b·A + c·A² is `symmetric_matmul(a, alpha=c, beta=b, c=a)`: one kernel, no intermediate matrix.

A product of [M, K] takes M²·K floating-point operations instead of 2·M²·K; X moves in and Y out. A
block of the result below the diagonal is written twice, once transposed; blocks on the diagonal
take their upper half from their lower. So Y is symmetric to the bit, whatever the rounding. Sums
are float32 (float64 for float64), scaled and added to C before the one rounding.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright_kernels._autocast import without_autocast
from tilewright_kernels._launch import cdiv, next_power_of_2, num_programs
from tilewright_kernels._linear_losses import autocast
from tilewright_kernels._operator import (
    Operator,
    accumulator,
    check_floating,
    check_same_device,
)
from tilewright_kernels._symmetric_matmul_kernels import (
    symmetric_matmul_descriptors_kernel,
    symmetric_matmul_pointers_kernel,
)
from tilewright_kernels._tf32 import rounded_to_tf32, tf32_is_allowed
from tilewright_kernels._triton import HAS_TRITON
from tilewright_kernels.matmul.descriptors import has_accelerator

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

_OP = Operator("symmetric_matmul")


class Tile(NamedTuple):
    """A way to launch the kernel with descriptors.

    Attributes:
        BLOCK: rows and columns of a block of the result.
        WIDE: whether two neighbouring blocks are computed as one tile.
        BLOCK_K: step along K.
        num_stages: steps of K that are in shared memory or on their way there.
        num_warps: warps of a program.
        per_sm: programs on a multiprocessor.
        time: that a program takes for a block, relative to the other tiles.
    """

    BLOCK: int
    WIDE: bool
    BLOCK_K: int
    num_stages: int
    num_warps: int
    per_sm: int
    time: float


# Bytes of an element -> tiles to choose from. On an H200 in bfloat16, wide tiles are best where
# each multiprocessor gets several, blocks of 128 where it gets one (1 x 1536 x 4096: 24 µs against
# 43), and blocks of 64 where most would get none (1 x 768 x 3072: 10 µs against 19).
TILES: dict[int, tuple[Tile, ...]] = {
    2: (
        Tile(128, True, 64, 4, 8, 1, 6.3),
        Tile(128, False, 64, 6, 8, 1, 7.2),
        Tile(64, False, 128, 3, 4, 2, 6.6),
    ),
    4: (Tile(128, True, 32, 3, 8, 1, 1.0),),
}
# Bytes of an element -> launch of the kernel with pointers.
POINTER_TILES: dict[int, dict[str, int]] = {
    2: {"BLOCK": 128, "BLOCK_K": 64, "num_stages": 3, "num_warps": 8},
    4: {"BLOCK": 64, "BLOCK_K": 32, "num_stages": 3, "num_warps": 4},
    8: {"BLOCK": 32, "BLOCK_K": 16, "num_stages": 2, "num_warps": 4},
}


def symmetric_matmul_reference(
    x: Tensor, *, alpha: float = 1.0, beta: float = 0.0, c: Tensor | None = None
) -> Tensor:
    """The definition in plain torch, of the whole matrix; arguments as `symmetric_matmul`."""
    wide = x if x.dtype == torch.float64 else x.float()
    y = alpha * (wide @ wide.mT)
    if c is not None and beta != 0:
        y = y + beta * c.to(y.dtype)
    return y.to(x.dtype)


def _fake(x: Tensor, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-2]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, ctx.alpha, ctx.beta = inputs
    ctx.save_for_backward(x)


def _grads(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    dx = dc = None
    if ctx.needs_input_grad[0]:
        with without_autocast(dy):
            dx = (dy + dy.mT).mul_(ctx.alpha) @ x
    if ctx.needs_input_grad[1]:
        dc = ctx.beta * dy
    return dx, dc, None, None


@_OP.function(fake=_fake, setup_context=_save, backward=_grads)
def symmetric_matmul_forward(x: Tensor, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    """α · X·Xᵀ + β · C as a new tensor [*, M, M]."""
    y = _fake(x, c, alpha, beta)
    precision = "ieee"
    if x.dtype == torch.float32 and tf32_is_allowed():
        x, precision = rounded_to_tf32(_OP, x), "tf32"
    if y.numel() > 0:
        launch_triangle(_OP, x, x, None if beta == 0 else c, y, alpha, beta, precision)
    return y


def launch_triangle(
    operator: Operator, x: Tensor, z: Tensor, c: Tensor | None, y: Tensor,
    alpha: float, beta: float, precision: str,
) -> None:  # fmt: skip
    """Y = α · X·Zᵀ + β · C, known to be symmetric, from its lower triangle.

    The batch is brought to one dimension; where that is no view, one launch for each of its first.
    """
    try:
        x_3d, z_3d, y_3d = _as_3d(x), _as_3d(z), _as_3d(y)
        c_3d = None if c is None else _as_3d(c)
    except RuntimeError:
        for i in range(len(y)):
            c_i = None if c is None else c[i]
            launch_triangle(operator, x[i], z[i], c_i, y[i], alpha, beta, precision)
        return
    constants = {"ACC": accumulator(x.dtype), "PRECISION": precision}
    # One flag tells the kernel how both lie.
    fits = (
        _fits_descriptors(x_3d, c_3d, y_3d, precision)
        and _fits_descriptors(z_3d, c_3d, y_3d, precision)
        and _describable(x_3d) == _describable(z_3d)
    )
    launch = _launch_descriptors if fits else _launch_pointers
    launch(operator, x_3d, z_3d, c_3d, y_3d, alpha, beta, constants)


def _as_3d(x: Tensor) -> Tensor:
    """A view of x as [batch, rows, cols]; RuntimeError where there is none."""
    return x.view(x.shape[:-2].numel(), *x.shape[-2:])


def _launch_pointers(
    operator: Operator, x: Tensor, z: Tensor, c: Tensor | None, y: Tensor,
    alpha: float, beta: float, constants: dict[str, Any],
) -> None:  # fmt: skip
    batches, M, K = x.shape
    tile = POINTER_TILES[x.element_size()]
    block = min(tile["BLOCK"], max(16, next_power_of_2(M)))
    block_k = min(tile["BLOCK_K"], max(16, next_power_of_2(K))) if K else 16
    tiles_m = cdiv(M, block)
    operator.launch(
        symmetric_matmul_pointers_kernel, (batches * tiles_m * (tiles_m + 1) // 2,),
        x, z, c, y, alpha, beta, M, K,
        *x.stride(), *z.stride(), *((0, 0, 0) if c is None else c.stride()),
        EVEN_K=K % block_k == 0, BLOCK=block, BLOCK_K=block_k, NUM_STAGES=tile["num_stages"],
        num_warps=tile["num_warps"], num_stages=tile["num_stages"], **constants,
    )  # fmt: skip


def _launch_descriptors(
    operator: Operator, x: Tensor, z: Tensor, c: Tensor | None, y: Tensor,
    alpha: float, beta: float, constants: dict[str, Any],
) -> None:  # fmt: skip
    batches, M, K = x.shape
    one_per_sm = num_programs(x.device, per_sm=1)
    tile = _choose(TILES[x.element_size()], batches, M, one_per_sm)
    transposed = not _describable(x)
    rows, cols = (tile.BLOCK_K, tile.BLOCK) if transposed else (tile.BLOCK, tile.BLOCK_K)
    left, right = (x.mT, z.mT) if transposed else (x, z)
    x_desc = _describe(left, rows, cols)
    z_desc = x_desc if z is x else _describe(right, rows, cols)
    wide_desc = z_desc
    if tile.WIDE:
        wide = (rows, 2 * cols) if transposed else (2 * rows, cols)
        wide_desc = _describe(right, *wide)
    operator.launch(
        symmetric_matmul_descriptors_kernel, (one_per_sm * tile.per_sm,), x_desc, z_desc, wide_desc,
        None if c is None else _describe(c, tile.BLOCK, tile.BLOCK),
        _describe(y, tile.BLOCK, tile.BLOCK), alpha, beta, batches, M, K, TRANSPOSED=transposed,
        BLOCK=tile.BLOCK, WIDE=tile.WIDE, BLOCK_K=tile.BLOCK_K,
        num_stages=tile.num_stages, num_warps=tile.num_warps, **constants,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _choose(tiles: tuple[Tile, ...], batches: int, M: int, multiprocessors: int) -> Tile:
    """The tile with which the program that has most to do is done first."""

    def time(tile: Tile) -> float:
        programs = multiprocessors * tile.per_sm
        rows = cdiv(M, tile.BLOCK)
        blocks = cdiv(batches * rows * (rows + 1) // 2, programs)
        if tile.WIDE:
            blocks = max(blocks, 2 * cdiv(batches * (rows * rows // 4), programs))
        return blocks * tile.time

    return min(tiles, key=time)


def _fits_descriptors(x: Tensor, c: Tensor | None, y: Tensor, precision: str) -> bool:
    """Whether the tensor memory accelerator can fetch and write these matrices.

    The tensor cores take float32 as tf32 alone, and with K adjacent in memory.
    """
    if x.element_size() == 4:
        readable = precision == "tf32" and _describable(x)
    else:
        readable = x.element_size() == 2 and (_describable(x) or _describable(x.mT))
    written = _describable(y) and (c is None or _describable(c))
    return readable and written and has_accelerator(x.device)


def _describable(x: Tensor) -> bool:
    """Whether [batch, rows, cols] has adjacent columns and all else at multiples of 16 bytes."""
    batches, _, cols = x.shape
    batch_stride, row_stride, col_stride = x.stride()
    size = x.element_size()
    return (
        (x.numel() > 0 and col_stride == 1 and cols * size >= 16 and x.data_ptr() % 16 == 0)
        and (row_stride >= cols and row_stride * size % 16 == 0)
        and (batches == 1 or (batch_stride > 0 and batch_stride * size % 16 == 0))
    )


def _describe(x: Tensor, rows: int, cols: int) -> Any:
    """A descriptor of x as [batch, 1, …], in tiles of rows x cols."""
    batch_stride = x.stride(1) if x.shape[0] == 1 else x.stride(0)
    return TensorDescriptor(
        x, [x.shape[0], 1, *x.shape[1:]], [batch_stride, batch_stride, *x.stride()[1:]],
        [1, 1, rows, cols],
    )  # fmt: skip


def symmetric_matmul(
    x: Tensor, *, alpha: float = 1.0, beta: float = 0.0, c: Tensor | None = None
) -> Tensor:
    """alpha · X·Xᵀ + beta · C, of which only the lower triangle is computed.

    b·A + c·A² of a symmetric A is `symmetric_matmul(a, alpha=c, beta=b, c=a)`. The small product of
    a tall matrix, Xᵀ·X, is `symmetric_matmul(x.mT)`, which copies nothing.

    Args:
        x: [*, M, K] in float16, bfloat16, float32 or float64, any strides. float32 is multiplied
            as tf32 where torch.backends.cuda.matmul.fp32_precision says so (as allow_tf32 sets it),
            for which it is copied. Under autocast x and c are cast first, as torch.bmm does it.
        alpha: scales the product.
        beta: scales c, which is not read where beta is 0.
        c: [*, M, M] of x's dtype, any strides, symmetric: only its lower triangle counts.

    Returns:
        [*, M, M], contiguous, and symmetric to the bit. Differentiable once, with respect to x and
        c. Gradients are those of the formula above with each element of C on its own, as autograd
        finds them for plain torch: dC = beta · dY.

    Raises:
        ValueError: x has less than two dimensions, c's shape is not [*, M, M], beta without c,
            tensors on different devices.
        TypeError: dtypes that are not floating point or differ, alpha or beta is a tensor.
    """
    x, c = autocast(x, c)
    _check(x, alpha, beta, c)
    if not _OP.uses_triton(x):
        with without_autocast(x):
            return symmetric_matmul_reference(x, alpha=alpha, beta=beta, c=c)
    return symmetric_matmul_forward(x, c, float(alpha), float(beta))


def _check(x: Tensor, alpha: float, beta: float, c: Tensor | None) -> None:
    check_floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [*, M, K], as in x[None]")
    for name, value in (("alpha", alpha), ("beta", beta)):
        if isinstance(value, Tensor):
            raise TypeError(f"{name} is a tensor; give a Python number, as {name}.item()")
    if c is None:
        if beta != 0:
            raise ValueError(f"beta is {beta} and there is no c to scale; give c, or beta=0")
        return
    shape = (*x.shape[:-1], x.shape[-2])
    if c.shape != shape:
        raise ValueError(
            f"c has shape {tuple(c.shape)} and x {tuple(x.shape)}; c must be {shape}, for example "
            f"c.expand({', '.join(map(str, shape))})"
        )
    if c.dtype != x.dtype:
        raise TypeError(
            f"x is {x.dtype} and c {c.dtype}; they must be equal, for example c.to({x.dtype})"
        )
    check_same_device(x=x, c=c)
