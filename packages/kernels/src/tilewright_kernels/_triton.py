"""Triton, or a stand-in for it where it cannot be installed.

Triton publishes wheels for Linux only. Elsewhere (macOS, Windows) the package must still import, so
that the references run: there every decorator of Triton hands its function back, and every other
name leads nowhere. Kernels import `tl` and `triton` from here and notice no difference.
"""

import importlib.util
import os
from typing import TYPE_CHECKING, Any

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on the CPU. Triton decides when it decorates one."""


class _Absent:
    """A name of Triton where there is no Triton."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As a decorator, hand the function back; as a decorator factory, hand out a decorator."""
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self


if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl
else:
    triton = tl = _Absent()

__all__ = ["HAS_TRITON", "INTERPRETED", "tl", "triton"]
