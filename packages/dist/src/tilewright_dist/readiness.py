"""Which collectives may start: those whose gradients are all there, in an order all ranks share.

Ranks that started collectives in different orders would exchange the wrong memory or wait for each
other for ever, and gradients need not arrive in the same order everywhere. So a unit (a parameter,
a bucket) starts when its own gradients and those of all units before it have arrived.
"""

from collections import Counter
from collections.abc import Mapping, Sequence


class ReadyQueue:
    """Counts the arrivals of one backward pass.

    Args:
        units: Members by unit, in starting order.
        expected: How often each member arrives; None is once each.
        learns: Start nothing and count, for a first pass whose arrivals say what later ones expect.
    """

    def __init__(
        self,
        units: Sequence[Sequence[str]],
        expected: Mapping[str, int] | None = None,
        *,
        learns: bool = False,
    ) -> None:
        self._unit_of = {name: index for index, unit in enumerate(units) for name in unit}
        self._number = len(units)
        self._expected = {n: 1 if expected is None else expected.get(n, 0) for n in self._unit_of}
        self._learns = learns
        self.reset()

    def reset(self) -> None:
        """Forget all arrivals."""
        self.counts: Counter[str] = Counter()
        """How often each member has arrived, in the order of first arrivals."""
        self._incomplete = [0] * self._number
        for name, count in self._expected.items():
            self._incomplete[self._unit_of[name]] += count > 0
        self._next = 0

    def arrived(self, name: str) -> list[int]:
        """Note a gradient; return the units to start now.

        Raises:
            RuntimeError: It arrived more often than expected.
        """
        self.counts[name] += 1
        if self._learns:
            return []
        if self.counts[name] > self._expected[name]:
            raise RuntimeError(
                f"the gradient of {name!r} arrived {self.counts[name]} times in one backward pass, "
                f"{self._expected[name]} expected: the parameter is used in several reentrant "
                "checkpoints (pass use_reentrant=False to them, or static_graph=True here), or "
                "the graph of a static_graph module has changed"
            )
        if self.counts[name] == self._expected[name]:
            self._incomplete[self._unit_of[name]] -= 1
        first = self._next
        while self._next < self._number and self._incomplete[self._next] == 0:
            self._next += 1
        return list(range(first, self._next))

    def rest(self) -> list[int]:
        """The units that have not started; they count as started from now on."""
        rest = list(range(self._next, self._number))
        self._next = self._number
        return rest
