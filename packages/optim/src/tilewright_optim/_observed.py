"""Whether anybody looks at a step from outside, as hooks and profilers do.

torch wraps every optimizer's step in a range for profilers and a loop over hooks. The range takes
6 µs, and up to 90 where caches are cold, whether or not there is a profiler.
"""

from typing import Any

import torch
from torch.optim import optimizer as torchs
from torch.optim.optimizer import Optimizer

_UNKNOWN: dict[Any, Any] = {"": None}
"""For hooks that another torch keeps elsewhere: as if there was one."""

_BEFORE_ALL = getattr(torchs, "_global_optimizer_pre_hooks", _UNKNOWN)
_AFTER_ALL = getattr(torchs, "_global_optimizer_post_hooks", _UNKNOWN)
_PROFILING = getattr(torch.autograd, "_profiler_enabled", lambda: True)


def is_observed(optimizer: Optimizer) -> bool:
    """Whether there is a hook of steps or a profiler, so that `profile_hook_step` has a purpose."""
    return bool(
        _PROFILING()
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _BEFORE_ALL
        or _AFTER_ALL
    )
