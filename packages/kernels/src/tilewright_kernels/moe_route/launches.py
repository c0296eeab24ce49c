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

TILE, BACKWARD_TILE = 2048, 1024
"""Elements of tokens x experts of a program: of two warps, and of four.

16384 tokens of 128 experts, 8 a token, on an H200: forward 24 µs (26 with four warps, 25 with twice
as many elements), backward 12 µs (15 with twice as many).
"""

MOST_TOKENS = 128
"""Tokens of a program at most, so that few experts leave enough programs."""

PREFIX_BLOCK = 1024
"""Histograms that are summed at a time, 8 a thread."""

ROUTE = Operator("moe_route")
PERMUTATION = Operator("moe_permutation")


@cache
def tile_for(num_experts: int, elements: int, num_warps: int) -> dict[str, int]:
    """BLOCK_T x BLOCK_E, all experts of some tokens."""
    block_e = next_power_of_2(num_experts)
    block_t = max(1, min(MOST_TOKENS, elements // block_e))
    # Where one token has more experts than that, a thread keeps to 32 of them.
    num_warps = max(num_warps, min(32, block_e // 1024))
    return {"BLOCK_T": block_t, "BLOCK_E": block_e, "num_warps": num_warps}


def _forward_tile(num_experts: int) -> dict[str, int]:
    return tile_for(num_experts, TILE, 2)


def _blocks(num_tokens: int, num_experts: int) -> int:
    """Programs over all tokens; one where there are none, which then writes the zeros."""
    return max(1, cdiv(num_tokens, _forward_tile(num_experts)["BLOCK_T"]))


def _permutation_fake(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = (num_experts, num_experts, ids.numel(), ids.numel())
    a, b, c, d = (torch.empty(size, dtype=torch.int32, device=ids.device) for size in sizes)
    return a, b, c, d


def _place(
    operator: Operator, ids: Tensor, counts: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the histograms of blocks [E, blocks] to `Permutation`'s tensors."""
    totals, offs, indices, inverse = _permutation_fake(ids, num_experts)
    operator.launch(
        moe_prefix_kernel, (num_experts,), counts, totals, counts.shape[1],
        BLOCK_B=PREFIX_BLOCK, num_warps=4,
    )  # fmt: skip
    operator.launch(
        moe_place_kernel, (counts.shape[1],), ids, counts, totals, offs, indices, inverse,
        len(ids), num_experts, K=ids.shape[1], BLOCK_K=next_power_of_2(ids.shape[1]),
        **_forward_tile(num_experts),
    )  # fmt: skip
    return totals, offs, indices, inverse


@PERMUTATION.function(fake=_permutation_fake)
def moe_permutation_forward(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the order of rows for ids [T, k]."""
    ids = ids.contiguous()
    blocks = _blocks(len(ids), num_experts)
    counts = torch.empty(num_experts, blocks, dtype=torch.int32, device=ids.device)
    PERMUTATION.launch(
        moe_count_kernel, (blocks,), ids, counts, len(ids), num_experts,
        K=ids.shape[1], **_forward_tile(num_experts),
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
    tile = tile_for(num_experts, BACKWARD_TILE, 4)
    ROUTE.launch(
        moe_route_bwd_kernel, (cdiv(len(rows), tile["BLOCK_T"]),),
        dweights.contiguous(), rows, ids, dlogits, rows.stride(0), len(rows), num_experts,
        K=ids.shape[1], SOFTMAX=scoring == "softmax", NORMALIZE=normalize, SCALE=scale,
        ACC=accumulator(logits.dtype), **tile,
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
    counts = torch.empty(num_experts, blocks, dtype=torch.int32, device=ids.device)
    acc = accumulator(logits.dtype)
    ROUTE.launch(
        moe_choose_kernel, (blocks,),
        rows, bias, weights, ids, counts, rows.stride(0), len(rows), num_experts,
        K=k, SOFTMAX=scoring == "softmax", NORMALIZE=normalize, SCALE=scale,
        GROUPS=num_groups, TOPK_GROUPS=topk_groups, BLOCK_G=next_power_of_2(num_groups),
        LOWEST=-(2**63) if logits.dtype == torch.float64 else -(2**31), ACC=acc,
        **_forward_tile(num_experts), BLOCK_K=next_power_of_2(k),
    )  # fmt: skip
    return weights, ids, *_place(ROUTE, ids, counts, num_experts)
