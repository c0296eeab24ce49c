"""Rotations of calls timed in blocks, so that blocks of several can alternate.

What is timed is a rotation: calls over several sets of inputs, run in turn. Where a millisecond or
more of them can be captured into a CUDA graph, a replay is one sample: device time alone, even for
calls that end sooner than the host can launch the next. Else a sample is one eager call. The host's
own time for an eager call is measured apart.

Blocks of several rotations alternate, so that a change of clocks or temperature meets all of them,
and each is summed up by its median.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tilewright_bench.timer import Call, Timer, Times, side_stream, timer_for

GRAPH_CLOCK = "cuda graph"

WARMUP_SECONDS = 0.03
"""Long enough for clocks to rise; compilation and autotuning happen in a first call before it."""

SAMPLE_SECONDS = 1e-3
"""A graph holds whole rotations that last as long; to start one takes less than 1 % of that."""

MAX_GRAPH_CALLS = 512

BLOCK_SECONDS = 0.01
BLOCK_SAMPLES = 10
"""A block holds samples for BLOCK_SECONDS, at least 1 and at most BLOCK_SAMPLES."""

MIN_ROUNDS, MAX_ROUNDS = 5, 500
"""Samples of a rotation, whatever they last."""

HOST_SAMPLES = 30
"""Eager calls whose host time is taken; fewer of calls that take milliseconds."""


@dataclass(frozen=True)
class Rotation:
    """Calls that are timed as one, each on another set of inputs.

    Attributes:
        calls: functions without arguments, run in turn.
        reset: puts back what the calls have overwritten; runs before each sample, untimed.
    """

    calls: Sequence[Call]
    reset: Call | None = None

    def __post_init__(self) -> None:
        if not self.calls:
            raise ValueError("calls is empty; give at least one function to time")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Times of one rotation.

    Attributes:
        clock: what measured `seconds`: "cuda graph", "cuda events" or "perf_counter".
        calls: calls that a sample is the mean of.
        seconds: a call's time on the device, one a sample.
        host_seconds: times until an eager call returned on the host.
    """

    clock: str
    calls: int
    seconds: tuple[float, ...]
    host_seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of `seconds`."""
        return statistics.median(self.seconds)

    @property
    def host_median(self) -> float:
        """Median of `host_seconds`."""
        return statistics.median(self.host_seconds)


class Stopwatch:
    """Times one rotation block by block; made when the rotation's calls have run once.

    Args:
        rotation: what is timed.
        timer: the device's.
        seconds: device time to spend, roughly.
        min_rounds: samples to take at least, whatever they last.
        max_rounds: and at most.
        graph: use a CUDA graph where the calls can be captured.
    """

    def __init__(
        self,
        rotation: Rotation,
        timer: Timer,
        *,
        seconds: float,
        min_rounds: int = MIN_ROUNDS,
        max_rounds: int = MAX_ROUNDS,
        graph: bool = True,
    ) -> None:
        self._timer, self._reset = timer, rotation.reset
        self._eager = rotating(rotation.calls)
        device, host = self._warm_up(min(WARMUP_SECONDS, seconds))
        self._host_count = min(max(3, math.ceil(WARMUP_SECONDS / device)), HOST_SAMPLES)
        self._host_lead = self._lead(host, BLOCK_SAMPLES)
        self._call, self._calls, self.clock = self._eager, 1, timer.clock
        if graph and (calls := _calls_per_graph(len(rotation.calls), device)):
            replay = timer.capture(rotation.calls, calls)
            if replay is not None:
                self._call, self._calls, self.clock = replay, calls, GRAPH_CLOCK
                replay()  # the first one uploads the graph
                device, host = _medians(timer.block(replay, 1, reset=self._reset))
        self._rounds = min(max(min_rounds, math.ceil(seconds / device)), max_rounds)
        self._per_block = min(max(1, int(BLOCK_SECONDS / device)), BLOCK_SAMPLES)
        self._device_lead = self._lead(host, self._per_block)
        self._seconds: list[float] = []
        self._host_seconds: list[float] = []

    @property
    def done(self) -> bool:
        """Whether all samples have been taken."""
        return len(self._seconds) >= self._rounds

    def block(self) -> None:
        """Take the next samples."""
        times = self._timer.block(
            self._call, self._per_block, lead=self._device_lead, reset=self._reset
        )
        self._seconds += (device / self._calls for device, _ in times)
        if self._call is self._eager:
            self._host_seconds += (host for _, host in times)
        elif len(self._host_seconds) < self._host_count:
            count = min(BLOCK_SAMPLES, self._host_count)
            times = self._timer.block(self._eager, count, lead=self._host_lead, reset=self._reset)
            self._host_seconds += (host for _, host in times)

    def samples(self) -> Samples:
        """All that was measured."""
        return Samples(
            clock=self.clock,
            calls=self._calls,
            seconds=tuple(self._seconds),
            host_seconds=tuple(self._host_seconds),
        )

    def _warm_up(self, seconds: float) -> tuple[float, float]:
        """Medians (device, host) of the calls after the first."""
        spent, times = 0.0, []
        while spent < seconds or not times:
            started = time.perf_counter()
            times += self._timer.block(self._eager, 1, reset=self._reset)
            spent += time.perf_counter() - started
        device, host = _medians(times[1:] or times)
        if device < SAMPLE_SECONDS:
            # Alone, a short call seems as long as its launch: look again with the host ahead.
            lead = self._lead(host, BLOCK_SAMPLES)
            times = self._timer.block(self._eager, BLOCK_SAMPLES, lead=lead, reset=self._reset)
            device, host = _medians(times)
        return device, host

    def _lead(self, host: float, count: int) -> float:
        """Half again the time that queueing takes, the uncounted call included."""
        started = time.perf_counter()
        if self._reset is not None:
            self._reset()
        return 1.5 * (host + time.perf_counter() - started) * (count + 1)


def time_interleaved(
    rotations: Sequence[Rotation],
    device: torch.device,
    *,
    seconds: float,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    graph: bool = True,
) -> list[Samples]:
    """Time several rotations in alternating blocks.

    Args:
        rotations: what to time; each warms up before anything is counted.
        device: where they work.
        seconds: device time to spend on each, roughly.
        min_rounds: samples to take of each, at least, whatever they last.
        max_rounds: and at most (in whole blocks).
        graph: time replays of CUDA graphs where the calls can be captured; else events.

    Raises:
        ValueError: nothing to time, or limits of rounds that contradict each other.
    """
    if not rotations:
        raise ValueError("rotations is empty; give at least one to time")
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(f"min_rounds {min_rounds} must lie between 1 and max_rounds {max_rounds}")
    limits: dict[str, Any] = {"seconds": seconds, "min_rounds": min_rounds}
    limits |= {"max_rounds": max_rounds, "graph": graph}
    timer = timer_for(device)
    with side_stream(device):
        for rotation in rotations:
            for call in rotation.calls:
                call()
        watches = [Stopwatch(rotation, timer, **limits) for rotation in rotations]
        interleave(watches)
    return [watch.samples() for watch in watches]


def interleave(
    watches: Sequence[Stopwatch],
    failed: Callable[[Stopwatch, Exception], None] | None = None,
) -> None:
    """Take a block of each in turn until all are done.

    Args:
        watches: whose blocks.
        failed: told of a watch that raised and takes no more part; None lets its error through.
    """
    pending = [watch for watch in watches if not watch.done]
    while pending:
        for watch in tuple(pending):
            try:
                watch.block()
            except Exception as error:
                if failed is None:
                    raise
                failed(watch, error)
                pending.remove(watch)
        pending = [watch for watch in pending if not watch.done]


def rotating(calls: Sequence[Call]) -> Call:
    """One call that runs the given ones in turn."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def _calls_per_graph(sets: int, seconds: float) -> int:
    """Whole rotations that last SAMPLE_SECONDS, as far as MAX_GRAPH_CALLS allows more than one."""
    rotations = math.ceil(SAMPLE_SECONDS / (sets * seconds))
    return sets * max(1, min(rotations, MAX_GRAPH_CALLS // sets))


def _medians(times: Times) -> tuple[float, float]:
    device = statistics.median(t for t, _ in times)
    return max(device, 1e-9), statistics.median(t for _, t in times)
