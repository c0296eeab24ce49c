"""What optimizers around an inner one have in common, where each rank steps a part."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from tilewright_dist.param_groups import options_of


class DividedOptimizer(torch.optim.Optimizer):
    """Has the module's parameters in its groups, and an inner optimizer of this rank's part.

    Subclasses set the two attributes below, the group as a weak reference.
    """

    _inner: torch.optim.Optimizer
    _group_reference: Callable[[], dist.ProcessGroup | None]

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer of this rank's part, which holds the states."""
        return self._inner

    @property
    def _group(self) -> dist.ProcessGroup:
        process_group = self._group_reference()
        if process_group is None:
            raise RuntimeError("the process group of this optimizer has been destroyed")
        return process_group

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # What torch.amp.GradScaler asks, the only sign of it where the answer is no. It looks for
        # infinities in this rank's gradients: some ranks would step, and others not, and scales
        # would drift apart.
        if self._group.size() > 1:
            raise RuntimeError(
                "a GradScaler decides by the gradients of one rank, which are a part here: train "
                "in bfloat16 without loss scaling, or leave the optimizer unsharded"
            )
        return getattr(self._inner, "_step_supports_amp_scaling", False)

    def _push_options(self) -> None:
        """Learning rates and the like, which schedules change here, to the inner optimizer."""
        # While a group is being added, the inner optimizer has one less.
        for mine, inner in zip(self.param_groups, self._inner.param_groups, strict=False):
            inner |= options_of(mine)

    def _pull_options(self) -> None:
        for mine, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            mine |= options_of(inner)
