"""Naming the rank that a GPU waits for: nothing on the host fails there, the stream just stands.

On CUDA an exchange is queued and the host goes on. If a rank never joins it, the stream of all
others waits: in a kernel of NCCL, whose own watchdog ends the process after the group's timeout
without a name, or, with copies between GPUs, in a wait that no one limits. A thread looks at the
last exchange now and then. When one has been under way for nearly the timeout, it holds the roll
call of `failure.py`, says who is missing, and ends the process, as an error could be raised
nowhere: the program's own thread waits in the driver. Ranks come to an exchange at different times,
so the others' calls are over before the last one's timeout: who waits as well signs at once.
"""

import ctypes
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist

from tilewright_dist.channel import Channel
from tilewright_dist.failure import ROLL_CALL_SECONDS, absent_ranks, sign_if_called

LOOKS = 20
"""A timeout, at least; once a second at most."""

HEAD_START = 2 * ROLL_CALL_SECONDS
"""Before the timeout, at most half of it: time for a roll call before NCCL's own watchdog ends the
process without a name."""

_RELAXED = 2
"""Mode of the driver in which a query does not end a graph's capture by another thread."""


class Awaited(Protocol):
    """What an exchange ends with: a CUDA event."""

    def query(self) -> bool:
        """Whether it is over."""
        ...


class Watchdog:
    """Looks after the exchanges of one stream, from the first one on until it is dropped.

    Args:
        process_group: The ranks; not kept.
        device: Of the stream.
        end: What to do with the message, for tests; None prints it and ends the process.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        device: torch.device,
        end: Callable[[str], None] | None = None,
    ) -> None:
        self._process_group = weakref.ref(process_group)
        self._device = device
        timeout = process_group._get_backend(device).options._timeout.total_seconds()
        self._timeout = max(timeout / 2, timeout - HEAD_START)
        self._interval = min(1.0, self._timeout / LOOKS)
        self._end = end or _say_and_exit
        self._latest: tuple[float, Awaited] | None = None
        self._watched: tuple[float, Awaited] | None = None
        self._lock = threading.Lock()
        self._has_thread = False
        self._has_signed = False

    def watch(self, awaited: Awaited) -> None:
        """Take note of an exchange that has been started."""
        with self._lock:
            self._latest = (time.monotonic(), awaited)
        if not self._has_thread:
            self._has_thread = True
            arguments = (weakref.ref(self), self._interval, self._device)
            threading.Thread(target=_look_now_and_then, args=arguments, daemon=True).start()

    def look(self) -> None:
        """Go on to the latest exchange if that which is watched is over; end if it is late."""
        if self._watched is None or self._watched[1].query():
            # Taken away, so that what is over is asked once: queries cost.
            with self._lock:
                self._watched, self._latest = self._latest, None
            return
        process_group = self._process_group()
        waited = time.monotonic() - self._watched[0]
        if process_group is None:
            return
        if waited < self._timeout:
            # Exchanges that get on are over sooner: in good times nobody asks the store.
            if waited > self._interval and not self._has_signed:
                self._has_signed = sign_if_called(process_group)
            return
        missing = absent_ranks(process_group)
        who = "all ranks answer: one of their GPUs hangs, or they wait for different exchanges"
        if missing:
            who = f"rank(s) {', '.join(map(str, missing))} died or hang"
        self._end(
            f"rank {dist.get_rank()}: an exchange has been under way for {self._timeout:.0f} s, "
            f"{who}. Restart from the last checkpoint (torchrun --max-restarts does)"
        )
        self._watched = None


def watchdog_of(process_group: dist.ProcessGroup, device: torch.device) -> Watchdog | None:
    """One for exchanges that are queued on a GPU; on CPUs they fail where they are waited for."""
    if device.type != "cuda" or process_group.size() == 1:
        return None
    return Watchdog(process_group, device)


def watched_channel(process_group: dist.ProcessGroup, device: torch.device) -> Channel:
    """A channel of a device, its exchanges looked after where they are queued."""
    watchdog = watchdog_of(process_group, device)
    return Channel(device, watchdog.watch if watchdog else None)


def _look_now_and_then(
    reference: "weakref.ref[Watchdog]", interval: float, device: torch.device
) -> None:
    if device.type == "cuda":
        # A thread's first call makes a context on its current device, which would be GPU 0.
        torch.cuda.set_device(device)
        mode = ctypes.c_int(_RELAXED)
        ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    while True:
        time.sleep(interval)
        watchdog = reference()
        if watchdog is None or watchdog._process_group() is None:
            return
        watchdog.look()
        del watchdog


def _say_and_exit(message: str) -> None:
    print(f"RankFailure: {message}", file=sys.stderr, flush=True)
    # As the backend's watchdog does: no cleaning up can be waited for.
    os._exit(1)
