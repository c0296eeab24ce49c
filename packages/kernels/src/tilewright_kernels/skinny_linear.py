"""A linear layer for few rows, with what surrounds it in a decoder: norm before, gate or sum after.

    y = x̂ · Wᵀ (+ residual)          or          y = silu(x̂ · W_gateᵀ) · (x̂ · W_upᵀ)

with x̂ = x or x̂ = x · norm_weight / sqrt(mean(x²) + eps). When a decoder writes one token a
sequence, x has as many rows as there are sequences. The weights are then all that counts: they are
read once, and the time is theirs at the speed of the memory. Anything that runs between two such
products, or starts after one has ended, is time in which the memory rests. So the norm is computed
where x is read, the gate and the sum where y is written, and with `prefetch_weight` the weights are
on their way before the launch that makes x has ended (programmatic dependent launch, Hopper).

One row is multiplied and summed in registers; more are columns of tensor-core products (GEMV and
swapped GEMM). There the norm is better handed on by the product before it (`skinny_linear_scaled`),
whose programs have y in registers and write y · norm_weight and their sums of y² as well. Inference
only: there is no gradient.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright_kernels._launch import cdiv, is_hopper, next_power_of_2, num_programs
from tilewright_kernels._norm import default_eps
from tilewright_kernels._operator import (
    Operator,
    accumulator,
    as_rows,
    check_floating,
    check_same_device,
)
from tilewright_kernels._skinny_linear_kernels import (
    skinny_linear_row_kernel,
    skinny_linear_rows_kernel,
)
from tilewright_kernels._skinny_linear_tiles import hopper_tile, row_tile, rows_tile
from tilewright_kernels.gated_activations import swiglu, swiglu_reference
from tilewright_kernels.linear import linear
from tilewright_kernels.rms_norm import rms_norm, rms_norm_reference

_OP = Operator("skinny_linear")

MAX_ROWS = 64
"""Rows of x, at most: with more of them a product is no longer the weights' reading alone."""

MAX_SCALED_ROWS = 32
"""Rows up to which a norm is handed on."""

SUMMED = 64
"""Columns of which a sum of squares is handed on: those of a program on Hopper."""


class ScaledRows(NamedTuple):
    """A product, and what the RMSNorm that follows it needs of it.

    Attributes:
        y: [M, N].
        scaled: [M, N], y · next_norm_weight, rounded.
        squares: [N / 64 rounded up, M] float32, sums of y² over 64 columns each.
    """

    y: Tensor
    scaled: Tensor
    squares: Tensor


def skinny_linear_reference(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """The definition in plain torch; arguments as `skinny_linear`."""
    if norm_weight is not None:
        x = rms_norm_reference(x, norm_weight.shape, norm_weight, eps)
    y = F.linear(x, weight)
    if gated:
        y = swiglu_reference(y)
    return y if residual is None else y + residual


def hopper_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `skinny_linear_hopper_kernel` is for these: several rows that TMA can read."""
    return (
        is_hopper(x.device)
        and x.element_size() == 2
        and len(x) > 1
        and x.shape[1] % 64 == 0
        and all(
            t.stride(1) == 1 and t.stride(0) * 2 % 16 == 0 and t.data_ptr() % 16 == 0
            for t in (x, weight)
        )
    )


def by_parts(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, eps: float | None,
    residual: Tensor | None, gated: bool,
) -> Tensor:  # fmt: skip
    """The same by operators one by one."""
    if norm_weight is not None:
        x = rms_norm(x, norm_weight.shape, norm_weight, eps)
    y = linear(x, weight)
    if gated:
        y = swiglu(y)
    return y if residual is None else y + residual


def _fake(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, squares: Tensor | None,
    residual: Tensor | None,
    counters: Tensor | None, eps: float, gated: bool, prefetch: bool,
) -> Tensor:  # fmt: skip
    width = weight.shape[0] // 2 if gated else weight.shape[0]
    return x.new_empty((*x.shape[:-1], width))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Nothing is kept."""


def _grads(ctx: Any, dy: Tensor) -> tuple[None, ...]:
    raise RuntimeError(
        "skinny_linear has no gradient; call it under torch.no_grad(), or linear, rms_norm and "
        "swiglu one by one"
    )


def _no_scaled_grads(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    return _grads(ctx, grads[0])


@_OP.function(fake=_fake, setup_context=_save, backward=_grads)
def skinny_linear_forward(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, squares: Tensor | None,
    residual: Tensor | None,
    counters: Tensor | None, eps: float, gated: bool, prefetch: bool,
) -> Tensor:  # fmt: skip
    """Launch the product of up to 64 rows; squares only where `hopper_takes` them."""
    out = _fake(x, weight, norm_weight, squares, residual, counters, eps, gated, prefetch)
    if out.numel() == 0:
        return out
    x, width = as_rows(x, x.shape[-1]), out.shape[-1]
    residual = None if residual is None else as_rows(residual, width)
    overlap = is_hopper(x.device)
    k, size = x.shape[1], x.element_size()
    # Triton's interpreter knows no such option.
    options = {"launch_pdl": True} if overlap else {}
    known = {
        "EPS": eps, "K": k, "GATED": gated, "ACC": accumulator(x.dtype),
        "OVERLAP": overlap, "PREFETCH": overlap and prefetch,
    }  # fmt: skip
    if len(x) == 1:
        tile = row_tile(width, k, size, gated)
        _OP.launch(
            skinny_linear_row_kernel, (cdiv(width, tile.BLOCK_N),),
            x, weight, norm_weight, residual, out, weight.stride(0), width,
            **known, **tile._asdict(), **options,
        )  # fmt: skip
        return out
    block_m = max(16, next_power_of_2(len(x)))
    if hopper_takes(x, weight):
        _launch_hopper(
            x, weight, norm_weight, squares, residual, counters, out, None, None, None,
            eps, gated, prefetch,
        )  # fmt: skip
        return out
    tile = rows_tile(width, k, size, gated, num_programs(x.device, per_sm=1))
    blocks = cdiv(width, tile.BLOCK_N)
    parts = None
    if tile.SPLITS > 1:
        split_size = blocks * (tile.BLOCK_N * (2 if gated else 1) + 1) * block_m
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        parts = torch.empty(tile.SPLITS * split_size, dtype=acc, device=x.device)
        if counters is None:
            counters = torch.zeros(blocks, dtype=torch.int32, device=x.device)
    _OP.launch(
        skinny_linear_rows_kernel, (blocks, tile.SPLITS),
        x, weight, norm_weight, residual, out, parts, counters if tile.SPLITS > 1 else None,
        x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0),
        len(x), width,
        **known, BLOCK_M=block_m, **tile._asdict(), num_stages=1, **options,
    )  # fmt: skip
    return out


def _launch_hopper(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, squares: Tensor | None,
    residual: Tensor | None, counters: Tensor | None, out: Tensor, next_norm: Tensor | None,
    scaled: Tensor | None, next_squares: Tensor | None, eps: float, gated: bool, prefetch: bool,
) -> None:  # fmt: skip
    """Several rows on Hopper, by the kernel in Gluon."""
    from tilewright_kernels import _skinny_linear_hopper as hopper

    (rows, k), width = x.shape, out.shape[-1]
    block_m = max(16, next_power_of_2(rows))
    tile = hopper_tile(width, k, gated, block_m)
    height = hopper.BLOCK_N // 2 if gated else hopper.BLOCK_N
    if gated:
        w_desc = hopper.describe_gated(weight, tile.PIECES)
    else:
        w_desc = hopper.describe_rows(weight, height, tile.PIECES)
    blocks, parts = cdiv(width, height), None
    if tile.SPLITS > 1:
        split_size = blocks * (hopper.BLOCK_N + 1) * block_m
        parts = torch.empty(tile.SPLITS * split_size, dtype=torch.float32, device=x.device)
        if counters is None:
            counters = torch.zeros(blocks, dtype=torch.int32, device=x.device)
    _OP.launch(
        hopper.skinny_linear_hopper_kernel, (blocks, tile.SPLITS),
        hopper.describe_rows(x, block_m, tile.PIECES), w_desc, norm_weight, squares, residual, out,
        next_norm, scaled, next_squares, parts, counters if tile.SPLITS > 1 else None,
        0 if residual is None else residual.stride(0), rows, width,
        EPS=eps, K=k, GATED=gated, PREFETCH=prefetch,
        **tile._asdict(), ROUNDED=next_power_of_2(cdiv(k, SUMMED)),
        BLOCK_M=block_m, BLOCK_N=hopper.BLOCK_N, BLOCK_K=hopper.BLOCK_K,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip


def _scaled_fake(
    x: Tensor, weight: Tensor, residual: Tensor | None, next_norm: Tensor,
    counters: Tensor | None, prefetch: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = len(x), len(weight)
    squares = x.new_empty(cdiv(shape[1], SUMMED), shape[0], dtype=torch.float32)
    return x.new_empty(shape), x.new_empty(shape), squares


@_OP.function(fake=_scaled_fake, setup_context=_save, backward=_no_scaled_grads)
def skinny_linear_scaled_forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, next_norm: Tensor,
    counters: Tensor | None, prefetch: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the product of rows that `hopper_takes`: y, y · next_norm, sums of y²."""
    y, scaled, squares = _scaled_fake(x, weight, residual, next_norm, counters, prefetch)
    _launch_hopper(
        x, weight, None, None, residual, counters, y, next_norm, scaled, squares,
        0.0, False, prefetch,
    )  # fmt: skip
    return y, scaled, squares


def hands_norm_on(x: Tensor, weight: Tensor) -> bool:
    """Whether `skinny_linear_scaled` is one launch for these, x [M, K]; not in compiled code."""
    if torch.compiler.is_compiling():  # which cannot ask for addresses
        return False
    if _OP.setting == "torch" or not x.is_cuda or not 1 < len(x) <= MAX_SCALED_ROWS:
        return False
    return hopper_takes(x, weight)


def skinny_linear_scaled(
    x: Tensor,
    weight: Tensor,
    next_norm_weight: Tensor,
    *,
    residual: Tensor | None = None,
    counters: Tensor | None = None,
    prefetch_weight: bool = False,
) -> ScaledRows:
    """x · weightᵀ (+ residual), with what `skinny_linear` needs to normalize it: `squares`.

    Where `hands_norm_on` is not true, by operators one by one.

    Args:
        x: [M, K].
        weight: [N, K].
        next_norm_weight: [N] of the RMSNorm that follows.
        residual: [M, N], added at the end, or None.
        counters: as for `skinny_linear`.
        prefetch_weight: likewise; of next_norm_weight, too.

    Raises:
        ValueError: shapes that do not fit; x that is no matrix.
        TypeError: dtypes that differ.
    """
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; give [M, K]")
    _check(x, weight, None, residual, False, counters)
    check_floating("next_norm_weight", next_norm_weight)
    if next_norm_weight.shape != weight.shape[:1]:
        raise ValueError(
            f"next_norm_weight has shape {tuple(next_norm_weight.shape)}; it must be "
            f"({len(weight)},)"
        )
    check_same_device(x=x, next_norm_weight=next_norm_weight)
    if hands_norm_on(x, weight) and _OP.uses_triton(x):
        residual = None if residual is None else as_rows(residual, len(weight))
        return ScaledRows(
            *skinny_linear_scaled_forward(
                x, weight, residual, next_norm_weight.contiguous(), counters, prefetch_weight
            )
        )
    y = skinny_linear(
        x, weight, residual=residual, counters=counters, prefetch_weight=prefetch_weight
    )
    wide = y.float()
    squares = F.pad(wide.square(), (0, -len(weight) % SUMMED)).unflatten(1, (-1, SUMMED)).sum(2).t()
    return ScaledRows(y, (wide * next_norm_weight.float()).to(y.dtype), squares.contiguous())


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    squares: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    counters: Tensor | None = None,
    prefetch_weight: bool = False,
) -> Tensor:
    """RMSNorm, product with a weight, and SwiGLU or a residual sum, for few rows, in one launch.

    y = norm(x) · weightᵀ, then silu(y[..., :N]) · y[..., N:] if gated, then + residual. Every sum
    is float32 (float64 for float64) and rounded once, at the end; with several rows x · norm_weight
    is rounded too before it is multiplied.

    Args:
        x: [..., K] in float16, bfloat16, float32 or float64, of at most 64 rows in all. Under
            backend auto more of them, and several with a gate, take operators one by one; under
            backend triton more are an error.
        weight: [N, K], or [2N, K] with the gate's rows first if gated; of x's dtype.
        norm_weight: [K] of an RMSNorm before the product (any float dtype), or None for no norm.
        squares: [K / 64 rounded up, M] float32 of `ScaledRows`, instead of norm_weight: x [M, K] is
            its `scaled`, which still has to be divided by the root of the mean square.
        eps: of that norm, as in `rms_norm`.
        residual: [..., N] of x's dtype, added at the end, or None.
        gated: whether the product is a SwiGLU's.
        counters: int32 zeros on x's device, one for each 16 of N at least. They are zero again
            after the call. Without them some shapes clear some of their own, which is a launch.
            Calls that may run at the same time need counters of their own.
        prefetch_weight: neither weight nor norm_weight is written by the launches before this one,
            back to the last that is neither this function nor `flash_attn_with_kvcache`, nor by
            that one: they may be read while those still run (Hopper; elsewhere nothing changes).

    Returns:
        [..., N] like x, contiguous, without a gradient.

    Raises:
        ValueError: shapes that do not fit, tensors on different devices, too few counters.
        TypeError: dtypes that differ or are not floating point; counters that are not int32.
    """
    rows = _check(x, weight, norm_weight, residual, gated, counters)
    if squares is not None:
        _check_squares(x, norm_weight, squares)
    unsupported = better = None
    if rows > MAX_ROWS:
        unsupported = f"x has {rows} rows, more than {MAX_ROWS}"
    elif x.dtype == torch.float64 and x.is_cuda:
        unsupported = "float64 is for the interpreter"
    elif gated and rows > 1 and not (is_hopper(x.device) and x.element_size() == 2):
        # 14.1 µs against 12.6 at 32 rows, 1536 to 2 · 4096 (H200, the kernel for all GPUs).
        better = "norm, cuBLAS's product and swiglu are faster for several rows"
    triton = _OP.uses_triton(x, unsupported, better)
    if squares is not None and not (
        triton and hands_norm_on(x, weight) and squares.is_contiguous()
    ):
        mean = squares.sum(0) / x.shape[1]
        x = (x * torch.rsqrt(mean + default_eps(eps, x.dtype))[:, None]).to(x.dtype)
        squares = None
    if not triton:
        if x.is_cuda and _OP.setting == "auto":
            return by_parts(x, weight, norm_weight, eps, residual, gated)
        return skinny_linear_reference(
            x, weight, norm_weight=norm_weight, eps=eps, residual=residual, gated=gated
        )
    weight = weight if weight.stride(1) == 1 or weight.shape[1] == 1 else weight.contiguous()
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    eps = default_eps(eps, x.dtype)
    return skinny_linear_forward(
        x, weight, norm_weight, squares, residual, counters, eps, gated, prefetch_weight
    )


def _check_squares(x: Tensor, norm_weight: Tensor | None, squares: Tensor) -> None:
    if norm_weight is not None:
        raise ValueError(
            "both norm_weight and squares are given; squares are of x times the weight"
        )
    if x.dim() != 2 or squares.shape != (cdiv(x.shape[1], SUMMED), len(x)):
        raise ValueError(
            f"squares has shape {tuple(squares.shape)} and x {tuple(x.shape)}; give x [M, K] and "
            f"squares [K / {SUMMED} rounded up, M]"
        )
    if squares.dtype != torch.float32:
        raise TypeError(f"squares is {squares.dtype}; give float32")
    check_same_device(x=x, squares=squares)


def _check(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, residual: Tensor | None,
    gated: bool, counters: Tensor | None,
) -> int:  # fmt: skip
    """Raise on what does not fit; the number of rows."""
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x is a scalar; it must have a last dimension, as in x[None]")
    k = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != k:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [N, {k}] as x's rows")
    if gated and weight.shape[0] % 2:
        raise ValueError(f"weight has {weight.shape[0]} rows; gated takes gate and up, [2N, {k}]")
    width = weight.shape[0] // 2 if gated else weight.shape[0]
    if norm_weight is not None:
        check_floating("norm_weight", norm_weight)
        if norm_weight.shape != (k,):
            raise ValueError(f"norm_weight has shape {tuple(norm_weight.shape)}; it must be ({k},)")
    if residual is not None and residual.shape != (*x.shape[:-1], width):
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}; it must be {(*x.shape[:-1], width)}"
        )
    for name, other in (("weight", weight), ("residual", residual)):
        if other is not None and other.dtype != x.dtype:
            raise TypeError(f"{name} is {other.dtype} and x {x.dtype}; give {name}.to({x.dtype})")
    if counters is not None:
        if counters.dtype != torch.int32:
            raise TypeError(f"counters is {counters.dtype}; give torch.int32 zeros")
        if counters.numel() < cdiv(width, 16) or not counters.is_contiguous():
            raise ValueError(
                f"counters has shape {tuple(counters.shape)}; give {cdiv(width, 16)} contiguous "
                f"zeros or more"
            )
    check_same_device(
        x=x, weight=weight, norm_weight=norm_weight, residual=residual, counters=counters
    )
    return x.numel() // k if k else x[..., 0].numel() if x.shape[-1] else 0
