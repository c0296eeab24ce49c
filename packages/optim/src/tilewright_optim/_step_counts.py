"""Step counts of a launch: one to each parameter, read and advanced as one.

Each is a tensor of its own to its owner, and all are views of one (`pack_steps`), so that the host
touches 4 KB for a thousand of them. Whether they are as this optimizer left them is a comparison of
bytes, of 0.5 µs, where torch's comparison and addition take 60 with cold caches. They are compared
at each step, for what is written through `.data` or NumPy moves no version.
"""

import ctypes
import struct
from typing import Any

import torch
from torch import Tensor

from tilewright_optim._states import as_one
from tilewright_optim._tables import addresses

_FORMATS = {torch.float32: struct.Struct("f"), torch.float64: struct.Struct("d")}
"""Of the dtypes that step counts usually have."""


class StepCounts:
    """Step counts of parameters that are stepped at once.

    Args:
        steps: 0-d tensors, at least one, on one device and of one dtype.

    Attributes:
        steps: as given.
        places: their addresses.
        flat: the tensor whose elements they are, or None.
    """

    def __init__(self, steps: list[Tensor]) -> None:
        self.steps = steps
        self.places = addresses(steps)
        self.flat = as_one(steps)
        self._memory = self._where()
        self._format = _FORMATS.get(steps[0].dtype) if _is_plain(self.flat) else None
        self._zeros = [0] * len(steps)
        self._known = b""  # what was there when they were last read or advanced,
        self._first = 0.0  # the first of that,
        self._ahead = self._zeros  # and what each is ahead of it

    def stay(self) -> bool:
        """Whether the memory of `flat` is where it was, as large as it was."""
        return self._where() == self._memory

    def read(self) -> tuple[float, list[int]]:
        """The first count, on the host, and what each is ahead of it."""
        found = self._bytes()
        if found is None or found != self._known:
            values = [step.item() for step in self.steps] if self.flat is None else self._values()
            self._first = values[0]
            same = values.count(self._first) == len(values)
            self._ahead = self._zeros if same else [int(v - self._first) for v in values]
            self._known = found or b""
        return self._first, self._ahead

    def advance(self, found_inf: Tensor | None) -> None:
        """Add 1 to each, after the launch, all of whose programs read them.

        Args:
            found_inf: where it is not 0 they stay; on their device.
        """
        if self.flat is None:
            steps = self.steps
            done = torch.ones_like(steps[0]) if found_inf is None else (found_inf == 0).to(steps[0])
            # One tensor for all of them: a Python number is five times as slow on the CPU.
            torch._foreach_add_(steps, [done] * len(steps))
        elif found_inf is None and self._known and self._ahead is self._zeros and self._format:
            self._write(self._first + 1, self.flat, self._format)
        else:
            self.flat.add_(1 if found_inf is None else found_inf == 0)

    def advanced(self) -> None:
        """Tell autograd that a kernel has added 1 to each."""
        steps = self.steps if self.flat is None else [self.flat]
        torch.autograd.graph.increment_version(steps)  # views of one tensor have one version

    def _write(self, value: float, flat: Tensor, number: struct.Struct) -> None:
        """Make all of them this value, where `read` has just found them alike."""
        self._known = number.pack(value) * len(self.steps)
        (self._first,) = number.unpack_from(self._known)  # rounded as in torch
        ctypes.memmove(flat.data_ptr(), self._known, len(self._known))
        self.advanced()

    def _bytes(self) -> bytes | None:
        """What lies there, None if that is not to be read without torch."""
        if self.flat is None or self._format is None or not self.stay():
            return None
        return ctypes.string_at(self.flat.data_ptr(), self._format.size * len(self.steps))

    def _values(self) -> list[Any]:
        assert self.flat is not None
        return self.flat.tolist()

    def _where(self) -> tuple[int, int] | None:
        flat = self.flat
        return None if flat is None else (flat.data_ptr(), flat.untyped_storage().nbytes())


def _is_plain(flat: Tensor | None) -> bool:
    if flat is None or type(flat) is not Tensor:
        return False
    return flat.is_cpu and not flat.is_inference() and not flat.is_neg()
