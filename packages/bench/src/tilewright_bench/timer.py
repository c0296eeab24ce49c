"""How long a call takes on its device: CUDA graphs or events on a GPU, the host's clock on a CPU.

What is timed is a rotation: calls over several sets of inputs, run in turn. On a GPU a millisecond
or more of them is captured into a CUDA graph, and a replay between two events is one sample: device
time alone, even for calls that end sooner than the host can launch the next. What cannot be
captured (it waits for the device, say) is timed eagerly, each call between two events. Either way a
spin kernel goes first and holds the device while the host queues a block of samples behind it, so
that gaps between launches, which belong to the host, stay out of the figures. The host's own time
for an eager call is measured apart.

Blocks of several rotations alternate, so that a change of clocks or temperature meets all of them,
and each is summed up by its median.
"""

import contextlib
import gc
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
Times = list[tuple[float, float]]
"""(device seconds, host seconds) of each timed call."""

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


class Timer(Protocol):
    """Times blocks of calls of one function."""

    clock: str

    def block(
        self, call: Call, count: int, *, lead: float = 0.0, reset: Call | None = None
    ) -> Times:
        """Run `call` `count` times, each after `reset`.

        Args:
            call: the function.
            count: calls to time; before short ones, one more goes uncounted.
            lead: seconds by which the host shall be ahead of the device at the first call.
            reset: runs before each call, outside its time.
        """
        ...

    def capture(self, calls: Sequence[Call], count: int) -> Call | None:
        """A function that does what `count` calls in turn would; None where that cannot be had."""
        ...


class HostTimer:
    """time.perf_counter, for devices that work synchronously: the CPU."""

    clock = "perf_counter"

    def block(
        self, call: Call, count: int, *, lead: float = 0.0, reset: Call | None = None
    ) -> Times:
        """See Timer; there is nothing to be ahead of, so `lead` is not used."""
        del lead
        call()
        times = []
        for _ in range(count):
            if reset is not None:
                reset()
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            times.append((elapsed, elapsed))
        return times

    def capture(self, calls: Sequence[Call], count: int) -> Call | None:
        """None: a CPU has no launches to record."""
        del calls, count
        return None


class CudaTimer:
    """CUDA events around each call, or around each replay of a graph, on the current stream.

    The graphs of one timer share their memory: no result outlives the call that made it.
    """

    clock = "cuda events"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._device_index = torch.cuda._utils._get_device_index(device, optional=True)
        self._pool = torch.cuda.graph_pool_handle()

    def block(
        self, call: Call, count: int, *, lead: float = 0.0, reset: Call | None = None
    ) -> Times:
        """See Timer."""
        reset = reset or _nothing
        edges = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(count)
        ]
        host = []
        torch.cuda.synchronize(self._device)
        if lead > 0:
            torch.cuda._sleep(int(lead * _cycles_per_second(self._device)))
        if count > 1:  # a block of one is of calls so long that their start does not show
            reset()
            call()
        for start, end in edges:
            reset()
            start.record()
            before = time.perf_counter()
            call()
            host.append(time.perf_counter() - before)
            end.record()
        torch.cuda.synchronize(self._device)
        # elapsed_time is in milliseconds.
        device = [start.elapsed_time(end) / 1e3 for start, end in edges]
        return list(zip(device, host, strict=True))

    def capture(self, calls: Sequence[Call], count: int) -> Call | None:
        """See Timer: the replay of a CUDA graph; None for calls that a graph cannot hold.

        The calls must have run before on the current stream, backwards' forwards included: what a
        first call does (compiling, tuning, making workspaces) is not to be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # A capture that fails leaves memory taken; most are known to fail beforehand.
            with _synchronization_forbidden():
                calls[0]()
            # The collector might free something on the device, which no capture survives.
            with (
                _collector_off(),
                torch.cuda.graph(
                    graph, pool=self._pool, stream=torch.cuda.current_stream(self._device)
                ),
            ):
                for call in itertools.islice(itertools.cycle(calls), count):
                    call()
        except Exception:
            self._abandon_capture()
            return None
        return graph.replay

    def _abandon_capture(self) -> None:
        """Undo what torch leaves of a capture that failed, its memory and random generators that
        refuse to run; after one that was never begun, this does nothing.
        """
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device_index, self._pool)
            torch._C._cuda_releasePool(self._device_index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        # The generators are put right by the end of a capture that succeeds.
        stream = torch.cuda.current_stream(self._device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            torch.cuda._sleep(1)


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


def timer_for(device: torch.device) -> Timer:
    """The timer that suits a device.

    Raises:
        ValueError: neither a CPU nor a CUDA device.
    """
    if device.type == "cuda":
        return CudaTimer(device)
    if device.type == "cpu":
        return HostTimer()
    raise ValueError(f"device {device} cannot be timed; use cuda or cpu")


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


def interleave(watches: Sequence[Stopwatch]) -> None:
    """Take a block of each in turn until all are done."""
    while pending := [watch for watch in watches if not watch.done]:
        for watch in pending:
            watch.block()


def rotating(calls: Sequence[Call]) -> Call:
    """One call that runs the given ones in turn."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Work on a stream that graphs can be captured from; the default stream is none."""
    if device.type != "cuda":
        yield
        return
    stream, before = _stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(before)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
    before.wait_stream(stream)


def _calls_per_graph(sets: int, seconds: float) -> int:
    """Whole rotations that last SAMPLE_SECONDS, as far as MAX_GRAPH_CALLS allows more than one."""
    rotations = math.ceil(SAMPLE_SECONDS / (sets * seconds))
    return sets * max(1, min(rotations, MAX_GRAPH_CALLS // sets))


def _medians(times: Times) -> tuple[float, float]:
    device = statistics.median(t for t, _ in times)
    return max(device, 1e-9), statistics.median(t for _, t in times)


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@lru_cache
def _cycles_per_second(device: torch.device) -> float:
    """Cycles a second of the spin kernel, which counts cycles of the SM's clock."""
    cycles = 2_000_000
    with torch.cuda.device(device):
        for _ in range(2):  # the first is slower: module load, low clocks
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.cuda._sleep(cycles)
            end.record()
            torch.cuda.synchronize()
    return cycles / (start.elapsed_time(end) / 1e3)


@contextmanager
def _synchronization_forbidden() -> Iterator[None]:
    """Raise where the host would wait for the device."""
    with warnings.catch_warnings():
        # Once a process, torch says that the mode is a prototype.
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def _collector_off() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _nothing() -> None:
    pass
