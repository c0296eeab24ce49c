"""The loss scale of float16: torch.amp.GradScaler's rule, decided on the device.

float16 holds no number below 6e-8, and gradients are often smaller. The loss is multiplied by a
scale, the update divides by it; where gradients overflow the update is left out and the scale
halved, and after 2,000 steps without an overflow it is doubled (Micikevicius et al. 2018,
arXiv:1710.03740).

GradScaler looks for overflows in a pass of its own over the gradients of one process. Here the norm
tells, which clipping needs anyway and which all processes share.
"""

from typing import Any

import torch
from torch import Tensor

_FIRST, _GROWTH, _BACKOFF, _INTERVAL = 2.0**16, 2.0, 0.5, 2000


class LossScale:
    """A scale that follows what gradients bear.

    Args:
        device: Of the loss.
        interval: Steps without an overflow after which it grows.
    """

    def __init__(self, device: torch.device, *, interval: int = _INTERVAL) -> None:
        self.scale = torch.full((), _FIRST, device=device)
        self.interval = interval
        self._steady = torch.zeros((), dtype=torch.int32, device=device)

    @torch.no_grad()
    def update(self, overflowed: Tensor) -> None:
        """Follow one step.

        Args:
            overflowed: 0-d float32, not 0 where its gradients were not finite.
        """
        torch._amp_update_scale_(
            self.scale, self._steady, overflowed, _GROWTH, _BACKOFF, self.interval
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON with GradScaler's names."""
        return {
            "scale": float(self.scale),
            "growth_factor": _GROWTH,
            "backoff_factor": _BACKOFF,
            "growth_interval": self.interval,
            "_growth_tracker": int(self._steady),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a scale that `state_dict` gave."""
        self.scale.fill_(state["scale"])
        self._steady.fill_(state["_growth_tracker"])
