"""How pytest-benchmark comes to save device time: a clock that moves only when told to.

pytest-benchmark reads its timer before and after a call and saves the difference. The host's clock
is the wrong one: a GPU call returns before its work is done, and a synchronization inside the
timed region adds its own cost and the launch latency to every sample. So the calls are timed first,
by CUDA events (`tilewright_bench.timer`); then `replay` plays each sample back as one round: the
round's function does nothing but advance `device_clock` by the measured time. All statistics,
tables and JSON fields of pytest-benchmark are then device times, through its documented option
`--benchmark-timer` alone.
"""

import math
from collections.abc import Sequence

from pytest_benchmark.fixture import BenchmarkFixture


class DeviceClock:
    """A clock in seconds that stands still between calls of `advance`."""

    __name__ = "device_clock"  # pytest-benchmark finds a timer again by module and name

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        """Seconds advanced so far."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds


device_clock = DeviceClock()
"""The timer of a benchmark session: pytest-benchmark takes one by the name module.attribute."""


def replay(benchmark: BenchmarkFixture, samples: Sequence[float]) -> None:
    """Record samples [seconds] as the rounds of `benchmark`.

    Raises:
        RuntimeError: the session runs with another timer than `device_clock`.
    """
    remaining = iter(samples)
    # A profiler (--benchmark-cprofile) calls once more than there are rounds.
    benchmark.pedantic(lambda: device_clock.advance(next(remaining, 0.0)), rounds=len(samples))
    assert benchmark.stats is not None
    if not math.isclose(benchmark.stats["total"], math.fsum(samples), rel_tol=1e-6):
        raise RuntimeError(
            "pytest-benchmark did not record device times: run pytest on the folder whose "
            "conftest.py imports the hooks of tilewright_bench.plugin, or add "
            "--benchmark-timer=tilewright_bench.clock.device_clock"
        )
