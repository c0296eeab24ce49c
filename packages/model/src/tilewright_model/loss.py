"""The loss of a decoder: each token against the one that follows it in its own sequence.

Labels are shifted and logits or hidden states stay where they are: a shifted view of logits is not
contiguous, and making it so would copy the largest tensor of the step.
"""

import torch.nn.functional as F
from torch import Tensor

from tilewright_kernels import cross_entropy, linear_cross_entropy
from tilewright_model.positions import Positions

IGNORE_INDEX = -100
"""Label of a position that has no part in the loss."""


def next_tokens(
    labels_BT: Tensor, positions: Positions | None = None, attention_mask: Tensor | None = None
) -> Tensor:
    """What each position is to predict: labels[:, t + 1], or -100.

    Args:
        labels_BT: int64, -100 where nothing is to be predicted.
        positions: of packed sequences: the last token of one does not predict the first of the
            next.
        attention_mask: [B, T], 0 for padding, which is not predicted either.
    """
    if attention_mask is not None:
        labels_BT = labels_BT.masked_fill(attention_mask == 0, IGNORE_INDEX)
    targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
    if positions is not None and positions.cu_seqlens is not None and positions.ids is not None:
        first_follows = F.pad(positions.ids[:, 1:] == 0, (0, 1), value=True)
        targets_BT = targets_BT.masked_fill(first_follows, IGNORE_INDEX)
    return targets_BT


def linear_loss(
    hidden_BTC: Tensor,
    weight_VC: Tensor,
    targets_BT: Tensor,
    num_items: int | Tensor | None = None,
    *,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy of hidden · weightᵀ with the targets, without logits; 0-d float32.

    Args:
        hidden_BTC: what the output projection takes.
        weight_VC: its weight.
        targets_BT: of `next_tokens`.
        num_items: divides the sum; by default the number of targets counted.
        softcap: of the logits.
    """
    arguments = hidden_BTC.flatten(0, 1), weight_VC, targets_BT.flatten()
    if num_items is None:
        return linear_cross_entropy(*arguments, ignore_index=IGNORE_INDEX, softcap=softcap)
    summed = linear_cross_entropy(
        *arguments, ignore_index=IGNORE_INDEX, softcap=softcap, reduction="sum"
    )
    return summed / num_items


def logits_loss(
    logits_BTV: Tensor, targets_BT: Tensor, num_items: int | Tensor | None = None
) -> Tensor:
    """As `linear_loss`, from logits that are kept anyway."""
    logits, targets = logits_BTV.flatten(0, 1), targets_BT.flatten()
    if num_items is None:
        return cross_entropy(logits, targets, ignore_index=IGNORE_INDEX)
    return cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum") / num_items
