"""The definition of cross_entropy in plain torch."""

from typing import Literal, overload

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]


@overload
def cross_entropy_reference(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int = -100,
    reduction: Reduction = "mean", label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float | None = None, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def cross_entropy_reference(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int = -100,
    reduction: Reduction = "mean", label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float | None = None, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def cross_entropy_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition in plain torch; arguments as `cross_entropy`."""
    s = input if input.dtype == torch.float64 else input.float()
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    w = s.new_ones(s.shape[-1]) if weight is None else weight.to(s.dtype)
    ignored = target == ignore_index
    y = target.masked_fill(ignored, 0).long().unsqueeze(-1)
    s_y, w_y = s.gather(-1, y).squeeze(-1), w[y].squeeze(-1)

    largest = s.detach().amax(-1, keepdim=True)
    lse = (largest + (s - largest).exp().sum(-1, keepdim=True).log()).squeeze(-1)
    loss = w_y * (1 - label_smoothing) * (lse - s_y)
    if z_loss != 0:
        loss = loss + w_y * z_loss * lse.square()
    if label_smoothing != 0:
        loss = loss + label_smoothing / s.shape[-1] * (w * (lse.unsqueeze(-1) - s)).sum(-1)
    loss = reduce_losses(loss.masked_fill(ignored, 0), w_y.masked_fill(ignored, 0), reduction)
    return (loss, lse) if return_lse else loss


def reduce_losses(losses: Tensor, row_weights: Tensor, reduction: Reduction) -> Tensor:
    """Torch's mean is weighted: the sum of the losses over the sum of their targets' weights."""
    if reduction == "none":
        return losses
    return losses.sum() / row_weights.sum() if reduction == "mean" else losses.sum()
