"""Where exchanges run: beside the computation, started now and waited for later.

An exchange is a generator that yields every collective it has started (as an asynchronous `Work`)
and goes on when that one is over; `wire.py` holds them. The same generator runs on both kinds of
device:

- On CUDA at once and to its end, on a stream of the channel's own: waiting for a collective there
  makes that stream wait, never the host, and casts between two collectives leave the stream of the
  computation alone.
- On the CPU up to its first collective, which gloo's threads carry out. The rest runs when somebody
  waits for the exchange.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

Exchange = Generator[dist.Work | None, None, None]
"""Yields the collectives that it started, None where there was nothing to send."""


class CollectiveError(RuntimeError):
    """A collective failed, whatever its backend's error was."""


class Handle(Protocol):
    """An exchange that has been started."""

    def wait(self) -> None:
        """Return when the result may be used: by the host, or by what is launched from now on."""


class Channel:
    """Starts exchanges on one device.

    Args:
        device: Where the tensors are.
        watch: On CUDA called with an event after every exchange.
    """

    def __init__(
        self, device: torch.device, watch: Callable[[torch.cuda.Event], None] | None = None
    ) -> None:
        self._watch = watch
        # High priority: casts and sums between collectives are few blocks, and a collective waits
        # for them, so they should not queue behind a product's thousands.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def start(self, exchange: Exchange, holds: Sequence[torch.Tensor] = ()) -> Handle:
        """Start an exchange of what the current stream has written so far.

        Args:
            exchange: What to do.
            holds: Memory of the current stream that it uses; kept until the handle is waited for,
                as a device would give it to others once it is freed.
        """
        if self._stream is None:
            return _HostHandle(exchange)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for work in exchange:
                if work is not None:
                    work.wait()
            event = torch.cuda.Event()
            event.record(self._stream)
            if self._watch is not None and not torch.cuda.is_current_stream_capturing():
                self._watch(event)
            return _StreamHandle(event, self._stream.device, holds)


class _StreamHandle(Handle):
    def __init__(
        self, event: torch.cuda.Event, device: torch.device, holds: Sequence[torch.Tensor]
    ) -> None:
        self._event = event
        self._device = device
        self._holds = holds

    def wait(self) -> None:
        # Of this device: the current one may be another.
        torch.cuda.current_stream(self._device).wait_event(self._event)
        self._holds = ()


class _HostHandle(Handle):
    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        with collective_errors():
            self._work = next(exchange, None)

    def wait(self) -> None:
        with collective_errors():
            if self._work is not None:
                self._work.wait()
                self._work = None
            for work in self._exchange:
                if work is not None:
                    work.wait()


@contextlib.contextmanager
def collective_errors() -> Iterator[None]:
    """Tell a backend's errors from all others: gloo's are plain RuntimeErrors.

    Raises:
        CollectiveError: From any RuntimeError inside.
    """
    try:
        yield
    except RuntimeError as error:
        raise CollectiveError(str(error)) from error
