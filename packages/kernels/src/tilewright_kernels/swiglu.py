"""The gated unit of most decoders' MLPs (Shazeer 2020, arXiv:2002.05202).

    y = silu(gate) · up          silu(g) = g · s,  s = 1 / (1 + e⁻ᵍ)

With the gradient dy it is

    dgate = dy · up · s · (1 + g · (1 - s))          dup = dy · silu(gate)

Forward reads two tensors and writes one, backward reads three and writes two. The activation is
computed anew in backward, so that nothing is kept but the inputs. Both halves may lie in one tensor
[..., 2I], as a joint projection writes them: they are read where they are, and their gradient is
one such tensor, written where it belongs. Everything is computed in float32 (float64 for float64)
and rounded once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright_kernels._launch import RowTile, cdiv, row_tile
from tilewright_kernels._math import silu, silu_grad
from tilewright_kernels._operator import (
    Operator,
    accumulator,
    as_rows,
    check_floating,
    check_same_device,
)
from tilewright_kernels._triton import tl, triton

MAX_BLOCK_N = 2048
"""Widest tile. Nothing is reduced along a row, so wide rows are cut into several programs."""

_OP = Operator("swiglu")


def swiglu_reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """The definition in plain torch; arguments as `swiglu`."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    g = gate if gate.dtype == torch.float64 else gate.float()
    return (F.silu(g) * up).to(gate.dtype).contiguous()


@triton.jit
def _swiglu_fwd_kernel(
    gate_ptr, up_ptr, y_ptr,
    gate_row_stride, up_row_stride, num_rows, n_cols,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = silu(gate) · up for a tile of ROWS x BLOCK_N; two reads, one write an element."""
    rows, cols, mask = _tile(num_rows, n_cols, ROWS, BLOCK_N)
    gate = tl.load(gate_ptr + rows * gate_row_stride + cols, mask=mask, other=0.0)
    up = tl.load(up_ptr + rows * up_row_stride + cols, mask=mask, other=0.0)
    tl.store(y_ptr + rows * n_cols + cols, silu(gate.to(ACC)) * up.to(ACC), mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
    dy_row_stride, gate_row_stride, up_row_stride, grad_row_stride, num_rows, n_cols,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dgate and dup for a tile of ROWS x BLOCK_N; three reads, two writes an element."""
    rows, cols, mask = _tile(num_rows, n_cols, ROWS, BLOCK_N)
    dy = tl.load(dy_ptr + rows * dy_row_stride + cols, mask=mask, other=0.0)
    gate = tl.load(gate_ptr + rows * gate_row_stride + cols, mask=mask, other=0.0)
    up = tl.load(up_ptr + rows * up_row_stride + cols, mask=mask, other=0.0)
    dy, gate = dy.to(ACC), gate.to(ACC)
    offsets = rows * grad_row_stride + cols
    tl.store(dgate_ptr + offsets, dy * up.to(ACC) * silu_grad(gate), mask=mask)
    tl.store(dup_ptr + offsets, dy * silu(gate), mask=mask)


@triton.jit
def _tile(num_rows, n_cols, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows [ROWS, 1] int64, columns [1, BLOCK_N] and mask of this program's tile.

    Neighbours in the launch are neighbours in a row: what runs at one time lies close in memory.
    """
    col_tiles = tl.cdiv(n_cols, BLOCK_N)
    tile_row = tl.program_id(0) // col_tiles
    rows = (tile_row.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = (tl.program_id(0) % col_tiles * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    return rows, cols, (rows < num_rows) & (cols < n_cols)


def _grid(rows: Tensor) -> tuple[tuple[int], RowTile]:
    """One program a tile of up to 2048 elements, eight a thread: 16 bytes of bfloat16 a load.

    Both kernels compile to 32 registers a thread for sm_90 in bfloat16, so that a multiprocessor
    holds eight programs of 256 threads, with 64 KiB of loads in flight forward and 96 KiB backward.
    About 20 KiB cover the latency of an H200's memory, so a quarter of that would do.
    """
    num_rows, width = rows.shape
    tile = row_tile(min(width, MAX_BLOCK_N), elements=MAX_BLOCK_N, elements_per_thread=8)
    return (cdiv(num_rows, tile.ROWS) * cdiv(width, tile.BLOCK_N),), tile


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gate and up as [rows, I], views of one tensor where up is None."""
    if up is None:
        return _split(as_rows(gate, gate.shape[-1]))
    return as_rows(gate, gate.shape[-1]), as_rows(up, up.shape[-1])


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    width = rows.shape[-1] // 2
    return rows[:, :width], rows[:, width:]


def _backward_fake(dy: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if up is None:
        return dgate, gate.new_empty(0)
    return dgate, torch.empty_like(up, memory_format=torch.contiguous_format)


@_OP.function(fake=_backward_fake)
def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launch the backward: gradients like gate and like up (empty where gate holds both halves)."""
    dgate, dup = _backward_fake(dy, gate, up)
    if gate.numel() == 0:
        return dgate, dup
    gate_rows, up_rows = _halves(gate, up)
    dgate_rows, dup_rows = _halves(dgate, None if up is None else dup)
    dy_rows = as_rows(dy, dy.shape[-1])
    grid, tile = _grid(gate_rows)
    _OP.launch(
        _swiglu_bwd_kernel, grid, dy_rows, gate_rows, up_rows, dgate_rows, dup_rows,
        dy_rows.stride(0), gate_rows.stride(0), up_rows.stride(0), dgate_rows.stride(0),
        *gate_rows.shape, ACC=accumulator(gate.dtype), **tile._asdict(),
    )  # fmt: skip
    return dgate, dup


def _forward_fake(gate: Tensor, up: Tensor | None) -> Tensor:
    if up is None:
        return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // 2))
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grads(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    gate, up = ctx.saved_tensors
    dgate, dup = swiglu_backward(dy, gate, up)
    return dgate, None if up is None else dup


@_OP.function(fake=_forward_fake, setup_context=_save, backward=_grads)
def swiglu_forward(gate: Tensor, up: Tensor | None) -> Tensor:
    """Launch the forward: y [..., I] from two tensors [..., I] or one [..., 2I]."""
    y = _forward_fake(gate, up)
    if y.numel() == 0:
        return y
    gate_rows, up_rows = _halves(gate, up)
    grid, tile = _grid(gate_rows)
    _OP.launch(
        _swiglu_fwd_kernel, grid, gate_rows, up_rows, y,
        gate_rows.stride(0), up_rows.stride(0), *gate_rows.shape,
        ACC=accumulator(gate.dtype), **tile._asdict(),
    )  # fmt: skip
    return y


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Gated linear unit with SiLU, after its projections.

    y = silu(gate) · up                                     (Shazeer 2020, arXiv:2002.05202)

    Args:
        gate: [..., I] in float16, bfloat16, float32 or float64; or, where up is None, [..., 2I]
            with the gate in the first half. Rows may lie at any distance (slices, `chunk`): only
            tensors that are no [rows, I] view, or have gaps within a row, are copied first.
        up: like gate in shape and dtype, at any row distance of its own, or None.

    Returns:
        [..., I], contiguous. Differentiable once; the gradient of a [..., 2I] gate is one tensor,
        written once, where the gradients of two `chunk` views would have to be joined by a copy.

    Raises:
        ValueError: shapes that differ, an odd last dimension where up is None, tensors on
            different devices.
        TypeError: dtypes that differ or are not floating point.
    """
    check_floating("gate", gate)
    if gate.dim() == 0:
        raise ValueError("gate is a scalar; it must have a last dimension, as in gate[None]")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(
                f"gate has shape {tuple(gate.shape)}; without up its last dimension holds both "
                f"halves and must be even, so give up, or both in one tensor [..., 2I]"
            )
    else:
        _check_up(gate, up)
    if not _OP.uses_triton(gate):
        return swiglu_reference(gate, up)
    return swiglu_forward(gate, up)


class SwiGLU(torch.nn.Module):
    """`swiglu` as a module, without parameters: goes where a Sequential wants an activation."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """[..., 2I], or two tensors [..., I], to [..., I]."""
        return swiglu(gate, up)


def _check_up(gate: Tensor, up: Tensor) -> None:
    if up.shape != gate.shape:
        raise ValueError(
            f"gate has shape {tuple(gate.shape)} and up {tuple(up.shape)}; they must be equal, "
            f"for example up.expand_as(gate)"
        )
    if up.dtype != gate.dtype:
        raise TypeError(
            f"gate is {gate.dtype} and up {up.dtype}; they must be equal, for example "
            f"up.to({gate.dtype})"
        )
    check_same_device(gate=gate, up=up)
