"""What keeps experts in balance: losses on a router's logits, and a bias that needs no gradient.

    load balance  E · Σ_e f_e · P_e      f_e: assignments to e a token, P_e: mean probability of e
    z-loss        mean over tokens of (log Σ_e exp x_e)²

(Fedus et al. 2021, arXiv:2101.03961; Zoph et al. 2022, arXiv:2202.08906.) The first is k where the
load is even, and E where all goes to one. f has no gradient; P has, and pulls down the experts that
are chosen often. Over several layers Hugging Face takes f and P as means over the tokens of all
layers together, and the product then: an expert that is busy in one layer and idle in another looks
even. The sum or mean of each layer's own loss is another number, and a stricter one.

Without a loss (Wang et al. 2024, arXiv:2408.15664): a bias on the scores, for choosing only, goes
up by a step where an expert had fewer tokens than the mean and down where it had more.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tilewright_kernels.moe_route import moe_route, moe_route_reference
from tilewright_kernels.router_statistics import router_statistics

Layers = Literal["together", "sum", "mean"]

_LAYERS: tuple[str, ...] = get_args(Layers)


class _LayerLoad(NamedTuple):
    """f and P of one layer before they are divided by its tokens, which count together."""

    counts: Tensor
    probability_sum: Tensor
    num_tokens: Tensor | int


def load_balancing_loss_reference(
    logits: Tensor | Sequence[Tensor],
    k: int,
    *,
    attention_mask: Tensor | None = None,
    layers: Layers = "together",
) -> Tensor:
    """The definition in plain torch; arguments as `load_balancing_loss`."""
    listed = _listed(logits)
    if layers != "together":
        losses = torch.stack(
            [load_balancing_loss_reference(x, k, attention_mask=attention_mask) for x in listed]
        )
        return losses.sum() if layers == "sum" else losses.mean()
    x = torch.cat(listed)
    probabilities = (x if x.dtype == torch.float64 else x.float()).softmax(-1)
    m = probabilities.new_ones(len(x))
    if attention_mask is not None:
        m = attention_mask.flatten().to(m.dtype).repeat(len(listed))
    chosen = torch.zeros_like(probabilities).scatter(1, moe_route_reference(x, k).ids.long(), 1.0)
    f = (m[:, None] * chosen).sum(0) / m.sum()
    p = (m[:, None] * probabilities).sum(0) / m.sum()
    return x.shape[1] * (f * p).sum()


def load_balancing_loss(
    logits: Tensor | Sequence[Tensor],
    k: int,
    *,
    attention_mask: Tensor | None = None,
    tokens_per_expert: Tensor | Sequence[Tensor] | None = None,
    layers: Layers = "together",
) -> Tensor:
    """E · Σ_e f_e · P_e, Switch's auxiliary loss as transformers' load_balancing_loss_func has it.

    Args:
        logits: [T, E] of one layer, or those of each layer, in float16, bfloat16, float32 or
            float64.
        k: experts a token.
        attention_mask: [B, T / B] or [T] of numbers or booleans, the same for all layers: tokens
            where it is 0 count nowhere.
        tokens_per_expert: [E] of the layer, or those of each layer, as `Routing` has it. None
            counts the k largest logits of each token. To be given where experts were chosen in
            another way, with a bias; it saves the choice where they were not.
        layers: "together" takes f and P over the tokens of all layers, as transformers does; "sum"
            and "mean" are of each layer's own loss.

    Returns:
        [] float32 (float64 for float64 logits). Differentiable by logits.

    Raises:
        ValueError: no layer; shapes or a k that do not fit; tokens_per_expert beside an attention
            mask, which it knows nothing of; an unknown value of layers.
        TypeError: logits are not floating point.
    """
    listed = _listed(logits)
    num_experts = listed[0].shape[1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"k is {k}; choose 1 to {num_experts} of {num_experts} experts")
    if layers not in _LAYERS:
        raise ValueError(f"layers is {layers!r}; choose from {', '.join(_LAYERS)}")
    counts: Sequence[Tensor | None] = [None] * len(listed)
    if tokens_per_expert is not None:
        if attention_mask is not None:
            raise ValueError(
                "tokens_per_expert counts the tokens that attention_mask takes out; leave it away "
                "to count those that are left"
            )
        counts = [tokens_per_expert] if isinstance(tokens_per_expert, Tensor) else tokens_per_expert
        if len(counts) != len(listed):
            raise ValueError(
                f"there are logits of {len(listed)} layers and tokens_per_expert of {len(counts)}"
            )
    mask = _token_weights(attention_mask, listed)
    loads = [_load(x, k, mask, count) for x, count in zip(listed, counts, strict=True)]
    if layers == "together":
        return _loss(*(_sum(parts) for parts in zip(*loads, strict=True)))
    losses = torch.stack([_loss(*load) for load in loads])
    return losses.sum() if layers == "sum" else losses.mean()


def router_z_loss(
    logits: Tensor | Sequence[Tensor], *, attention_mask: Tensor | None = None
) -> Tensor:
    """Mean over tokens of logsumexp(logits)², which keeps logits small where scores are alike.

    Args:
        logits: as for `load_balancing_loss`; the mean is over the tokens of all layers.
        attention_mask: as for `load_balancing_loss`.

    Returns:
        [] float32 (float64 for float64 logits). Differentiable by logits.

    Raises:
        ValueError: no layer, shapes that do not fit.
        TypeError: logits are not floating point.
    """
    listed = _listed(logits)
    mask = _token_weights(attention_mask, listed)
    sums = [router_statistics(x, mask).square_lse_sum for x in listed]
    num_tokens = len(listed[0]) if mask is None else mask.sum()
    return _sum(sums) / (num_tokens * len(listed))


def router_z_loss_reference(
    logits: Tensor | Sequence[Tensor], *, attention_mask: Tensor | None = None
) -> Tensor:
    """The definition in plain torch; arguments as `router_z_loss`."""
    listed = _listed(logits)
    x = torch.cat(listed)
    squares = (x if x.dtype == torch.float64 else x.float()).logsumexp(-1).square()
    if attention_mask is None:
        return squares.mean()
    m = attention_mask.flatten().to(squares.dtype).repeat(len(listed))
    return (m * squares).sum() / m.sum()


def balanced_bias(correction_bias: Tensor, tokens_per_expert: Tensor, rate: float = 1e-3) -> Tensor:
    """The bias of the next step: bias + rate · sign(mean load - load), without a gradient.

    (Wang et al. 2024, arXiv:2408.15664; DeepSeek-V3's rate is 1e-3.) Under data parallelism every
    rank must see the same load: all-reduce tokens_per_expert first.

    Args:
        correction_bias: [E] float32 or float64, what `moe_route` was given. In 16 bits a
            step may be less than half the distance between two numbers, and the bias stay.
        tokens_per_expert: [E] int32, what it found; of several microbatches their sum.
        rate: the step.

    Returns:
        [E] like correction_bias, a new tensor.

    Raises:
        ValueError: the shapes differ.
        TypeError: correction_bias is neither float32 nor float64.
    """
    if correction_bias.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"correction_bias is {correction_bias.dtype}, in which a step of {rate} may be lost; "
            f"keep it as correction_bias.to(torch.float32)"
        )
    if correction_bias.shape != tokens_per_expert.shape:
        raise ValueError(
            f"correction_bias has shape {tuple(correction_bias.shape)} and tokens_per_expert "
            f"{tuple(tokens_per_expert.shape)}; both must be [E]"
        )
    load = tokens_per_expert.to(torch.float32)
    return correction_bias.detach() + (rate * (load.mean() - load).sign()).to(correction_bias.dtype)


def _listed(logits: Tensor | Sequence[Tensor]) -> list[Tensor]:
    listed = [logits] if isinstance(logits, Tensor) else list(logits)
    if not listed:
        raise ValueError("logits holds no layer; give the router's logits of one at least")
    for x in listed:
        if x.dim() != 2 or x.shape != listed[0].shape:
            shapes = ", ".join(str(tuple(x.shape)) for x in listed)
            raise ValueError(f"logits have shapes {shapes}; every layer's must be the same [T, E]")
    return listed


def _token_weights(attention_mask: Tensor | None, listed: list[Tensor]) -> Tensor | None:
    """[T] float32."""
    if attention_mask is None:
        return None
    if attention_mask.numel() != len(listed[0]):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, and there are "
            f"{len(listed[0])} tokens; it must have one number a token"
        )
    return attention_mask.detach().reshape(-1).to(torch.float32)


def _load(x: Tensor, k: int, mask: Tensor | None, counts: Tensor | None) -> _LayerLoad:
    probability_sum = router_statistics(x, mask).probability_sum
    if mask is not None:
        ids = moe_route(x.detach(), k).ids.long()
        weights = mask[:, None].expand_as(ids).to(probability_sum.dtype)
        counts = torch.zeros_like(probability_sum).scatter_add(0, ids.flatten(), weights.flatten())
        return _LayerLoad(counts, probability_sum, mask.sum())
    if counts is None:
        counts = moe_route(x.detach(), k).tokens_per_expert
    elif tuple(counts.shape) != (x.shape[1],):
        raise ValueError(
            f"tokens_per_expert has shape {tuple(counts.shape)}; it must be [{x.shape[1]}]"
        )
    return _LayerLoad(counts, probability_sum, len(x))


def _loss(counts: Tensor, probability_sum: Tensor, num_tokens: Tensor | int) -> Tensor:
    f, p = counts.to(probability_sum.dtype) / num_tokens, probability_sum / num_tokens
    return len(p) * (f * p).sum()


def _sum(terms: Sequence) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
