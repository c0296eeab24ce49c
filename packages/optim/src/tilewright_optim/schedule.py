"""Learning rates over a run: linear warm-up, a shape, a floor.

The n-th optimizer step (n = 1, 2, …; `last_epoch` is n - 1) of W warm-up and N total steps uses

    γₙ = γ · n / W                             n ≤ W
    γₙ = γ · (r + (1 - r) · shape(n))          W ≤ n ≤ N
    γₙ = γ · r                                 n ≥ N, n > W

    cosine   (1 + cos(π x)) / 2,  x = (n - W) / (N - W)      Loshchilov & Hutter, arXiv:1608.03983
    linear   1 - x
    wsd      1 until n = N - D, then 1 - √((n - N + D) / D)   Hägele et al., arXiv:2405.18392
    constant 1, after N too

So the first step is not lost on a rate of 0, step W is the first at full rate, and step N, the
last, is the first at the floor. Each rate is computed from n alone: a resumed run has the rates of
one that never stopped.
"""

import math
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

ScheduleName = Literal["constant", "linear", "cosine", "wsd"]

_DECAY_SHARE = 0.2
"""Of the run that wsd decays in, unless told otherwise: what its authors found enough."""


def get_schedule(
    name: ScheduleName,
    optimizer: Optimizer,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    min_lr_ratio: float = 0.0,
    decay_steps: int | None = None,
    last_epoch: int = -1,
) -> LRScheduler:
    """The schedule of this name.

    Args:
        name: "constant", "linear", "cosine" or "wsd" (warm-up, stable, decay).
        optimizer: its groups' learning rates are γ.
        total_steps: N, optimizer steps until the floor, warm-up included.
        warmup_steps: W, optimizer steps until the full rate; 0 starts at it.
        min_lr_ratio: r, the floor as a fraction of γ.
        decay_steps: D, the last steps, in which wsd decays; None is a fifth of all.
        last_epoch: optimizer steps made before, less one; -1 starts anew.

    Raises:
        ValueError: another name; numbers that the schedule does not allow; decay_steps for a
            schedule that has none.
    """
    if name not in _SCHEDULES:
        raise ValueError(f"schedule {name!r} is none of {', '.join(map(repr, _SCHEDULES))}")
    if name == "wsd":
        return WarmupStableDecay(
            optimizer, warmup_steps, total_steps, min_lr_ratio, last_epoch, decay_steps=decay_steps
        )
    if decay_steps is not None:
        raise ValueError(f"decay_steps is {decay_steps}, and {name} decays as a whole; use 'wsd'")
    return _SCHEDULES[name](optimizer, warmup_steps, total_steps, min_lr_ratio, last_epoch)


class WarmupSchedule(LRScheduler):
    """Linear warm-up, then `shape`, of every group's learning rate.

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

    def shape(self, step: int) -> float:
        """The rate between its full height, 1, and its floor, 0, in step W ≤ n ≤ N."""
        raise NotImplementedError

    def factor(self, step: int) -> float:
        """γₙ / γ of the n-th optimizer step, n ≥ 1."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        if step >= self.total_steps:
            return self.min_lr_ratio
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * self.shape(step)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates of step `last_epoch` + 1, one a group."""
        factor = self.factor(self.last_epoch + 1)
        return [base * factor for base in self.base_lrs]

    def _progress(self, step: int) -> float:
        return (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)


class WarmupCosine(WarmupSchedule):
    """Linear warm-up, then half a cosine down to the floor; arguments of `WarmupSchedule`."""

    def shape(self, step: int) -> float:
        """(1 + cos(π x)) / 2."""
        return (1 + math.cos(math.pi * self._progress(step))) / 2


class WarmupLinear(WarmupSchedule):
    """Linear warm-up, then a line down to the floor; arguments of `WarmupSchedule`."""

    def shape(self, step: int) -> float:
        """1 - x."""
        return 1 - self._progress(step)


class WarmupStableDecay(WarmupSchedule):
    """Linear warm-up, the full rate, and a decay at the end (WSD).

    Arguments are those of `WarmupSchedule`, and

    Args:
        decay_steps: D, how many steps at the end decay, at most N - W; None is a fifth of N, or
            N - W if that is less.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        total_steps: int,
        min_lr_ratio: float = 0.1,
        last_epoch: int = -1,
        *,
        decay_steps: int | None = None,
    ) -> None:
        most = total_steps - warmup_steps
        if decay_steps is None:
            decay_steps = max(0, min(round(_DECAY_SHARE * total_steps), most))
        elif not 0 <= decay_steps <= most:
            raise ValueError(
                f"decay_steps is {decay_steps}; it must be from 0 to total_steps - warmup_steps "
                f"({most})"
            )
        self.decay_steps = decay_steps
        super().__init__(optimizer, warmup_steps, total_steps, min_lr_ratio, last_epoch)

    def shape(self, step: int) -> float:
        """1, then 1 - √(share of the decay that is done)."""
        done = step - (self.total_steps - self.decay_steps)
        return 1.0 if done <= 0 else 1 - math.sqrt(done / self.decay_steps)


class WarmupConstant(WarmupSchedule):
    """Linear warm-up, then the full rate, beyond total_steps too."""

    def factor(self, step: int) -> float:
        """γₙ / γ of the n-th optimizer step, n ≥ 1."""
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0


_SCHEDULES: dict[str, type[WarmupSchedule]] = {
    "constant": WarmupConstant,
    "linear": WarmupLinear,
    "cosine": WarmupCosine,
    "wsd": WarmupStableDecay,
}
