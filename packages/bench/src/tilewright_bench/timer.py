"""How long a call takes on its device: CUDA events on a GPU, the host's clock on a CPU.

On a GPU each call lies between two events. A spin kernel goes first and holds the device while the
host queues a whole block of calls behind it, so that the gaps between launches, which belong to
the host, stay out of the figures; the host's own time for a call is measured apart. The first call
after the spin is not counted. Several functions are measured in alternating blocks, so that a
change of clocks or temperature meets all of them, and each is summed up by its median.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], Any]

CALLS_PER_BLOCK = 10
WARMUP_SECONDS = 0.05
"""Long enough for clocks to rise; compilation and autotuning happen in the first call before it."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Times of single calls of one function.

    Attributes:
        clock: what measured `seconds`.
        seconds: a call's time on the device.
        host_seconds: time until the same call returned on the host.
    """

    clock: str
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

    def block(self, call: Call, count: int, lead: float = 0.0) -> list[tuple[float, float]]:
        """Run `call` once uncounted, then `count` times.

        Args:
            call: the function.
            count: calls that are timed.
            lead: seconds by which the host shall be ahead of the device at the first call.

        Returns:
            (device seconds, host seconds) of each timed call.
        """
        ...


class HostTimer:
    """time.perf_counter, for devices that work synchronously: the CPU."""

    clock = "perf_counter"

    def block(self, call: Call, count: int, lead: float = 0.0) -> list[tuple[float, float]]:
        """See Timer; there is nothing to be ahead of, so `lead` is not used."""
        del lead
        call()
        times = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            times.append((elapsed, elapsed))
        return times


class EventTimer:
    """CUDA events around each call on the current stream of `device`."""

    clock = "cuda events"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cycles_per_second = self._calibrate()

    def block(self, call: Call, count: int, lead: float = 0.0) -> list[tuple[float, float]]:
        """See Timer."""
        with torch.cuda.device(self._device):
            edges = [
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
                for _ in range(count)
            ]
            host = []
            torch.cuda.synchronize()
            if lead > 0:
                torch.cuda._sleep(int(lead * self._cycles_per_second))
            call()
            for start, end in edges:
                start.record()
                before = time.perf_counter()
                call()
                host.append(time.perf_counter() - before)
                end.record()
            torch.cuda.synchronize()
        # elapsed_time is in milliseconds.
        device = [start.elapsed_time(end) / 1e3 for start, end in edges]
        return list(zip(device, host, strict=True))

    def _calibrate(self) -> float:
        """Cycles a second of the spin kernel, which counts cycles of the SM's clock."""
        cycles = 2_000_000
        with torch.cuda.device(self._device):
            for _ in range(2):  # the first is slower: module load, low clocks
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                torch.cuda._sleep(cycles)
                end.record()
                torch.cuda.synchronize()
        return cycles / (start.elapsed_time(end) / 1e3)


def timer_for(device: torch.device) -> Timer:
    """The timer that suits a device.

    Raises:
        ValueError: neither a CPU nor a CUDA device.
    """
    if device.type == "cuda":
        return EventTimer(device)
    if device.type == "cpu":
        return HostTimer()
    raise ValueError(f"device {device} cannot be timed; use cuda or cpu")


def time_interleaved(
    calls: Sequence[Call],
    device: torch.device,
    *,
    seconds: float,
    min_rounds: int = 30,
    max_rounds: int = 500,
) -> list[Samples]:
    """Time several functions in alternating blocks.

    Args:
        calls: functions without arguments; each warms up before anything is counted.
        device: where they work.
        seconds: device time to spend on each function, roughly.
        min_rounds: calls to time of each function, at least, whatever they take.
        max_rounds: and at most (in whole blocks).

    Raises:
        ValueError: no calls, or limits of rounds that contradict each other.
    """
    if not calls:
        raise ValueError("calls is empty; give at least one function to time")
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(f"min_rounds {min_rounds} must lie between 1 and max_rounds {max_rounds}")
    timer = timer_for(device)
    plans = [_plan(timer, call, seconds, min_rounds, max_rounds) for call in calls]
    taken: list[list[tuple[float, float]]] = [[] for _ in calls]
    for turn in range(max(blocks for blocks, _ in plans)):
        for call, (blocks, lead), times in zip(calls, plans, taken, strict=True):
            if turn < blocks:
                times += timer.block(call, CALLS_PER_BLOCK, lead)
    return [
        Samples(
            clock=timer.clock,
            seconds=tuple(device for device, _ in times),
            host_seconds=tuple(host for _, host in times),
        )
        for times in taken
    ]


def _plan(
    timer: Timer, call: Call, seconds: float, min_rounds: int, max_rounds: int
) -> tuple[int, float]:
    """Warm up, then choose the number of blocks and the host's lead."""
    call()
    spent, times = 0.0, [(0.0, 0.0)]
    while spent < min(WARMUP_SECONDS, seconds):
        started = time.perf_counter()
        times = timer.block(call, 5)
        spent += time.perf_counter() - started
    device = statistics.median(t for t, _ in times)
    host = statistics.median(t for _, t in times)
    rounds = min(max(min_rounds, math.ceil(seconds / max(device, 1e-9))), max_rounds)
    # Half again the time that queueing takes; the uncounted call is queued behind the spin too.
    return math.ceil(rounds / CALLS_PER_BLOCK), 1.5 * host * (CALLS_PER_BLOCK + 1)
