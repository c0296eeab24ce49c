"""The grouped product: torch.nn.functional.grouped_mm, for every dtype, empty groups and all.

Groups are runs of rows (or of the sum's terms) that end at `offs`, on the device. Two products:

    rows    out[r] = a[r] · b[g]            for each row r of group g
    sums    out[g] = Σ a[r]ᵀ · b[r]         over the rows r of group g

With the gradient dout the first has da[r] = dout[r] · b[g]ᵀ, which is `rows`, and
db[g] = Σ a[r]ᵀ · dout[r], which is `sums`; the second has da[r] = b[r] · dout[g]ᵀ and
db[r] = a[r] · dout[g], both `rows`. FLOPs are 2 · M · N · K of each group: nothing is padded.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright_kernels._linear_losses import autocast
from tilewright_kernels._operator import Operator, check_floating, check_same_device
from tilewright_kernels.grouped_mm.launches import launch_clear, launch_rows, launch_sums

_OP = Operator("grouped_mm")


def grouped_mm_reference(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
    """The definition in plain torch, a loop over groups; arguments as `grouped_mm`.

    It waits for the device, to learn where groups end.
    """
    ends = offs.tolist()
    starts = [0, *ends[:-1]]
    groups = list(zip(starts, ends, strict=True))
    if a.dim() == 2 and b.dim() == 2:
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in groups])
    if a.dim() == 3:
        parts = [a[g] @ b[:, i:j] for g, (i, j) in enumerate(groups)]
        return torch.cat([*parts, b.new_zeros(a.shape[1], b.shape[1] - ends[-1])], dim=1)
    parts = [a[i:j] @ b[g] for g, (i, j) in enumerate(groups)]
    return torch.cat([*parts, a.new_zeros(a.shape[0] - ends[-1], b.shape[2])])


def _rows_fake(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[2])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _rows_grads(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    a, b, offs = ctx.saved_tensors
    da = grouped_rows(dout, b.mT, offs) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        return da, None, None
    # A gradient lies as its parameter does: else autograd copies it.
    transposed = b.stride(-2) == 1 and b.stride(-1) != 1
    db = grouped_sums(dout, a, offs).mT if transposed else grouped_sums(a, dout, offs)
    return da, db, None


@_OP.function(fake=_rows_fake, setup_context=_save, backward=_rows_grads)
def grouped_rows(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """out[r] = a[r] · b[g]: a [R, K], b [G, K, N] to [R, N], zeros in the rows of no group."""
    out = _rows_fake(a, b, offs)
    launch_rows(_OP, a, b, offs, out)
    launch_clear(_OP, out, offs)
    return out


def _sums_fake(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return a.new_empty(offs.shape[0], a.shape[1], b.shape[1])


def _sums_grads(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    a, b, offs = ctx.saved_tensors
    da = grouped_rows(b, dout.mT, offs) if ctx.needs_input_grad[0] else None
    db = grouped_rows(a, dout, offs) if ctx.needs_input_grad[1] else None
    return da, db, None


@_OP.function(fake=_sums_fake, setup_context=_save, backward=_sums_grads)
def grouped_sums(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """out[g] = Σ a[r]ᵀ · b[r]: a [R, M], b [R, N] to [G, M, N], zeros for a group of no rows."""
    out = _sums_fake(a, b, offs)
    launch_sums(_OP, a, b, offs, out)
    return out


def torch_grouped_mm(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """torch's own grouped product where it and its gradient are defined, else the definition.

    Groups end anywhere, so rows of both matrices and of the gradient are made to lie one after
    another: where the dimension of the groups is the one of adjacent numbers, torch's kernels want
    every group to begin at a multiple of 16 bytes, and look at that on the device only.
    """
    if a.dim() == 3:
        return torch_grouped_mm(b.mT, a.mT, offs).mT
    compiling = torch.compiler.is_compiling()
    # torch 2.11 traces its product in bfloat16 alone, and cannot trace the definition's lengths.
    if not _torch_multiplies(a, b) or (compiling and a.dtype != torch.bfloat16):
        return _every_group(a, b, offs) if compiling else grouped_mm_reference(a, b, offs=offs)
    # What torch leaves undefined, in the result and in the gradients, becomes zero.
    rows = a.mT if b.dim() == 2 else a
    inside = torch.arange(rows.shape[0], device=a.device)[:, None] < offs[-1]
    rows = rows.where(inside, 0).contiguous()
    if b.dim() == 2:
        out = F.grouped_mm(rows.mT, b.where(inside, 0).contiguous(), offs=offs)
        return _with_contiguous_gradient(out)
    return _with_contiguous_gradient(F.grouped_mm(rows, b, offs=offs)).where(inside, 0)


class _ContiguousGradient(torch.autograd.Function):
    """Nothing; its gradient is a copy where the result's does not lie row by row, as of a sum."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        (x,) = args
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Tensor:
        (dx,) = grad_outputs
        return dx.contiguous()


def _with_contiguous_gradient(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        # dynamo of torch 2.11 warns of the class; a product of a single row has no other layout.
        return (x.reshape(-1) * 1).view(x.shape)
    return cast(Tensor, _ContiguousGradient.apply(x))


def _torch_multiplies(a: Tensor, b: Tensor) -> bool:
    """Whether torch's product takes both operands, their rows made adjacent, and the gradient."""
    if not hasattr(F, "grouped_mm") or a.dtype == torch.float64 or 0 in (a.numel(), b.numel()):
        return False
    unit = 16 // a.element_size()
    if b.dim() == 2:
        return a.shape[0] % unit == 0 and b.shape[1] % unit == 0
    return a.shape[1] % unit == 0 and b.shape[2] % unit == 0 and torch_takes(b)


def _every_group(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """The definition with every group over all rows: G times the work, no lengths.

    Other groups' rows are masked before a product and after it, so that neither their values nor
    this matrix' reach each other's gradients, be they NaN.
    """
    if a.dim() == 3:
        return _every_group(b.mT, a.mT, offs).mT
    rows = torch.arange(b.shape[0] if b.dim() == 2 else a.shape[0], device=a.device)[:, None]
    starts = torch.cat([torch.zeros_like(offs[:1]), offs[:-1]])
    groups = [(rows >= starts[g]) & (rows < offs[g]) for g in range(offs.shape[0])]
    if b.dim() == 2:
        return torch.stack([a.where(own.mT, 0) @ b.where(own, 0) for own in groups])
    out = a.new_zeros(a.shape[0], b.shape[2])
    for g, own in enumerate(groups):
        out = (a.where(own, 0) @ b[g]).where(own, out)
    return out


def torch_takes(x: Tensor) -> bool:
    """Whether torch's grouped product takes an operand; a version without it takes none."""
    if not hasattr(F, "grouped_mm") or x.dtype == torch.float64 or x.numel() == 0:
        return False
    unit = 16 // x.element_size()
    rows, cols = x.stride()[-2:]
    by_rows = cols == 1 and rows >= x.shape[-1] and rows % unit == 0
    by_columns = rows == 1 and cols >= x.shape[-2] and cols % unit == 0
    # What is traced has no address yet; a compiler's buffers and whole parameters are aligned.
    aligned = torch.compiler.is_compiling() or x.data_ptr() % 16 == 0
    return aligned and (by_rows or by_columns)


def grouped_mm(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
    """The products of groups, which end at `offs` along the dimension that has them.

    As torch.nn.functional.grouped_mm, in every floating dtype and for any strides and sizes:

        a [M, K],     b [G, K, N]     rows of a: out [M, N], rows of group g times b[g]
        a [M, K],     b [K, N]        terms of the sum: out [G, M, N]
        a [G, M, K],  b [K, N]        columns of b: out [M, N], a[g] times columns of group g

    Nothing waits for the device, and no group is padded: a launch has a program for every tile that
    there may be at most, or on Hopper one a multiprocessor, which walks them. Rows (or columns)
    from offs[-1] on are no group's: they are not read, and zero in the result and in the gradient,
    where torch leaves them undefined.

    Where torch computes, sizes that its own product or the gradient of that refuses take a loop
    over groups, which does wait; compiled, they take every group over all rows.

    Args:
        a: float16, bfloat16, float32 or float64.
        b: of a's dtype. Under autocast both are cast first.
        offs: [G] int32, on their device: the end of each group, which is where the next begins;
            increasing, equal for an empty group, at most the size of that dimension. It is not
            read here, so that wrong ones are not found out.

    Returns:
        A new tensor of a's dtype. Differentiable once, by a and b; the gradients are grouped
        products again.

    Raises:
        ValueError: shapes that do not fit, two batches (torch.bmm multiplies those), no group,
            tensors on different devices.
        TypeError: dtypes that differ or are not floating point; offs that is not int32.
    """
    a, b = autocast(a, b)
    _check(a, b, offs)
    offs = offs.contiguous()
    if not _OP.uses_triton(a):
        return torch_grouped_mm(a, b, offs)
    if a.dim() == 3:
        return grouped_rows(b.mT, a.mT, offs).mT
    if b.dim() == 3:
        return grouped_rows(a, b, offs)
    return grouped_sums(a.mT, b, offs)


def _check(a: Tensor, b: Tensor, offs: Tensor) -> None:
    check_floating("a", a)
    if a.dim() not in (2, 3) or b.dim() not in (2, 3):
        raise ValueError(
            f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; each must be a matrix or, one "
            f"of them, a batch of matrices"
        )
    if a.dim() == b.dim() == 3:
        raise ValueError(
            "a and b are both batches, in which no group ends at offs; use torch.bmm(a, b)"
        )
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; a's last dimension must be b's "
            f"last but one"
        )
    if offs.dtype != torch.int32:
        raise TypeError(f"offs is {offs.dtype}; give offs.to(torch.int32)")
    if offs.dim() != 1 or offs.shape[0] == 0:
        raise ValueError(
            f"offs has shape {tuple(offs.shape)}; it must be [groups], the end of each, one at "
            f"least, for example counts.cumsum(0, dtype=torch.int32)"
        )
    batch = a if a.dim() == 3 else b
    if batch.dim() == 3 and batch.shape[0] != offs.shape[0]:
        raise ValueError(
            f"{'a' if batch is a else 'b'} has {batch.shape[0]} matrices and offs ends "
            f"{offs.shape[0]} groups; give one matrix a group"
        )
    if a.dtype != b.dtype:
        raise TypeError(f"b is {b.dtype} and a {a.dtype}; give b.to(a.dtype)")
    check_same_device(a=a, b=b, offs=offs)
