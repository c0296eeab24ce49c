"""What Muon does element by element, in Triton: three launches a batch of matrices.

    momentum    B ← B + (1 - μ)(g - B),  u = B + (1 - μ)(g - B) with Nesterov, else B;  Σ u²
    normalize   X = SCALE · u / max(√Σ u², ε)
    update      p ← (1 - γ λ) p - γ s X            s from the shape of the matrix

For float32 they move 14, 4 and 10 bytes an element: g, B, B and u in bfloat16; u and X in float16,
in the same memory; X, p and p. Between the second and the third are the products. A program takes a
tile of one matrix, found through the tables of `_tables`. Tall matrices are written to X, and read
from it, transposed, through registers, so that one batch holds W and Wᵀ.
"""

from collections.abc import Sequence
from functools import reduce
from itertools import chain
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright_kernels.authoring import Operator, accumulator, cdiv, tl, triton
from tilewright_optim._muon_matrices import Batch
from tilewright_optim._normalize_kernel import normalize
from tilewright_optim._rounding import join_halves, split_halves
from tilewright_optim._tables import PointerTables, addresses, triton_type

TILE = {"ROWS": 32, "COLS": 64, "num_warps": 4}
"""Of momentum and update: 16 elements a thread."""

OPERATOR = Operator("muon")


class Tensors(NamedTuple):
    """Contiguous tensors of one device and one dtype a column; row i belongs to parameter i."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    buffers: Sequence[Tensor]
    lows: Sequence[Tensor]
    """int16 halves of exact masters; empty without them."""


class Sent(NamedTuple):
    """The tables of one batch on the device."""

    work: Tensor
    """Columns of p, B and the low halves."""
    grads: Tensor
    aligned: tuple[bool, ...]
    """Whether all wide ones, and all tall ones, begin at multiples of 16 bytes."""


@triton.jit
def _tile(rows, cols, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Matrix of this program, offsets of its tile in the parameter and in X, and their mask."""
    tiles_c = tl.cdiv(cols, COLS)
    tiles = tl.cdiv(rows, ROWS) * tiles_c
    matrix, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    r = (tile // tiles_c * ROWS + tl.arange(0, ROWS))[:, None]
    c = (tile % tiles_c * COLS + tl.arange(0, COLS))[None, :]
    mask = (r < rows) & (c < cols)
    at = r.to(tl.int64) * cols + c
    at_x = c.to(tl.int64) * rows + r if TRANSPOSED else at
    return matrix, at, at_x, mask


@triton.jit
def _pointer(table_ptr, matrix, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    # Not element(…, 0): the sum with 0 is folded away, and the hint with it.
    ptr = tl.load(table_ptr + matrix).to(tl.pointer_type(DTYPE))  # pyrefly: ignore[bad-argument-type]
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit(do_not_specialize=["num_matrices", "first"])
def _momentum_kernel(
    work_ptr, grads_ptr, num_matrices, first, x_ptr, squares_ptr, grad_scale_ptr, found_inf_ptr,
    rows, cols,
    # pyrefly: ignore[not-a-type]
    momentum: tl.float64,
    GRAD: tl.constexpr, BUFFER: tl.constexpr, NESTEROV: tl.constexpr, TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Update one tile of a momentum buffer; write u to X, and Σ u² of the tile."""
    if found_inf_ptr is not None:  # noqa: SIM102 (Triton evaluates both sides of `and`)
        if tl.load(found_inf_ptr) != 0:
            return
    matrix, at, at_x, mask = _tile(rows, cols, TRANSPOSED, ROWS, COLS)
    g_ptr = _pointer(grads_ptr, first + matrix, GRAD, ALIGNED)
    buffer_ptr = _pointer(work_ptr + num_matrices, first + matrix, BUFFER, ALIGNED)
    g = tl.load(g_ptr + at, mask=mask, other=0.0).to(ACC)
    buffer = tl.load(buffer_ptr + at, mask=mask, other=0.0).to(ACC)
    if grad_scale_ptr is not None:
        g = g / tl.load(grad_scale_ptr).to(ACC)
    # full() and not cast: the interpreter passes Python floats, which cast makes float32.
    weight = tl.full((), 1 - momentum, tl.float64).to(ACC)
    buffer += weight * (g - buffer)
    tl.store(buffer_ptr + at, buffer.to(BUFFER), mask=mask)
    u = buffer
    if NESTEROV:
        u += weight * (g - buffer)
    # Rounded first, so that the norm is that of what is iterated.
    u = u.to(tl.float32).to(tl.bfloat16)
    x_ptr += (first + matrix).to(tl.int64) * rows * cols
    tl.store(x_ptr + at_x, u, mask=mask)
    u = u.to(tl.float32)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(u * u))


@triton.jit(do_not_specialize=["num_matrices", "first"])
def _update_kernel(
    work_ptr, num_matrices, first, x_ptr, lr_ptr, found_inf_ptr, rows, cols,
    # pyrefly: ignore[not-a-type]
    lr: tl.float64, weight_decay: tl.float64, factor: tl.float64,
    PARAM: tl.constexpr, CAUTIOUS: tl.constexpr, EXACT: tl.constexpr, TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Decay and update one tile of a parameter; with EXACT, its halves are the second column on."""
    if found_inf_ptr is not None:  # noqa: SIM102
        if tl.load(found_inf_ptr) != 0:
            return
    rate = tl.full((), lr, tl.float64)
    if lr_ptr is not None:
        rate = tl.load(lr_ptr).to(tl.float64)
    decay = (rate * weight_decay).to(ACC)
    step_size = (rate * factor).to(ACC)
    matrix, at, at_x, mask = _tile(rows, cols, TRANSPOSED, ROWS, COLS)
    x_ptr += (first + matrix).to(tl.int64) * rows * cols
    x = tl.load(x_ptr + at_x, mask=mask, other=0.0).to(ACC)
    p_ptr = _pointer(work_ptr, first + matrix, PARAM, ALIGNED)
    low_ptr = p_ptr
    if EXACT:
        low_ptr = _pointer(work_ptr + 2 * num_matrices, first + matrix, tl.int16, ALIGNED)
        high = tl.load(p_ptr + at, mask=mask, other=0)
        p = join_halves(high, tl.load(low_ptr + at, mask=mask, other=0))
    else:
        p = tl.load(p_ptr + at, mask=mask, other=0.0).to(ACC)
    if CAUTIOUS:
        p -= tl.where(x * p >= 0, decay, 0.0) * p
    else:
        p -= decay * p
    p -= step_size * x
    if EXACT:
        high, low = split_halves(p)
        tl.store(p_ptr + at, high, mask=mask)
        tl.store(low_ptr + at, low, mask=mask)
    else:
        tl.store(p_ptr + at, p.to(PARAM), mask=mask)


def send(batches: Sequence[Batch], tables: Sequence[PointerTables], tensors: Tensors) -> list[Sent]:
    """What the kernels read of each batch, from the tables that it had in the step before."""
    order = (tensors.params, tensors.buffers, tensors.lows, tensors.grads)
    places = [(addresses(column), column[0].element_size()) for column in order if column]
    sent = []
    for batch, own in zip(batches, tables, strict=True):
        members = batch.wide + batch.tall
        columns = [[at[x.parameter] + x.offset * size for x in members] for at, size in places]
        work, grads, _ = own.get(columns[:-1], [1] * len(members), columns[-1])
        wide = len(batch.wide)
        either = [
            chain.from_iterable(c[part] for c in columns)
            for part in (slice(wide), slice(wide, None))
        ]
        sent.append(Sent(work, grads, tuple(reduce(or_, part, 0) % 16 == 0 for part in either)))
    return sent


def momentum_and_normalize(
    batch: Batch, tensors: Tensors, sent: Sent, *, momentum: float, nesterov: bool,
    eps: float, grad_scale: Tensor | None, found_inf: Tensor | None,
) -> Tensor:  # fmt: skip
    """Advance the buffers of a batch; X of `iterate`, [B, n, m] in float16."""
    members = batch.wide + batch.tall
    u = tensors.grads[0].new_empty((len(members), batch.n, batch.m), dtype=torch.bfloat16)
    sums = []
    for part, transposed in ((batch.wide, False), (batch.tall, True)):
        if not part:
            continue
        first = len(batch.wide) if transposed else 0
        rows, cols = part[0].rows, part[0].cols
        tiles = cdiv(rows, TILE["ROWS"]) * cdiv(cols, TILE["COLS"])
        squares = u.new_empty((len(part), tiles), dtype=torch.float32)
        OPERATOR.launch(
            _momentum_kernel, (len(part) * tiles,), sent.work, sent.grads, len(members), first, u,
            squares, grad_scale, found_inf, rows, cols, momentum,
            GRAD=triton_type(tensors.grads[0].dtype), BUFFER=triton_type(tensors.buffers[0].dtype),
            NESTEROV=nesterov, TRANSPOSED=transposed, ALIGNED=sent.aligned[transposed],
            ACC=accumulator(tensors.params[0].dtype), **TILE,
        )  # fmt: skip
        sums.append(squares.sum(1))
    x = u.view(torch.float16)
    normalize(u, x, torch.cat(sums), eps)
    return x


def update(
    batch: Batch, tensors: Tensors, sent: Sent, x: Tensor, *, lr: float | Tensor,
    weight_decay: float, factor: Any, cautious: bool, found_inf: Tensor | None,
) -> None:  # fmt: skip
    """Decay the parameters of a batch and subtract X from them.

    Args:
        batch: the matrices.
        tensors: whose they are.
        sent: as `momentum_and_normalize` had it.
        x: [B, n, m], of `iterate`.
        lr: a float, or a tensor of one element on the device.
        weight_decay: in units of lr.
        factor: of (rows, cols), what lr is multiplied by.
        cautious: decay only where the update makes the parameter smaller.
        found_inf: where it is not 0 nothing changes; None is 0.
    """
    members = batch.wide + batch.tall
    exact = bool(tensors.lows)
    for part, transposed in ((batch.wide, False), (batch.tall, True)):
        if not part:
            continue
        first = len(batch.wide) if transposed else 0
        rows, cols = part[0].rows, part[0].cols
        tiles = cdiv(rows, TILE["ROWS"]) * cdiv(cols, TILE["COLS"])
        OPERATOR.launch(
            _update_kernel, (len(part) * tiles,), sent.work, len(members), first, x,
            lr if isinstance(lr, Tensor) else None, found_inf, rows, cols,
            0.0 if isinstance(lr, Tensor) else lr, weight_decay, factor(rows, cols),
            PARAM=tl.int16 if exact else triton_type(tensors.params[0].dtype),
            CAUTIOUS=cautious, EXACT=exact, TRANSPOSED=transposed,
            ALIGNED=sent.aligned[transposed], ACC=accumulator(tensors.params[0].dtype), **TILE,
        )  # fmt: skip
