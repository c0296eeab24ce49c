"""The module."""

from typing import cast

import torch
from torch import Tensor

from tilewright_kernels.cross_entropy.functional import cross_entropy
from tilewright_kernels.cross_entropy.reference import Reduction


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` with `cross_entropy` inside: same arguments, and three more.

    For [N, V] the two are the same; in more dimensions torch's classes come second, ours last.

    Args:
        weight: [V] weight of each class; a buffer, as in torch.
        size_average: deprecated by torch in favour of reduction.
        ignore_index: targets that count nowhere.
        reduce: deprecated by torch in favour of reduction.
        reduction: "mean", "sum" or "none".
        label_smoothing: share of the target that is spread over all classes.
        z_loss: as in `cross_entropy`.
        softcap: as in `cross_entropy`.
        inplace_backward: as in `cross_entropy`.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap, self.inplace_backward = z_loss, softcap, inplace_backward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits [..., V] and class indices [...]."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=cast(Reduction, self.reduction),
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            inplace_backward=self.inplace_backward,
        )
