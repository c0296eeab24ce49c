"""The generator that the grammar draws from: SplitMix64 (Steele, Lea & Flood 2014), seeded by name.

`random` promises the same floats on every version of Python, but not the same choices.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal, TypeVar

Split = Literal["train", "instances", "templates"]
"""To train on; held-out instances of templates trained on; templates that are held out."""

_MASK = (1 << 64) - 1
_HELD_OUT = _MASK // 10  # a tenth of all instances
_T = TypeVar("_T")


class Draw:
    """Random choices that depend on a name alone."""

    def __init__(self, *name: str | int) -> None:
        self._state = _hash(*name)

    def below(self, bound: int) -> int:
        """A whole number from 0 to bound - 1."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        mixed = self._state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        return ((mixed ^ (mixed >> 31)) * bound) >> 64

    def choice(self, items: Sequence[_T]) -> _T:
        """One of `items`."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[_T], count: int) -> list[_T]:
        """Different ones of `items`, in random order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]


def is_held_out(*instance: str) -> bool:
    """Whether the hash of an instance lies in the lowest tenth."""
    return _hash(*instance) < _HELD_OUT


def _hash(*name: str | int) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(map(str, name)).encode()).digest()[:8], "big")
