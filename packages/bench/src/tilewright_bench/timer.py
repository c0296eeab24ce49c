"""How long a call takes on its device: CUDA events on a GPU, the host's clock on a CPU.

On a GPU each call lies between two events. A spin kernel goes first and holds the device while the
host queues a block of calls behind it, so that gaps between launches, which belong to the host,
stay out of the figures. A call may itself be the replay of a CUDA graph of many calls: that leaves
out the gaps within it too, and the few microseconds that two events add.
"""

import contextlib
import gc
import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
Times = list[tuple[float, float]]
"""(device seconds, host seconds) of each timed call."""


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
        # Asked beforehand, because torch does not recover from a capture that fails midway.
        try:
            with _synchronization_forbidden():
                calls[0]()
        except Exception:
            return None
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self._device)
        try:
            # The collector might free something on the device, which no capture survives.
            with _collector_off(), torch.cuda.graph(graph, pool=self._pool, stream=stream):
                for call in itertools.islice(itertools.cycle(calls), count):
                    call()
        except Exception:
            self._recover(stream)
            return None
        return graph.replay

    def _recover(self, stream: torch.cuda.Stream) -> None:
        """Undo what a failed capture leaves: memory taken, random generators that refuse to run."""
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        # One that Python's own error ended has been cleaned up: RuntimeError, nothing to end.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        # Generators are put right at the end of a capture that succeeds.
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            torch.cuda._sleep(1)


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
