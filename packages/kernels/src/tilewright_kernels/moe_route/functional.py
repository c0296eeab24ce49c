"""The public functions: what they take, checked once."""

from typing import get_args

import torch
from torch import Tensor

from tilewright_kernels._operator import check_floating, check_same_device
from tilewright_kernels.moe_route.launches import (
    PERMUTATION,
    ROUTE,
    moe_permutation_forward,
    moe_route_forward,
)
from tilewright_kernels.moe_route.reference import (
    Scoring,
    moe_permutation_reference,
    moe_route_reference,
)
from tilewright_kernels.moe_route.routing import Permutation, Routing

_SCORINGS: tuple[str, ...] = get_args(Scoring)


def moe_route(
    logits: Tensor,
    k: int,
    *,
    scoring: Scoring = "softmax",
    normalize: bool = True,
    correction_bias: Tensor | None = None,
    scale: float = 1.0,
    num_groups: int = 1,
    topk_groups: int = 1,
) -> Routing:
    """Choose k experts for each token, and sort the assignments by expert.

    Args:
        logits: [T, E] in float16, bfloat16, float32 or float64: what the router says of each
            expert. Scores are computed in float32 (float64 for float64).
        k: experts a token, 1 to E. Of equal logits the expert of lower index is taken.
        scoring: "softmax" over all experts, or "sigmoid" of each.
        normalize: divide the chosen scores by their sum. With softmax that is the softmax over the
            chosen logits (Mixtral; Qwen3-MoE's norm_topk_prob).
        correction_bias: [E], added to the scores for choosing only (DeepSeek-V3); no gradient.
        scale: factor of all weights, after normalization.
        num_groups: experts form so many groups of neighbours, of E / num_groups each.
        topk_groups: only experts of so many groups are chosen from, those where the sum of the two
            best scores, with their bias, is largest.

    Returns:
        Routing, whose weights are differentiable once by logits.

    Raises:
        ValueError: logits is no matrix, or has 2³¹ assignments or more; k, scoring, the groups or
            the bias' shape do not fit; tensors on different devices.
        TypeError: logits or the bias is not floating point; k is no integer.
    """
    _check(logits, k, scoring, correction_bias, num_groups, topk_groups)
    if ROUTE.uses_triton(logits):
        bias = None if correction_bias is None else correction_bias.detach().contiguous()
        return Routing(
            *moe_route_forward(
                logits, bias, k, scoring, normalize, float(scale), num_groups, topk_groups
            )
        )
    return moe_route_reference(
        logits, k, scoring=scoring, normalize=normalize, correction_bias=correction_bias,
        scale=scale, num_groups=num_groups, topk_groups=topk_groups,
    )  # fmt: skip


def moe_permutation(ids: Tensor, num_experts: int) -> Permutation:
    """Sort assignments by expert, where the experts are known: after an all-to-all, for one.

    Args:
        ids: [T, k] int32 or int64, the experts of each token, in [0, E) and different from one
            another; or [T], one expert each. What the device holds is not checked.
        num_experts: E. Where a buffer is filled in part only, let its empty rows have an expert
            more, E - 1: they come last, and the experts' products need not see them.

    Returns:
        Permutation. Within an expert rows are in the order of tokens, at each run.

    Raises:
        ValueError: ids has another number of dimensions, or 2³¹ elements or more; num_experts
            is less than 1, or than k.
        TypeError: ids is neither int32 nor int64.
    """
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids is {ids.dtype}; give int32 or int64, as in ids.int()")
    if ids.dim() not in (1, 2):
        raise ValueError(f"ids has shape {tuple(ids.shape)}; it must be [T, k] or [T]")
    if ids.numel() >= 2**31:
        raise ValueError(f"ids has {ids.numel()} elements; give fewer than 2**31")
    k = ids.shape[1] if ids.dim() == 2 else 1
    if not 1 <= k <= num_experts:
        raise ValueError(
            f"ids has shape {tuple(ids.shape)} and num_experts is {num_experts}; a token goes to "
            f"1 to num_experts different ones"
        )
    if not PERMUTATION.uses_triton(ids):
        return moe_permutation_reference(ids, num_experts)
    counts, offs, indices, inverse = moe_permutation_forward(ids.reshape(-1, k), num_experts)
    return Permutation(counts, offs, indices, inverse, k)


def _check(
    logits: Tensor, k: int, scoring: str, bias: Tensor | None, num_groups: int, topk_groups: int
) -> None:
    check_floating("logits", logits)
    if logits.dim() != 2:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}; it must be [T, E], as logits.flatten(0, -2)"
        )
    num_tokens, num_experts = logits.shape
    if not isinstance(k, int | torch.SymInt):
        raise TypeError(f"k is {k!r}; give an integer, the number of experts a token")
    if not 1 <= k <= num_experts:
        raise ValueError(f"k is {k}; choose 1 to {num_experts} of {num_experts} experts")
    if num_tokens * k >= 2**31:
        raise ValueError(
            f"{num_tokens} tokens of {k} experts are 2**31 assignments or more; route fewer tokens"
        )
    if scoring not in _SCORINGS:
        raise ValueError(f"scoring is {scoring!r}; choose from {', '.join(_SCORINGS)}")
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups is {num_groups}; it must divide {num_experts} experts")
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(f"topk_groups is {topk_groups}; choose 1 to {num_groups} groups")
    if k > topk_groups * (num_experts // num_groups):
        raise ValueError(
            f"{topk_groups} groups of {num_experts // num_groups} experts hold fewer than the {k} "
            f"that are chosen; raise topk_groups or lower k"
        )
    if bias is not None:
        check_floating("correction_bias", bias)
        if tuple(bias.shape) != (num_experts,):
            raise ValueError(
                f"correction_bias has shape {tuple(bias.shape)}; it must be [{num_experts}], "
                f"one number an expert"
            )
        check_same_device(logits=logits, correction_bias=bias)
