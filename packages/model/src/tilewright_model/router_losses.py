"""What training adds to the loss so that every expert is used, over all sparse layers at once.

With E experts, k of them chosen for each of N tokens of L layers, the share f_e of tokens that
chose expert e and the mean probability p_e that the router gave it,

    balance = E · Σ f_e · p_e          z = mean over tokens of (log Σ exp logits)²

Balance (Fedus et al. 2021, arXiv:2101.03961) is k where both are uniform. Tokens of all layers form
one mean, as in Hugging Face's Mixtral and Qwen3-MoE: a sum over layers, which many codebases take,
is about L times as large. The z-loss is ST-MoE's (Zoph et al. 2022, arXiv:2202.08906).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tilewright_model.config import RouterScoring
from tilewright_model.moe import RouterOutput


def balance_loss(
    routers: Sequence[RouterOutput],
    attention_mask: Tensor | None = None,
    scoring: RouterScoring = "softmax",
) -> Tensor:
    """E · Σ f_e · p_e over all tokens of all layers.

    Args:
        routers: one a sparse layer.
        attention_mask: [B, T], 0 for tokens that do not count.
        scoring: sigmoids are divided by their sum to be probabilities.

    Returns:
        0-d float32 (float64 for float64 logits), differentiable by the logits.
    """
    chosen, probability, tokens = 0, 0, 0
    for router in routers:
        p_NE = _probabilities(router.logits, scoring)
        if attention_mask is None:
            chosen = chosen + router.tokens_per_expert
            probability = probability + p_NE.sum(0)
            tokens = tokens + len(p_NE)
        else:
            counts_N = attention_mask.flatten().to(p_NE.dtype)
            chosen = chosen + _count(router.ids, counts_N, p_NE.shape[1])
            probability = probability + counts_N @ p_NE
            tokens = tokens + counts_N.sum()
    num_experts = routers[0].logits.shape[1]
    return num_experts * ((chosen / tokens) * (probability / tokens)).sum()


def router_z_loss(routers: Sequence[RouterOutput], attention_mask: Tensor | None = None) -> Tensor:
    """Mean over all tokens of all layers of the squared log-sum-exp of the router's logits."""
    squares = torch.stack([_wide(router.logits).logsumexp(-1).square() for router in routers])
    if attention_mask is None:
        return squares.mean()
    counts_N = attention_mask.flatten().to(squares.dtype)
    return (squares @ counts_N).sum() / (len(routers) * counts_N.sum())


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _probabilities(logits_NE: Tensor, scoring: RouterScoring) -> Tensor:
    if scoring == "softmax":
        return _wide(logits_NE).softmax(-1)
    scores_NE = _wide(logits_NE).sigmoid()
    return scores_NE / scores_NE.sum(-1, keepdim=True)


def _count(ids_Nk: Tensor, counts_N: Tensor, num_experts: int) -> Tensor:
    """[E]: how often each expert was chosen by tokens that count."""
    counts_Nk = counts_N[:, None].expand(ids_Nk.shape)
    zeros = counts_N.new_zeros(num_experts)
    return zeros.scatter_add(0, ids_Nk.flatten().long(), counts_Nk.flatten())
