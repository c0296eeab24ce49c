"""Where autocast ends: inside an operator whose operands have been cast already."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A block in which torch computes in the dtypes that it is given, on x's device.

    A reference that widens its operands needs it, and so does a backward: it may run under an
    autocast that its forward did not.
    """
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
