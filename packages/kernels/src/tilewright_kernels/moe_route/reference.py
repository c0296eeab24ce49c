"""The definition of routing in plain torch."""

from typing import Literal

import torch
from torch import Tensor

from tilewright_kernels.moe_route.routing import Permutation, Routing

Scoring = Literal["softmax", "sigmoid"]

TINY = 1e-20
"""Added to the sum of chosen scores, as DeepSeek-V3 does: sigmoids may all be 0."""


def moe_route_reference(
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
    """The definition in plain torch; arguments as `moe_route`."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    scores = x.softmax(-1) if scoring == "softmax" else x.sigmoid()
    preference = x.detach()  # orders as the scores do, and before they are rounded
    if correction_bias is not None or num_groups > 1:
        preference = scores.detach()
    if correction_bias is not None:
        preference = preference + correction_bias.detach().to(x.dtype)
    if num_groups > 1:
        preference = _in_best_groups(preference, num_groups, topk_groups)
    ids = preference.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + TINY)
    order = moe_permutation_reference(ids, logits.shape[1])
    return Routing(weights * scale, ids.to(torch.int32), *order[:4])


def _in_best_groups(preference: Tensor, num_groups: int, topk_groups: int) -> Tensor:
    """The preference of experts in the best groups; that of the others is -inf."""
    in_groups = preference.unflatten(1, (num_groups, -1))
    best_two = in_groups.topk(min(2, in_groups.shape[-1]), -1).values.sum(-1)
    chosen = best_two.sort(dim=-1, descending=True, stable=True).indices[:, :topk_groups]
    allowed = torch.zeros_like(best_two, dtype=torch.bool).scatter(1, chosen, True)
    return in_groups.masked_fill(~allowed[..., None], -torch.inf).flatten(1)


def moe_permutation_reference(ids: Tensor, num_experts: int) -> Permutation:
    """The definition in plain torch, a stable sort; arguments as `moe_permutation`."""
    experts = ids.reshape(-1).long()
    counts = torch.zeros(num_experts, dtype=torch.int32, device=ids.device)
    counts = counts.scatter_add(0, experts, torch.ones_like(experts, dtype=torch.int32))
    indices = experts.argsort(stable=True)
    rows = torch.arange(len(experts), dtype=torch.int32, device=ids.device)
    inverse = torch.empty_like(rows).scatter(0, indices, rows)
    k = ids.shape[1] if ids.dim() == 2 else 1
    return Permutation(
        counts, counts.cumsum(0, dtype=torch.int32), indices.to(torch.int32), inverse, k
    )
