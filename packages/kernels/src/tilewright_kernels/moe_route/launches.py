"""How routing is launched: three kernels forward, one backward, and registration."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv, next_power_of_2
from tilewright_kernels._operator import Operator, accumulator, as_rows
from tilewright_kernels.moe_route.kernels import (
    moe_choose_kernel,
    moe_count_kernel,
    moe_place_kernel,
    moe_prefix_kernel,
    moe_route_bwd_kernel,
)

TILE = 2048
"""Elements of tokens x experts that a program of four warps holds."""

MOST_TOKENS = 128
"""Tokens of a program at most, so that few experts leave enough programs."""

PREFIX_BLOCK, PREFIX_EXPERTS = 256, 16
"""Histograms that are summed at a time, and experts of a program, which share a sector or two."""

ROUTE = Operator("moe_route")
PERMUTATION = Operator("moe_permutation")


@cache
def tile_for(num_experts: int) -> dict[str, int]:
    """BLOCK_T x BLOCK_E, all experts of some tokens."""
    block_e = next_power_of_2(num_experts)
    block_t = max(1, min(MOST_TOKENS, TILE // block_e))
    return {"BLOCK_T": block_t, "BLOCK_E": block_e, "num_warps": min(32, max(4, block_e // 512))}


def _blocks(num_tokens: int, num_experts: int) -> int:
    """Programs over all tokens; one where there are none, which then writes the zeros."""
    return max(1, cdiv(num_tokens, tile_for(num_experts)["BLOCK_T"]))


def _permutation_fake(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = (num_experts, num_experts, ids.numel(), ids.numel())
    a, b, c, d = (torch.empty(size, dtype=torch.int32, device=ids.device) for size in sizes)
    return a, b, c, d


def _place(
    operator: Operator, ids: Tensor, counts: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the histograms of blocks [blocks, E] to `Permutation`'s tensors."""
    totals, offs, indices, inverse = _permutation_fake(ids, num_experts)
    operator.launch(
        moe_prefix_kernel, (cdiv(num_experts, PREFIX_EXPERTS),), counts, totals, *counts.shape,
        BLOCK_B=PREFIX_BLOCK, BLOCK_N=PREFIX_EXPERTS, num_warps=8,
    )  # fmt: skip
    operator.launch(
        moe_place_kernel, (len(counts),), ids, counts, totals, offs, indices, inverse,
        len(ids), num_experts, K=ids.shape[1], **tile_for(num_experts),
    )  # fmt: skip
    return totals, offs, indices, inverse


@PERMUTATION.function(fake=_permutation_fake)
def moe_permutation_forward(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the order of rows for ids [T, k]."""
    ids = ids.contiguous()
    blocks = _blocks(len(ids), num_experts)
    counts = torch.empty(blocks, num_experts, dtype=torch.int32, device=ids.device)
    PERMUTATION.launch(
        moe_count_kernel, (blocks,), ids, counts, len(ids), num_experts,
        K=ids.shape[1], **tile_for(num_experts),
    )  # fmt: skip
    return _place(PERMUTATION, ids, counts, num_experts)


def _backward_fake(
    dweights: Tensor, logits: Tensor, ids: Tensor, scoring: str, normalize: bool, scale: float
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@ROUTE.function(fake=_backward_fake)
def moe_route_backward(
    dweights: Tensor, logits: Tensor, ids: Tensor, scoring: str, normalize: bool, scale: float
) -> Tensor:
    """Launch the backward: dlogits [T, E] from dweights [T, k]."""
    dlogits = _backward_fake(dweights, logits, ids, scoring, normalize, scale)
    rows, num_experts = as_rows(logits, logits.shape[1]), logits.shape[1]
    ROUTE.launch(
        moe_route_bwd_kernel, (_blocks(len(rows), num_experts),),
        dweights.contiguous(), rows, ids, dlogits, rows.stride(0), len(rows), num_experts,
        K=ids.shape[1], SOFTMAX=scoring == "softmax", NORMALIZE=normalize, SCALE=scale,
        ACC=accumulator(logits.dtype), **tile_for(num_experts),
    )  # fmt: skip
    return dlogits


_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _forward_fake(
    logits: Tensor, bias: Tensor | None, k: int, scoring: str, normalize: bool, scale: float,
    num_groups: int, topk_groups: int,
) -> _Outputs:  # fmt: skip
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weights = torch.empty(len(logits), k, dtype=dtype, device=logits.device)
    ids = torch.empty(len(logits), k, dtype=torch.int32, device=logits.device)
    return weights, ids, *_permutation_fake(ids, logits.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
    logits, _, _, *ctx.formula = inputs[:6]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, output[1])


def _grads(ctx: Any, dweights: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    dlogits = None
    if dweights is not None:
        dlogits = moe_route_backward(dweights, *ctx.saved_tensors, *ctx.formula)
    return dlogits, *[None] * 7


@ROUTE.function(fake=_forward_fake, setup_context=_save, backward=_grads)
def moe_route_forward(
    logits: Tensor, bias: Tensor | None, k: int, scoring: str, normalize: bool, scale: float,
    num_groups: int, topk_groups: int,
) -> _Outputs:  # fmt: skip
    """Launch the forward: `Routing`'s tensors."""
    weights, ids, *_ = _forward_fake(
        logits, bias, k, scoring, normalize, scale, num_groups, topk_groups
    )
    rows, num_experts = as_rows(logits, logits.shape[1]), logits.shape[1]
    blocks = _blocks(len(rows), num_experts)
    counts = torch.empty(blocks, num_experts, dtype=torch.int32, device=ids.device)
    acc = accumulator(logits.dtype)
    ROUTE.launch(
        moe_choose_kernel, (blocks,),
        rows, bias, weights, ids, counts, rows.stride(0), len(rows), num_experts,
        K=k, SOFTMAX=scoring == "softmax", NORMALIZE=normalize, SCALE=scale,
        GROUPS=num_groups, TOPK_GROUPS=topk_groups, BLOCK_G=next_power_of_2(num_groups),
        LOWEST=-(2**63) if logits.dtype == torch.float64 else -(2**31), ACC=acc,
        **tile_for(num_experts), BLOCK_K=next_power_of_2(k),
    )  # fmt: skip
    return weights, ids, *_place(ROUTE, ids, counts, num_experts)
