"""Variants of one case measured together: the same inputs, alternating blocks, one ceiling.

Each variant goes through the stages on its own: built, compared with float64, called on all inputs,
its memory taken, its calls captured. What one of them raises is kept for its own test, and the
others go on. Then blocks of all that are left alternate with blocks of a copy that moves the same
number of bytes: providers are compared within the same seconds, and their share of the ceiling
refers to the device at that moment.

Inputs are rotated: enough sets are made that their traffic is several times the L2 cache, so that
no call finds its inputs there because the call before left them. All providers get the same
tensors, except one that overwrites them: it gets its own, put back before each sample.
"""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import pytest
import torch
import torch._functorch.config
from torch import Tensor

from tilewright_bench.case import Case, Direction, Function, Variant
from tilewright_bench.ceilings import copies, input_sets, matmul_tflop_per_s
from tilewright_bench.evaluate import (
    Inputs,
    Oracle,
    Verdict,
    directed,
    error_limit,
    restoring,
    tensors,
)
from tilewright_bench.measurement import Measurement
from tilewright_bench.stopwatch import GRAPH_CLOCK, Rotation, Samples, Stopwatch, interleave
from tilewright_bench.timer import Call, side_stream, timer_for
from tilewright_kernels import use_backend

S = TypeVar("S")
T = TypeVar("T")

GPU_SECONDS, CPU_SECONDS = 0.2, 0.02
"""Device time spent on a variant, and as much on the copy beside it."""

MATMUL_INTENSITY = 32
"""FLOP per byte from which on matrix products are a ceiling too: well below the balance of any
device, well above what operators without products do."""

_FAILURES = (Exception, pytest.skip.Exception, pytest.fail.Exception)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A variant's measurement and the samples that it sums up."""

    measurement: Measurement
    samples: Samples


Outcome = Measured | BaseException | None
"""None: its result was right, and nothing was timed."""


def measure_together(
    case: Case, variants: Sequence[Variant], device: torch.device, *, timed: bool = True
) -> dict[Variant, Outcome]:
    """Check variants of one case in one direction and time them in alternating blocks.

    Args:
        case: what to measure.
        variants: whose code.
        device: where.
        timed: False only checks results, and compiles all that a timed run would compile.

    Returns:
        For each variant what was measured (None if nothing was timed), or what it raised.
    """
    (direction,) = {variant.direction for variant in variants}
    group = _Group(case, direction, device)
    with use_backend("auto"), fresh_compilers(device, direction), side_stream(device):
        outcomes = group.measure(variants) if timed else group.check(variants)
    return {**outcomes, **group.errors}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the device that one call needs.

    Attributes:
        peak_extra: at its peak, beyond what was held before it; None on a CPU.
        results: of its results, those that are no views of inputs.
    """

    peak_extra: int | None
    results: int


def memory_of(call: Call, inputs: Inputs, device: torch.device) -> Memory:
    """Run a call that has compiled before and look at its memory."""
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    results = tensors(call())
    peak = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    given = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, Tensor)}
    made = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in results}
    return Memory(peak_extra=peak, results=sum(made[at] for at in made.keys() - given))


def without_frames(error: BaseException) -> BaseException:
    """The error with a note of where it was raised, instead of frames, which hold tensors."""
    if isinstance(error, Exception):
        error.add_note("".join(traceback.format_exception(error)))
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


@contextmanager
def fresh_compilers(device: torch.device, direction: Direction) -> Iterator[None]:
    """torch.compile with an empty cache, for backwards that run more than once; unused on a CPU."""
    if device.type != "cuda":
        yield
        return
    # Each shape is compiled on its own: no limit of recompilations, no shapes made dynamic.
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    # Compiled backwards take saved tensors as scratch unless told that the graph is kept.
    with torch._functorch.config.patch(donated_buffer=direction != "bwd"):
        yield


@dataclass(frozen=True)
class _Candidate:
    """A variant whose results are right."""

    function: Function
    verdict: Verdict


@dataclass(frozen=True)
class _Contestant:
    """A variant that is ready to be timed."""

    verdict: Verdict
    memory: Memory
    watch: Stopwatch


class _Group:
    """The stages of one measurement; `errors` holds what variants raised on their way."""

    def __init__(self, case: Case, direction: Direction, device: torch.device) -> None:
        self._case, self._direction, self._device = case, direction, device
        self._work = case.work(direction)
        self.errors: dict[Variant, BaseException] = {}

    def check(self, variants: Sequence[Variant]) -> dict[Variant, None]:
        """Compare with float64, and call what the comparison did not: the inputs to be timed."""
        candidates = self._candidates(variants)
        if self._case.check_inputs is not None:
            inputs = self._case.inputs(self._device, seed=0)
            candidates = self._each(lambda _, c: self._call(c.function, inputs)(), candidates)
        return dict.fromkeys(candidates)

    def measure(self, variants: Sequence[Variant]) -> dict[Variant, Measured]:
        """Compare with float64, then time what is right."""
        candidates = self._candidates(variants)
        sets = self._case.sets or input_sets(self._work.bytes, self._device)
        inputs = [self._case.inputs(self._device, seed) for seed in range(sets)]
        timer = timer_for(self._device)
        seconds = GPU_SECONDS if self._device.type == "cuda" else CPU_SECONDS

        def prepare(_: Variant, candidate: _Candidate) -> _Contestant:
            rotation, memory = self._rotation(candidate, inputs)
            watch = Stopwatch(rotation, timer, seconds=seconds)
            return _Contestant(candidate.verdict, memory, watch)

        contestants = self._each(prepare, candidates)
        copying = Rotation(copies(self._work.bytes, sets, self._device))
        replayed, eager = (
            Stopwatch(copying, timer, seconds=seconds, graph=graph) for graph in (True, False)
        )
        watches = {contestant.watch: variant for variant, contestant in contestants.items()}

        def leave(watch: Stopwatch, error: BaseException) -> None:
            if watch not in watches:
                raise error
            self.errors[watches[watch]] = without_frames(error)
            del contestants[watches[watch]]

        interleave([*watches, replayed, eager], leave)
        copy_seconds = {watch.clock: watch.samples().median for watch in (replayed, eager)}
        if GRAPH_CLOCK in copy_seconds:
            # The driver copies blocks of 512 MiB at 2.7 TB/s in a graph, at 4.2 outside (H200).
            copy_seconds[GRAPH_CLOCK] = min(copy_seconds.values())
        beside = [variant.provider for variant in contestants]
        return {
            variant: self._measured(variant, contestant, copy_seconds, sets, beside)
            for variant, contestant in contestants.items()
        }

    def _candidates(self, variants: Sequence[Variant]) -> dict[Variant, _Candidate]:
        functions = self._each(lambda v, _: v.build(), dict.fromkeys(variants))
        oracle = Oracle(self._case, self._direction, self._device)

        def judge(variant: Variant, function: Function) -> _Candidate:
            verdict = oracle.judge(function)
            limit = error_limit(self._case.dtype)
            if not verdict.error <= limit:
                pytest.fail(
                    f"{variant} of {self._case.operator} {self._case}: error {verdict.error:.2g} "
                    f"against float64, more than {limit:.2g}; the time of a wrong result means "
                    f"nothing"
                )
            return _Candidate(function, verdict)

        return self._each(judge, functions)

    def _each(
        self, stage: Callable[[Variant, S], T], variants: Mapping[Variant, S]
    ) -> dict[Variant, T]:
        """Take each variant through a stage; one that raises goes no further."""
        passed = {}
        for variant, former in variants.items():
            try:
                passed[variant] = stage(variant, former)
            except _FAILURES as error:
                self.errors[variant] = without_frames(error)
        return passed

    def _call(self, function: Function, inputs: Inputs) -> Call:
        return directed(function, inputs, self._direction)

    def _rotation(self, candidate: _Candidate, inputs: Sequence[Inputs]) -> tuple[Rotation, Memory]:
        """The calls on all sets, each made once: compilation must not show in what follows."""
        reset = None
        if candidate.verdict.overwrites:
            own = [self._case.inputs(self._device, seed) for seed in range(len(inputs))]
            inputs, reset = own, restoring(own, inputs)
        calls = [self._call(candidate.function, one) for one in inputs]
        for call in calls:
            call()
        return Rotation(calls, reset), memory_of(calls[0], inputs[0], self._device)

    def _measured(
        self,
        variant: Variant,
        contestant: _Contestant,
        copy_seconds: Mapping[str, float],
        sets: int,
        beside: Sequence[str],
    ) -> Measured:
        samples, work = contestant.watch.samples(), self._work
        copy_s = copy_seconds[contestant.watch.clock]
        tflop_per_s = work.flops / samples.median / 1e12
        matmul = None
        if work.flops >= MATMUL_INTENSITY * work.bytes:
            dtype = self._case.products or self._case.dtype
            matmul = matmul_tflop_per_s(dtype, self._device)
        of_copy = copy_s / samples.median
        of_matmul = tflop_per_s / matmul if matmul else 0.0
        measurement = Measurement(
            operator=self._case.operator,
            case=str(self._case),
            direction=self._direction,
            provider=variant.provider,
            beside=tuple(name for name in beside if name != variant.provider),
            device=self._device.type,
            clock=samples.clock,
            calls_per_sample=samples.calls,
            input_sets=sets,
            bytes=work.bytes,
            flops=work.flops,
            gb_per_s=work.bytes / samples.median / 1e9,
            tflop_per_s=tflop_per_s,
            copy_gb_per_s=work.bytes / copy_s / 1e9,
            share_of_copy=of_copy,
            matmul_tflop_per_s=matmul,
            ceiling="matmul" if of_matmul > of_copy else "copy",
            share=max(of_copy, of_matmul),
            host_us=samples.host_median * 1e6,
            peak_extra_bytes=contestant.memory.peak_extra,
            result_bytes=contestant.memory.results,
            error=contestant.verdict.error,
        )
        return Measured(measurement=measurement, samples=samples)
