"""What the losses of a router need to know of its logits, in one pass over them.

    P_e = Σ_t m_t · p_te,  p = softmax(x)          Z = Σ_t m_t · lse_t²,  lse = log Σ_e exp x_te

With the gradients dP and dZ it is

    dx_te = m_t · p_te · (dP_e - Σ_i p_ti dP_i + 2 · lse_t · dZ)

Forward reads x, backward reads it again and writes dx: the probabilities of all tokens are never in
memory. Programs walk blocks of tokens and keep a sum an expert; a second launch adds the programs'
sums in a fixed order, so two runs give the same bits.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright_kernels._column_sum import column_sum
from tilewright_kernels._launch import cdiv, next_power_of_2, num_programs
from tilewright_kernels._operator import (
    Operator,
    accumulator,
    as_rows,
    check_floating,
    check_same_device,
)
from tilewright_kernels._triton import tl, triton

TILE, MOST_TOKENS = 2048, 128
"""Elements of tokens x experts that a program of four warps holds; its tokens at most."""

_OP = Operator("router_statistics")


class RouterStatistics(NamedTuple):
    """Sums over tokens. Those of several layers or ranks add up."""

    probability_sum: Tensor
    """[E] float32 (float64 for float64): Σ softmax(logits), P above."""
    square_lse_sum: Tensor
    """[] of the same dtype: Σ logsumexp(logits)², Z above."""


def router_statistics_reference(
    logits: Tensor, token_weights: Tensor | None = None
) -> RouterStatistics:
    """The definition in plain torch; arguments as `router_statistics`."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    m = x.new_ones(len(x))
    if token_weights is not None:
        m = token_weights.to(x.dtype)
        x = x.where(m[:, None] != 0, 0)  # what counts 0 may be NaN, and 0 · NaN is
    return RouterStatistics((m[:, None] * x.softmax(-1)).sum(0), (m * x.logsumexp(-1) ** 2).sum())


@triton.jit
def _load_softmax(
    logits_ptr, token_weights_ptr, row_stride, tokens, num_tokens, n_cols,
    ACC: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """m, softmax and lse of a block of tokens; m = 0 outside.

    Tokens of weight 0 are not read: they may hold anything, infinities too.
    """
    cols = tl.arange(0, BLOCK_E)
    if token_weights_ptr is None:
        m = (tokens < num_tokens).to(ACC)
    else:
        m = tl.load(token_weights_ptr + tokens, mask=tokens < num_tokens, other=0).to(ACC)
    inside = (m != 0)[:, None] & (cols < n_cols)[None, :]
    at = tokens.to(tl.int64)[:, None] * row_stride + cols[None, :]
    x = tl.load(logits_ptr + at, mask=inside, other=0.0).to(ACC)
    x = tl.where((cols < n_cols)[None, :], x, -float("inf"))
    peak = tl.max(x, axis=1)
    e = tl.exp(x - peak[:, None])
    total = tl.sum(e, axis=1)
    return m, e / total[:, None], peak + tl.log(total)


@triton.jit
def _router_statistics_fwd_kernel(
    logits_ptr, token_weights_ptr, sums_ptr, squares_ptr, row_stride, num_tokens, n_cols,
    ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Of each program the sums of p [E] and of lse²; x in."""
    program, cols = tl.program_id(0), tl.arange(0, BLOCK_E)
    sums, squares = tl.zeros([BLOCK_E], dtype=ACC), tl.zeros([BLOCK_T], dtype=ACC)
    step = tl.num_programs(0) * BLOCK_T
    for start in range(program * BLOCK_T, num_tokens, step):
        tokens = start + tl.arange(0, BLOCK_T)
        m, p, lse = _load_softmax(
            logits_ptr, token_weights_ptr, row_stride, tokens, num_tokens, n_cols, ACC, BLOCK_E
        )
        sums += tl.sum(m[:, None] * p, axis=0)
        squares += m * lse * lse
    tl.store(sums_ptr + program * n_cols + cols, sums, mask=cols < n_cols)
    tl.store(squares_ptr + program, tl.sum(squares))


@triton.jit
def _router_statistics_bwd_kernel(
    logits_ptr, token_weights_ptr, dsums_ptr, dsquare_ptr, dlogits_ptr,
    row_stride, num_tokens, n_cols,
    ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dx of a block of tokens; x in, dx out."""
    tokens, cols = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    m, p, lse = _load_softmax(
        logits_ptr, token_weights_ptr, row_stride, tokens, num_tokens, n_cols, ACC, BLOCK_E
    )
    slope = tl.zeros([BLOCK_E], dtype=ACC)
    if dsums_ptr is not None:
        slope += tl.load(dsums_ptr + cols, mask=cols < n_cols, other=0.0).to(ACC)
    along = -tl.sum(p * slope[None, :], axis=1)
    if dsquare_ptr is not None:
        along += 2 * lse * tl.load(dsquare_ptr).to(ACC)
    dx = m[:, None] * p * (slope[None, :] + along[:, None])
    inside = (tokens < num_tokens)[:, None] & (cols < n_cols)[None, :]
    tl.store(dlogits_ptr + tokens.to(tl.int64)[:, None] * n_cols + cols[None, :], dx, mask=inside)


@cache
def _tile(num_experts: int) -> dict[str, int]:
    block_e = next_power_of_2(num_experts)
    block_t = max(1, min(MOST_TOKENS, TILE // block_e))
    return {"BLOCK_T": block_t, "BLOCK_E": block_e, "num_warps": 4}


def _backward_fake(
    dsums: Tensor | None, dsquare: Tensor | None, logits: Tensor, token_weights: Tensor | None
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_OP.function(fake=_backward_fake)
def router_statistics_backward(
    dsums: Tensor | None, dsquare: Tensor | None, logits: Tensor, token_weights: Tensor | None
) -> Tensor:
    """Launch the backward: dlogits [T, E]."""
    dlogits, (num_tokens, num_experts) = torch.empty_like(logits).contiguous(), logits.shape
    rows, tile = as_rows(logits, num_experts), _tile(num_experts)
    _OP.launch(
        _router_statistics_bwd_kernel, (cdiv(num_tokens, tile["BLOCK_T"]),),
        rows, token_weights, None if dsums is None else dsums.contiguous(), dsquare, dlogits,
        rows.stride(0), num_tokens, num_experts, ACC=accumulator(logits.dtype), **tile,
    )  # fmt: skip
    return dlogits


def _forward_fake(logits: Tensor, token_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    sums = torch.empty(logits.shape[1], dtype=dtype, device=logits.device)
    return sums, sums.new_empty(())


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _grads(ctx: Any, dsums: Tensor | None, dsquare: Tensor | None) -> tuple[Tensor | None, None]:
    if dsums is None and dsquare is None:
        return None, None
    return router_statistics_backward(dsums, dsquare, *ctx.saved_tensors), None


@_OP.function(fake=_forward_fake, setup_context=_save, backward=_grads)
def router_statistics_forward(
    logits: Tensor, token_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launch the forward: the two sums."""
    num_tokens, num_experts = logits.shape
    rows, tile = as_rows(logits, num_experts), _tile(num_experts)
    sums, square = _forward_fake(logits, token_weights)
    programs = num_programs(logits.device, per_sm=4)
    programs = max(1, min(cdiv(num_tokens, tile["BLOCK_T"]), programs))
    partial_sums, squares = sums.new_empty(programs, num_experts), sums.new_empty(programs, 1)
    _OP.launch(
        _router_statistics_fwd_kernel, (programs,), rows, token_weights, partial_sums, squares,
        rows.stride(0), num_tokens, num_experts, ACC=accumulator(logits.dtype), **tile,
    )  # fmt: skip
    column_sum(_OP, partial_sums, sums)
    column_sum(_OP, squares, square)
    return sums, square


def router_statistics(logits: Tensor, token_weights: Tensor | None = None) -> RouterStatistics:
    """Sums over tokens of softmax(logits) and of logsumexp(logits)².

    Args:
        logits: [T, E] in float16, bfloat16, float32 or float64; rows at any distance.
        token_weights: [T] of any dtype, what each token counts: 0 for padding; None for ones.
            Logits of tokens that count 0 have no influence, whatever they are.

    Returns:
        RouterStatistics. Differentiable once, by logits.

    Raises:
        ValueError: logits is no matrix, or has no column; token_weights is not [T]; tensors on
            different devices.
        TypeError: logits is not floating point.
    """
    check_floating("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}; it must be [T, E], as logits.flatten(0, -2)"
        )
    if token_weights is not None:
        if tuple(token_weights.shape) != tuple(logits.shape[:1]):
            raise ValueError(
                f"token_weights has shape {tuple(token_weights.shape)}; it must be "
                f"[{len(logits)}], one number a token"
            )
        check_same_device(logits=logits, token_weights=token_weights)
    if not _OP.uses_triton(logits):
        return router_statistics_reference(logits, token_weights)
    if token_weights is not None:
        token_weights = token_weights.detach().to(torch.float32).contiguous()
    return RouterStatistics(*router_statistics_forward(logits, token_weights))
