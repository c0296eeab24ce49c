"""Whether a step's update is made: decided on the device, alike in all processes, waiting for none.

An update is left out where the loss or the norm of the gradients is not finite, and, when asked
for, where one of them is a spike: further above the mean of the last 128 steps than six of their
standard deviations (as OLMo's SkipStepOptimizer). Kernels of the optimizer read the decision from
the device (`found_inf`), so the host can be a step ahead and learns of it later.

Loss and norm are those of all processes together, so that all decide alike.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tilewright_dist import ShardedOptimizer
from tilewright_train.loss_scale import LossScale
from tilewright_train.replicas import gradient_norm

OnSpike = Literal["keep", "skip"]

HISTORY, SIGMAS = 128, 6.0
_LEAST_HISTORY = 64  # steps before which nothing is called a spike


class Outcome(NamedTuple):
    """What became of a step, on the device."""

    norm: Tensor
    """0-d: global norm of the gradients before clipping."""
    skipped: Tensor
    """0-d: 0 for an update that was made, 1 where something was not finite, 2 for a spike."""
    in_a_row: Tensor
    """0-d: updates that were left out one after another, this one included."""
    in_all: Tensor
    """0-d: updates that were left out since the run began."""
    scale: Tensor
    """0-d: what the loss was multiplied by."""


class StepGuard:
    """Clips, decides and updates.

    Args:
        optimizer: Of all parameters; sharded or not.
        parameters: Those whose gradients are clipped together.
        max_grad_norm: Gradients of a larger norm are scaled down to it.
        device: Where the losses are.
        on_spike: Whether updates of spikes are left out.
        scales_loss: For float16.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        *,
        max_grad_norm: float,
        device: torch.device,
        on_spike: OnSpike = "keep",
        scales_loss: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.parameters = list(parameters)
        self.max_grad_norm = max_grad_norm
        self.loss_scale = LossScale(device) if scales_loss else None
        self._on_spike = on_spike
        self._one = torch.ones((), device=device)
        # Losses and norms of the steps that were made, a ring.
        self._history = torch.zeros(2, HISTORY, dtype=torch.float64, device=device)
        self._places = torch.arange(HISTORY, device=device)
        self._made = torch.zeros((), dtype=torch.int64, device=device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # in a row, in all
        if isinstance(optimizer, ShardedOptimizer):
            # It learns the norm in its step, just before the inner one.
            optimizer.inner.register_step_pre_hook(self._before_inner_step)
        self._loss = self._one
        self._outcome: Outcome | None = None

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to go backward from."""
        return loss if self.loss_scale is None else loss * self.loss_scale.scale

    @torch.no_grad()
    def clip_and_step(self, loss: Tensor) -> Outcome:
        """Make the update, or leave it out.

        Args:
            loss: 0-d, the mean over all processes.
        """
        scale = None if self.loss_scale is None else self.loss_scale.scale
        optimizer: Any = self.optimizer
        self._loss = loss
        if isinstance(optimizer, ShardedOptimizer):
            optimizer.grad_scale = scale
            optimizer.step()
            optimizer.grad_scale = None
        else:
            norm = gradient_norm(optimizer, self.parameters)
            norm = norm if scale is None else norm / scale
            clip = (norm / self.max_grad_norm).clamp(min=1.0)
            optimizer.grad_scale = clip if scale is None else clip * scale
            optimizer.found_inf = self._decide(norm)
            optimizer.step()
            optimizer.grad_scale = optimizer.found_inf = None
        outcome, self._outcome = self._outcome, None
        assert outcome is not None
        return outcome

    def _before_inner_step(self, inner: Any, *_: Any) -> None:
        assert isinstance(self.optimizer, ShardedOptimizer)
        norm = self.optimizer.grad_norm
        assert norm is not None
        inner.found_inf = self._decide(norm)

    def _decide(self, norm: Tensor) -> Tensor:
        """0-d float32, not 0 where the update is to be left out; the step is written down."""
        seen = torch.stack([self._loss.double(), norm.double()])
        broken = ~seen.isfinite().all()
        spike = torch.zeros_like(broken)
        if self._on_spike == "skip":
            filled = self._places < self._made
            count = filled.sum().clamp(min=1)
            mean = self._history.sum(dim=1) / count
            deviation = torch.where(filled, self._history - mean[:, None], 0.0)
            sigma = (deviation.square().sum(dim=1) / count).sqrt()
            above = (seen > mean + SIGMAS * sigma).any()
            spike = above & (self._made >= _LEAST_HISTORY) & ~broken
        skip = broken | spike
        written = (self._places == self._made % HISTORY) & ~skip
        self._history = torch.where(written, seen[:, None], self._history)
        self._made += ~skip
        self._counts[0] = torch.where(skip, self._counts[0] + 1, 0)
        self._counts[1] += skip
        scale = self._one if self.loss_scale is None else self.loss_scale.scale.clone()
        self._outcome = Outcome(
            norm, broken + 2 * spike, self._counts[0].clone(), self._counts[1].clone(), scale
        )
        if self.loss_scale is not None:
            self.loss_scale.update(broken.float())
        return skip.float()

    def state_dict(self) -> dict[str, Any]:
        """JSON; numbers come back bit for bit."""
        return {
            "history": self._history.tolist(),
            "made": int(self._made),
            "counts": self._counts.tolist(),
            "loss_scale": None if self.loss_scale is None else self.loss_scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; of an older run, which has none, begin anew."""
        if not state:
            return
        self._history.copy_(torch.tensor(state["history"], dtype=torch.float64))
        self._made.fill_(state["made"])
        self._counts.copy_(torch.tensor(state["counts"]))
        if self.loss_scale is not None and state["loss_scale"] is not None:
            self.loss_scale.load_state_dict(state["loss_scale"])
