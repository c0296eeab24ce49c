"""`run`: measure one variant of one case and hand the result to pytest-benchmark.

The variants of a case that a session runs in one direction are a group. The first of them to come
has the whole group measured (`tilewright_bench.together`); the others find their times ready.
"""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from tilewright_bench.case import Case, Variant
from tilewright_bench.clock import replay
from tilewright_bench.environment import default_device
from tilewright_bench.together import Measured, Outcome, measure_together

CPU_PROVIDERS = ("tilewright", "torch")
"""A CPU run only shows that the benchmarks work: no compilers, no GPU packages."""


def run(benchmark: BenchmarkFixture, case: Case, variant: Variant) -> None:
    """Measure a variant of a case on the device at hand; the body of every bench_ function.

    The benchmark's statistics become device times, its `extra_info` a `Measurement`, its group the
    operator, case and direction, so that the providers of one case share a table. Under
    --benchmark-disable the variant runs once and is only compared with float64. A result that is
    wrong fails the benchmark in either case.

    Args:
        benchmark: pytest-benchmark's fixture.
        case: what to measure.
        variant: whose code, in which direction. Other providers than CPU_PROVIDERS are skipped on
            a CPU. tilewright runs its Triton kernels on a GPU and fails where it cannot.
    """
    device = default_device()
    if not _runs_on(device, variant):
        pytest.skip(f"{variant.provider}: compared on a GPU only")
    benchmark.group = f"{case.operator} {case} {variant.direction}"
    # Plain values: the parameters themselves would be saved as unreadable representations.
    benchmark.params = {
        "case": str(case),
        "direction": variant.direction,
        "provider": variant.provider,
    }
    group = selected.get(benchmark.fullname) or Group(case, [variant])
    measured = group.result(variant, device, timed=not benchmark.disabled)
    if measured is None:
        benchmark.pedantic(lambda: None)  # or pytest-benchmark warns of an unused fixture
        return
    benchmark.extra_info.update(dataclasses.asdict(measured.measurement))
    replay(benchmark, measured.samples.seconds)


class Group:
    """The variants of one case in one direction that a session runs; measured once, together."""

    def __init__(self, case: Case, variants: Sequence[Variant]) -> None:
        self._case, self._variants = case, tuple(variants)
        self._outcomes: dict[Variant, Outcome] = {}

    def result(self, variant: Variant, device: torch.device, *, timed: bool) -> Measured | None:
        """What came of a variant, measured now unless an earlier one has seen to it.

        Raises:
            BaseException: what the variant's own code raised, a skip or a failure included.
        """
        if variant not in self._outcomes:
            variants = [v for v in self._variants if _runs_on(device, v)]
            self._outcomes = measure_together(self._case, variants, device, timed=timed)
        outcome = self._outcomes.pop(variant)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


selected: dict[str, Group] = {}
"""The group of each benchmark of the session by its node id: `tilewright_bench.plugin` fills it,
because a benchmark sees nothing of the session but its own fixture."""


def _runs_on(device: torch.device, variant: Variant) -> bool:
    return device.type == "cuda" or variant.provider in CPU_PROVIDERS
