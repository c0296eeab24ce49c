"""Losses of input · weightᵀ and their gradients, a chunk of tokens at a time.

    logits = x · Wᵀ + b         G = d loss / d logits         dx = G · W    dW = Gᵀ · x    db = Σ G

The logits of all tokens are by far the largest tensor of a training step. Here those of one chunk
exist, in a workspace where G then overwrites them: a product, a kernel over rows, two products.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv, num_programs
from tilewright_kernels._operator import Operator, as_rows
from tilewright_kernels._softmax_gradient import Loss, softmax_gradient

LEAST_BYTES = 64 * 2**20
"""Without a budget, logits up to this size are one chunk."""

ROUNDED_SUMS = 8
"""Chunks whose weight gradients are added up in half precision; those of more in float32.

Every sum is rounded. With few the error stays within twice that of a single product; with hundreds
a chunk's share would be rounded away altogether.
"""

LINE_BYTES = 128
"""Rows of the workspace start at multiples of this, so that 16 bytes can be loaded at once."""

VECTOR_BYTES = 16
"""Products over a multiple of this many bytes of classes are fast; the few others go by themselves.

4096 x 2048 x 50257 in bfloat16 took 17 ms with whole products on an H200, and 4.2 ms where
torch.compile pads them.
"""


class Head(NamedTuple):
    """What makes logits of hidden states: weight [V, H], and bias [V] or None."""

    weight: Tensor
    bias: Tensor | None


def linear_losses(
    op: Operator, x: Tensor, head: Head, target: Tensor, loss: Loss, chunk_bytes: int | None,
    means: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Losses [...] of x [..., H] and target [...]; the mean of each token's logits into means."""
    losses = target.new_empty(target.shape, dtype=sum_dtype(x))
    x, targets = as_rows(x, x.shape[-1]), target.reshape(-1)
    for chunk, logits in _logit_chunks(x, head, _rows(x, head, chunk_bytes)):
        chunk_means = None if means is None else means.view(-1)[chunk]
        chunk_losses = losses.view(-1)[chunk]
        softmax_gradient(op, logits, targets[chunk], None, chunk_losses, chunk_means, loss)
    return losses


def linear_gradients(
    op: Operator, x: Tensor, head: Head, target: Tensor, factor: Tensor, loss: Loss,
    chunk_bytes: int | None, needed: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses, and the gradients of Σ factor · loss, empty where they are not needed.

    Args:
        op: for whom the launches count.
        x: [..., H].
        head: weight and bias.
        target: [...] classes.
        factor: [...] gradient of each loss.
        loss: which one.
        chunk_bytes: for the logits of a chunk, or None.
        needed: whether the gradients of x, weight and bias are.
    """
    dx, dweight, dbias = empty_gradients(x, head.weight, head.bias, *needed)
    losses = target.new_empty(target.shape, dtype=sum_dtype(x))
    x, targets, factors = as_rows(x, x.shape[-1]), target.reshape(-1), factor.reshape(-1)
    rows = _rows(x, head, chunk_bytes)
    few = len(x) <= ROUNDED_SUMS * rows
    dweight_sum = dweight if few else dweight.to(losses.dtype)
    dbias_sum = torch.zeros_like(dbias, dtype=losses.dtype)
    if len(x) == 0:
        dweight.zero_()
    for chunk, logits in _logit_chunks(x, head, rows):
        chunk_losses = losses.view(-1)[chunk]
        softmax_gradient(op, logits, targets[chunk], factors[chunk], chunk_losses, None, loss)
        for classes in _class_parts(head, x):
            g, first = logits[:, classes], classes.stop == len(head.weight)
            if needed[0]:
                _add_product(dx.view(x.shape)[chunk], g, head.weight[classes], keep=not first)
            if needed[1]:
                _add_product(dweight_sum[classes], g.T, x[chunk], keep=chunk.start > 0)
        if needed[2]:
            dbias_sum += logits.sum(0, dtype=losses.dtype)
    if dweight_sum is not dweight:
        dweight.copy_(dweight_sum)
    return losses, dx, dweight, dbias.copy_(dbias_sum)


def sum_dtype(x: Tensor) -> torch.dtype:
    """Type that losses are computed and sums are held in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None,
    need_dx: bool, need_dweight: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Memory for three gradients, of no elements where they are not needed."""
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else x.new_empty(0),
        torch.empty_like(weight) if need_dweight else weight.new_empty(0),
        torch.empty_like(bias) if need_dbias and bias is not None else weight.new_empty(0),
    )


def chunk_rows(
    tokens: int, width: int, row_bytes: int, chunk_bytes: int | None, processors: int
) -> int:
    """Tokens a chunk, such that the logits of a chunk fit in chunk_bytes.

    Of the sizes between half of what fits and all of it, the one whose products G · W take the
    fewest waves of 128 x 256 tiles over the multiprocessors: a wave that occupies few of them takes
    as long as one that occupies all.

    Args:
        tokens: of all chunks together.
        width: of the hidden states.
        row_bytes: of one token's logits in the workspace.
        chunk_bytes: None takes a fifth of the logits, and no more than ROUNDED_SUMS chunks.
        processors: multiprocessors of the device.
    """
    least = 1
    if chunk_bytes is None:
        chunk_bytes = max(LEAST_BYTES, tokens * row_bytes // 5)
        least = cdiv(tokens, ROUNDED_SUMS)
    fitting = chunk_bytes // row_bytes
    if fitting >= tokens or fitting < 128:
        return max(1, least, min(fitting, tokens))

    def waves(rows: int) -> int:
        return cdiv(cdiv(rows, 128) * cdiv(width, 256), processors)

    whole = fitting // 128 * 128
    sizes = range(whole, whole // 2, -128)
    return max(
        least, min(sizes, key=lambda rows: tokens // rows * waves(rows) + waves(tokens % rows))
    )


def _rows(x: Tensor, head: Head, chunk_bytes: int | None) -> int:
    row_bytes = cdiv(len(head.weight) * x.element_size(), LINE_BYTES) * LINE_BYTES
    processors = num_programs(x.device, per_sm=1)
    return chunk_rows(len(x), x.shape[-1], row_bytes, chunk_bytes, processors)


def _logit_chunks(x: Tensor, head: Head, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of x [T, H], each with its logits, which the next slice's overwrite."""
    width = len(head.weight)
    line = LINE_BYTES // x.element_size()
    workspace = x.new_empty(rows, cdiv(width, line) * line)[:, :width]
    for start in range(0, len(x), rows):
        chunk = slice(start, min(start + rows, len(x)))
        logits = workspace[: chunk.stop - start]
        for classes in _class_parts(head, x):
            part, weight = logits[:, classes], head.weight[classes].T
            if head.bias is None:
                torch.mm(x[chunk], weight, out=part)
            else:
                torch.addmm(head.bias[classes], x[chunk], weight, out=part)
        yield chunk, logits


def _class_parts(head: Head, x: Tensor) -> list[slice]:
    """The last classes, too few for a vector, and all others; one of them may be all there are.

    The few come first: what is added to is rounded, and of the few that is next to nothing.
    """
    classes, vector = len(head.weight), VECTOR_BYTES // x.element_size()
    whole = classes // vector * vector
    parts = [slice(whole, classes), slice(0, whole)]
    return [part for part in parts if part.stop > part.start]


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, keep: bool) -> None:
    """total += a · b, or total = a · b where what it holds is not to be kept."""
    beta = int(keep)
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)
