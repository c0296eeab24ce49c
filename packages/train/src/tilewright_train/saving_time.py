"""What saving costs a run, measured while it trains.

Steps wait while the state is copied (on a GPU until its copies have arrived, which its events tell
and the host's clock does not) and while a former checkpoint is still being written. Beside the
writing they may be slower, since the host and its memory are shared: that is told from the steps
beside which nothing is written. At the end the run waits for its last checkpoint.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

_FIRST = 10  # steps that compile kernels and fill caches


class Clock(Protocol):
    """Moments of a device, and the seconds between them."""

    def mark(self) -> Any:
        """The moment at which the device has done what was asked of it until now."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two of them; both have passed."""


class HostClock:
    """Of a CPU."""

    def mark(self) -> float:
        """Now."""
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        """The difference."""
        return end - begin


class DeviceClock:
    """Of a GPU, by events in its current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """An event behind all that is queued."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """By the GPU's clock."""
        end.synchronize()
        return begin.elapsed_time(end) / 1000


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()


@dataclass
class _Steps:
    """Some steps' number and time."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.count += 1
        self.seconds += seconds

    @property
    def mean(self) -> float:
        """Of a step."""
        return self.seconds / self.count


@dataclass
class SavingTime:
    """Adds up what this process's checkpoints cost."""

    clock: Clock
    """Of the device that trains."""
    checkpoints: int = 0
    """That were begun."""
    held: float = 0.0
    """Seconds for which steps waited."""
    last: float = 0.0
    """Seconds for which the end of the run waited."""
    _open: tuple[Any, Any] | None = None
    _steps: int = 0
    _quiet: _Steps = field(default_factory=_Steps)
    _beside: _Steps = field(default_factory=_Steps)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """A checkpoint is begun: the next step waits for what the device is asked to do in here."""
        self._read()
        begin = self.clock.mark()
        yield
        self._open = begin, self.clock.mark()
        self.checkpoints += 1

    @contextlib.contextmanager
    def end(self) -> Iterator[None]:
        """The last checkpoint is waited for."""
        began = time.perf_counter()
        yield
        self.last += time.perf_counter() - began

    def step(self, seconds: float, *, beside: bool) -> None:
        """A step is done.

        Args:
            seconds: It took, with its wait for a checkpoint.
            beside: Whether a checkpoint is being written.
        """
        waited = self._read()
        self._steps += 1
        if self._steps > _FIRST:
            # Behind a checkpoint the GPU has nothing queued and waits for the host: that counts.
            (self._beside if beside or waited else self._quiet).add(seconds - waited)

    @property
    def slower(self) -> float:
        """Seconds by which steps beside a writing took longer than others."""
        if not self._quiet.count or not self._beside.count:
            return 0.0
        return max(0.0, self._beside.count * (self._beside.mean - self._quiet.mean))

    def summary(self, loop_seconds: float) -> dict[str, Any]:
        """For summary.json.

        Args:
            loop_seconds: From the first step until the last checkpoint was there.
        """
        self._read()
        whole = self.held + self.slower + self.last
        return {
            "checkpoints": self.checkpoints,
            "seconds": whole,
            "steps_waited": self.held,
            "steps_beside_writing": self._beside.count,
            "steps_slower": self.slower,
            "waited_for_last": self.last,
            "loop_seconds": loop_seconds,
            "share": whole / loop_seconds if loop_seconds > 0 else 0.0,
        }

    def _read(self) -> float:
        """Seconds of the wait that was measured last; 0 where they are counted already."""
        if self._open is None:
            return 0.0
        seconds = self.clock.seconds(*self._open)
        self._open = None
        self.held += seconds
        return seconds


def saving_in_words(saving: Mapping[str, Any]) -> str:
    """The line for a person."""
    number = saving["checkpoints"]
    return (
        f"{saving['share']:.1%} of the time: {number} checkpoint{'' if number == 1 else 's'};"
        f" steps waited {saving['steps_waited']:.2f} s for copies and former checkpoints, and were"
        f" {saving['steps_slower']:.2f} s slower beside the writing, the end waited"
        f" {saving['waited_for_last']:.2f} s"
    )
