"""Log-probabilities of given labels from hidden states, without holding all logits.

    logits = input · weightᵀ + bias         log p = logits[label] - log Σ exp(logits)

What preference losses (DPO, Rafailov et al. 2023, arXiv:2305.18290) compare between two models, for
each token. Forward and backward make the logits a chunk of tokens at a time (`_logit_chunks`): four
matrix products, for what each log p counts in the loss is only known in backward.
"""

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright_kernels._linear_losses import autocast, check_linear, register_losses
from tilewright_kernels._operator import Operator
from tilewright_kernels.cross_entropy import cross_entropy_reference

_OP = Operator("linear_log_prob")

_losses = register_losses(_OP)


def linear_log_prob_reference(
    input: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    return_mean_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition in plain torch, with all logits; arguments as `linear_log_prob`."""
    logits = F.linear(input, weight, bias)
    log_prob = -cross_entropy_reference(
        logits, labels, ignore_index=ignore_index, reduction="none", softcap=softcap
    )
    if not return_mean_logits:
        return log_prob
    wide = logits.detach().to(log_prob.dtype)
    capped = wide if softcap is None else softcap * (wide / softcap).tanh()
    return log_prob, capped.mean(-1).masked_fill(labels == ignore_index, 0)


@overload
def linear_log_prob(
    input: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None,
    ignore_index: int = -100, softcap: float | None = None, chunk_bytes: int | None = None,
    return_mean_logits: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def linear_log_prob(
    input: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None,
    ignore_index: int = -100, softcap: float | None = None, chunk_bytes: int | None = None,
    return_mean_logits: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def linear_log_prob(
    input: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    return_mean_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label under the logits input · weightᵀ + bias.

    As `log_softmax(torch.nn.functional.linear(input, weight, bias), -1)` at the labels: logits are
    rounded to the dtype of input, and what follows is computed in float32 (float64 for float64).

    Args:
        input: [..., H] hidden states in float16, bfloat16, float32 or float64.
        weight: [V, H], of the same dtype; autocast casts as in `linear_cross_entropy`.
        labels: [...] class indices in int64 or int32. A label outside [0, V) that is not
            ignore_index makes that token's result and gradient NaN (the reference raises).
        bias: [V] or None.
        ignore_index: labels of this value give 0, and gradient 0.
        softcap: logits become softcap · tanh(logits / softcap) first.
        chunk_bytes: memory for logits, as in `linear_cross_entropy`.
        return_mean_logits: also return the mean of each token's logits, which trainers log; it
            costs nothing and has no gradient.

    Returns:
        [...] in float32 (float64), or a pair of that and the means [...], 0 where ignored.
        Differentiable once, by input, weight and bias.

    Raises:
        ValueError: shapes, devices or options that do not fit.
        TypeError: dtypes that do not.
    """
    input, weight, bias = autocast(input, weight, bias)
    check_linear(input, weight, bias, labels, "labels", softcap, chunk_bytes)
    if not _OP.uses_triton(input):
        return linear_log_prob_reference(
            input, weight, labels, bias=bias, ignore_index=ignore_index, softcap=softcap,
            return_mean_logits=return_mean_logits,
        )  # fmt: skip
    options = (ignore_index, 0.0, 0.0, softcap, chunk_bytes, return_mean_logits)
    losses, means = _losses(input, weight, bias, labels, *options)
    return (-losses, means) if return_mean_logits else -losses


class LinearLogProb(torch.nn.Module):
    """`linear_log_prob` with its options; the weight is an argument of forward and no parameter.

    Args:
        ignore_index: labels of this value give 0.
        softcap: as in `linear_log_prob`.
        chunk_bytes: as in `linear_log_prob`.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        *,
        softcap: float | None = None,
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index, self.softcap, self.chunk_bytes = ignore_index, softcap, chunk_bytes

    def forward(
        self, input: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities of hidden states [..., H], weight [V, H], labels [...], bias [V]."""
        return linear_log_prob(
            input, weight, labels, bias=bias, ignore_index=self.ignore_index,
            softcap=self.softcap, chunk_bytes=self.chunk_bytes,
        )  # fmt: skip
