"""What a batch's loss is: the one thing in which the three commands' loops differ.

A loss is a sum over the items of a batch (predictions, or pairs) over the items of the whole step,
all micro-batches and processes together: the parts add up to the mean, however a step is split.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from tilewright_train.batches import Batch
from tilewright_train.config import DpoOptions
from tilewright_train.dpo import dpo_loss, metric_means, metric_sums
from tilewright_train.pairs import PairBatch
from tilewright_train.reference import Reference


class Objective(Protocol):
    """A loss and what is told beside it."""

    def loss(
        self, module: nn.Module, batch: Batch, items: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch's share of the loss, 0-d, and sums [K] from which `means` makes metrics."""
        ...

    def means(self, sums: list[float], items: int) -> dict[str, float]:
        """Metrics by name, of the sums over all batches of so many items."""
        ...

    def updated(self) -> None:
        """The weights have just changed."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """What it has to remember in a checkpoint, by name."""
        ...

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on with the tensors of a checkpoint."""
        ...


class NextToken:
    """Pretraining and SFT: the cross-entropy of the targets, nothing beside it."""

    def loss(
        self, module: nn.Module, batch: Batch, items: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Objective`; items are predictions."""
        loss = module(**batch.inputs, num_items=items).loss
        return loss, loss.new_zeros(0)

    def means(self, sums: list[float], items: int) -> dict[str, float]:
        """None."""
        return {}

    def updated(self) -> None:
        """Nothing depends on it."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """None."""
        return {}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Nothing to load."""


class DirectPreference:
    """DPO: `dpo_loss` of the policy against a reference; items are pairs.

    Args:
        options: Which loss.
        reference: What the policy is compared with.
    """

    def __init__(self, options: DpoOptions, reference: Reference) -> None:
        self.options = options
        self.reference = reference

    def loss(
        self, module: nn.Module, batch: Batch, items: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Objective`; the module is a `SequenceLogProbs`, or its wrapper."""
        assert isinstance(batch, PairBatch)
        reference = self.reference.log_probs(batch)
        policy, logits = module(**batch.inputs)
        loss = dpo_loss(policy, reference, batch.lengths, self.options).sum() / items
        sums = metric_sums(policy, reference, batch.lengths, logits, self.options.beta)
        return loss, sums

    def means(self, sums: list[float], items: int) -> dict[str, float]:
        """The metrics of `dpo`."""
        return metric_means(sums, items)

    def updated(self) -> None:
        """A moving reference follows."""
        self.reference.updated()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those of a moving reference."""
        return self.reference.tensors()

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """A moving reference goes on from there."""
        self.reference.load(tensors)
