"""What softmax and log_softmax share: how tensors are seen and walked, launches, registration.

The kernels are in `_softmax_kernels`. A tensor is seen as [outer, lanes, N] with three strides, N
being the dimension that is summed over.
"""

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv, next_power_of_2, row_tile
from tilewright_kernels._operator import Operator, accumulator, check_floating
from tilewright_kernels._softmax_kernels import (
    softmax_bwd_kernel,
    softmax_bwd_wide_kernel,
    softmax_fwd_kernel,
    softmax_fwd_wide_kernel,
)

MAX_TILE = 32768
"""Widest tile held in registers, in elements of 4 bytes."""

PAIRS_FROM = 32768
"""Tiles of so many elements are reduced once, as pairs of maximum and sum; smaller ones twice.

A lane that a multiprocessor holds once leaves it idle while it is reduced. Of 64 KiB it holds two
if 64 registers a thread suffice for 16 warps, which they do only with pairs.
"""


class Walk(NamedTuple):
    """A program's tile of [outer, lanes, N]: whole lanes, or a block of wide ones."""

    LANES: int
    BLOCK_N: int
    num_warps: int
    wide: bool = False


@cache
def walk_for(lanes: int, width: int, itemsize: int, *, by_lanes: bool, backward: bool) -> Walk:
    """The walk over lanes of `width` elements.

    Args:
        lanes: how many lie beside each other.
        width: elements in a lane.
        itemsize: bytes of an element in arithmetic.
        by_lanes: neighbours in memory are neighbours among lanes, not within one.
        backward: two tensors are read, not one.
    """
    max_tile = MAX_TILE * 4 // itemsize
    if by_lanes:
        beside, block_n = min(64, next_power_of_2(lanes)), next_power_of_2(width)
        while beside > 16 and beside * block_n > max_tile // 2:
            beside //= 2
        if beside * block_n > max_tile // 2:
            return Walk(64, 128, 16, wide=True)
        return Walk(beside, block_n, max(1, min(32, beside * block_n // 512)))
    if width > max_tile:
        # N = 131072 on an H200: 0.79 forward and 0.68 backward; blocks of 8192: 0.74 and 0.66.
        return Walk(1, 16384, 32, wide=True)
    tile = row_tile(width, elements=2048, elements_per_thread=16)
    if tile.BLOCK_N >= 4096 and not backward:
        # 32 elements a thread to N = 8192, then 64: 0.98, 0.97 and 0.95 of the copy speed at 4096,
        # 16384 and 32768 on an H200; with half as many a thread 0.97, 0.94 and 0.91.
        return Walk(1, tile.BLOCK_N, min(8, tile.BLOCK_N // 1024) if tile.BLOCK_N < 32768 else 16)
    return Walk(*tile)


def _launch_forward(
    op: Operator, x: Tensor, y: Tensor, dim: int, *, causal: bool, log: bool
) -> None:
    """Launch the forward: y, contiguous, from x of the same shape."""
    if x.numel() == 0:
        return
    num_queries, split = x.shape[-2] if causal else 1, _split(x, dim)
    x, y = _as_lanes(x, dim, split), _as_lanes(y, dim, split)
    outer, lanes, width = y.shape
    acc = torch.float64 if y.dtype == torch.float64 else torch.float32
    by_lanes = _by_lanes(x) or _by_lanes(y)
    walk = walk_for(lanes, width, acc.itemsize, by_lanes=by_lanes, backward=False)
    grid = (outer * cdiv(lanes, walk.LANES),)
    args = x, y, *x.stride(), *y.stride(), lanes, width, num_queries
    meta = {
        "LOG": log, "CAUSAL": causal, "ACC": accumulator(y.dtype),
        "LANES": walk.LANES, "BLOCK_N": walk.BLOCK_N, "num_warps": walk.num_warps,
    }  # fmt: skip
    if walk.wide:
        meta |= {"LOWEST": torch.finfo(acc).min, "VEC": min(8, walk.BLOCK_N)}
        op.launch(softmax_fwd_wide_kernel, grid, *args, **meta)
    else:
        tile = walk.LANES * walk.BLOCK_N
        pairs = tile >= PAIRS_FROM
        meta |= {
            "FLAT": outer == 1,
            "FULL": width == walk.BLOCK_N and lanes % walk.LANES == 0 and not causal and not pairs,
            "PAIRS": pairs,
            "AGAIN": tile < 16384 or pairs,
            "ALIKE": x.stride() == y.stride(),
        }
        if pairs and log and x.element_size() == 2:
            # At 16 warps it takes 74 registers, of which two lanes leave room for 64.
            meta |= {"num_warps": 32, "maxnreg": 32}
        op.launch(softmax_fwd_kernel, grid, *args, **meta)


def _launch_backward(
    op: Operator, dy: Tensor, y: Tensor, dx: Tensor, dim: int, *, causal: bool, log: bool
) -> None:
    """Launch the backward: dx, contiguous, from dy and y of the same shape."""
    if y.numel() == 0:
        return
    num_queries, split = y.shape[-2] if causal else 1, _split(dy, dim)
    dy, y, dx = (_as_lanes(t, dim, split) for t in (dy, y.contiguous(), dx))
    outer, lanes, width = y.shape
    acc = torch.float64 if y.dtype == torch.float64 else torch.float32
    by_lanes = _by_lanes(dy) or _by_lanes(y)
    walk = walk_for(lanes, width, acc.itemsize, by_lanes=by_lanes, backward=True)
    op.launch(
        softmax_bwd_wide_kernel if walk.wide else softmax_bwd_kernel,
        (outer * cdiv(lanes, walk.LANES),),
        dy, y, dx, *dy.stride(), *y.stride(), lanes, width, num_queries,
        LOG=log, CAUSAL=causal, ACC=accumulator(y.dtype),
        LANES=walk.LANES, BLOCK_N=walk.BLOCK_N, num_warps=walk.num_warps,
    )  # fmt: skip


def register(operator: Operator, *, log: bool) -> Callable[..., Tensor]:
    """Register `<operator>_forward` and `<operator>_backward` as its launches; return the former.

    The forward takes (x, dim, dtype, causal) and returns y in dtype; dim counts from the front.
    """

    def fake(x: Tensor, dim: int, dtype: torch.dtype, causal: bool) -> Tensor:
        return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)

    def forward(x: Tensor, dim: int, dtype: torch.dtype, causal: bool) -> Tensor:
        y = fake(x, dim, dtype, causal)
        _launch_forward(operator, x, y, dim, causal=causal, log=log)
        return y

    def backward_fake(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype, causal: bool) -> Tensor:
        return fake(y, dim, dtype, causal)

    def backward(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype, causal: bool) -> Tensor:
        dx = fake(y, dim, dtype, causal)
        _launch_backward(operator, dy, y, dx, dim, causal=causal, log=log)
        return dx

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.dim, _, ctx.causal = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(output)

    def grads(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (y,) = ctx.saved_tensors
        return registered_backward(dy, y, ctx.dim, ctx.dtype, ctx.causal), None, None, None

    forward.__name__, backward.__name__ = f"{operator.name}_forward", f"{operator.name}_backward"
    registered_backward = operator.function(fake=backward_fake)(backward)
    return operator.function(fake=fake, setup_context=save, backward=grads)(forward)


def reference(
    function: Callable[..., Tensor],
    input: Tensor,
    dim: int,
    dtype: torch.dtype | None,
    causal: bool,
) -> Tensor:
    """torch.softmax or torch.log_softmax, with the causal mask."""
    if not causal:
        return function(input, dim, dtype)
    hidden = torch.ones(input.shape[-2:], dtype=torch.bool, device=input.device).triu(1)
    y = function(input.masked_fill(hidden, -torch.inf), dim, dtype)
    return torch.where(hidden, y.detach(), y)


def checked(
    input: Tensor, dim: int, dtype: torch.dtype | None, causal: bool
) -> tuple[Tensor, int, torch.dtype]:
    """What the kernels take: the tensor to read, dim counted from the front, dtype of the result.

    The kernel widens what it reads; a dtype that holds no more than input's is cast to before, as
    torch does.

    Raises:
        ValueError: a dim that input does not have, or causal with a dim that is not the keys.
        TypeError: input or dtype is not floating point.
    """
    rank = max(input.dim(), 1)
    if not -rank <= dim < rank:
        raise ValueError(
            f"dim is {dim}, and input has shape {tuple(input.shape)}; give {-rank} to {rank - 1}"
        )
    if causal and (input.dim() < 2 or dim % rank != rank - 1):
        raise ValueError(
            f"causal masks keys, the last dimension of [..., queries, keys]; dim is {dim} and "
            f"input has shape {tuple(input.shape)}"
        )
    if dtype is None:
        check_floating("input", input)
        return input, dim % rank, input.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}; give a floating point one, for example torch.float32")
    widens = input.is_floating_point() and dtype.itemsize > input.dtype.itemsize
    input = input if widens else input.to(dtype)
    check_floating("input", input)
    return input, dim % rank, dtype


def _merges(x: Tensor, first: int, last: int) -> bool:
    """Whether dimensions first to last - 1 can be viewed as one."""
    sizes = [(x.shape[i], x.stride(i)) for i in range(first, last) if x.shape[i] > 1]
    return all(stride == n * inner for (_, stride), (n, inner) in pairwise(sizes))


def _split(x: Tensor, dim: int) -> int:
    """How many dimensions before dim are outer; the others, dim aside, are lanes.

    All that precede dim, if something follows it. Else none, or as few as a view allows.
    """
    if math.prod(x.shape[dim + 1 :]) > 1:
        return dim
    return next((k for k in range(dim) if _merges(x, 0, k) and _merges(x, k, dim)), 0)


def _as_lanes(x: Tensor, dim: int, split: int) -> Tensor:
    """x as [outer, lanes, N], N being dimension dim; a copy only where there is no such view."""
    x = x.movedim(dim, -1) if x.dim() else x.view(1)
    return x.reshape(math.prod(x.shape[:split]), math.prod(x.shape[split:-1]), x.shape[-1])


def _by_lanes(x: Tensor) -> bool:
    """Whether [outer, lanes, N] has its lanes side by side."""
    return x.shape[1] > 1 and x.stride(1) == 1 and x.stride(2) > 1
