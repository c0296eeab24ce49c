"""Learning rates over a run: linear warm-up, then half a cosine down to a floor.

The n-th optimizer step (n = 1, 2, …; `last_epoch` is n - 1) of W warm-up and N total steps uses

    γₙ = γ · n / W                                              n ≤ W
    γₙ = γ · (r + (1 - r) (1 + cos(π (n - W) / (N - W))) / 2)    W ≤ n ≤ N
    γₙ = γ · r                                                  n ≥ N, n > W

(Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts). So the first step is not lost on a
rate of 0, step W is the only one at full rate, and step N, the last, is the first at the floor.
Each rate is computed from n alone: a resumed run has the rates of one that never stopped.
"""

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupCosine(LRScheduler):
    """Linear warm-up and cosine decay of every group's learning rate.

    Call `step()` after each `optimizer.step()`. A learning rate that is a tensor is changed in
    place, without synchronization, so a captured CUDA graph sees it.

    Args:
        optimizer: its groups' learning rates (`initial_lr` where set) are γ.
        warmup_steps: W, optimizer steps until the full rate; 0 starts at it.
        total_steps: N, optimizer steps until the floor, warm-up included.
        min_lr_ratio: r, the floor as a fraction of γ.
        last_epoch: optimizer steps made before, less one; -1 starts anew.

    Raises:
        ValueError: total_steps < 1, warmup_steps not in [0, total_steps], min_lr_ratio not in
            [0, 1].
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        total_steps: int,
        min_lr_ratio: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}; a schedule needs at least one step")
        if not 0 <= warmup_steps <= total_steps:
            raise ValueError(
                f"warmup_steps is {warmup_steps}; it must be from 0 to total_steps ({total_steps})"
            )
        if not 0.0 <= min_lr_ratio <= 1.0:
            raise ValueError(
                f"min_lr_ratio is {min_lr_ratio}; it is a fraction of the learning rate, 0 to 1"
            )
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.min_lr_ratio = min_lr_ratio
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int) -> float:
        """γₙ / γ of the n-th optimizer step, n ≥ 1."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        if step >= self.total_steps:
            return self.min_lr_ratio
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * cosine

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates of step `last_epoch` + 1, one a group."""
        factor = self.factor(self.last_epoch + 1)
        return [base * factor for base in self.base_lrs]
