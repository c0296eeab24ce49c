"""Ctrl-C and SIGTERM as a request: the step is finished and saved before the process ends.

A second signal acts at once. What arrives within a second counts as one: torchrun passes on to its
processes what the terminal has sent them already. Outside of the loop there is no step to finish:
there SIGTERM ends a command as Ctrl-C does, by an exception, so that it can say so.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ONE_SIGNAL = 1.0  # seconds


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """While the block lasts SIGTERM raises `Terminated`, if it would end the process otherwise."""
    listens = threading.current_thread() is threading.main_thread()
    if not listens or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class StopRequest:
    """While the block lasts, the first signal asks to stop; a second one acts at once.

    Attributes:
        signal: The signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._asked = False
        self._former: dict[signal.Signals, object] = {}
        self._since = 0.0

    @property
    def requested(self) -> bool:
        """Whether a signal came, or the run itself asked to stop."""
        return self._asked or self.signal is not None

    def ask(self) -> None:
        """Ask to stop, as a signal does; from any thread."""
        self._asked = True

    def __enter__(self) -> "StopRequest":
        # Python delivers signals to the main thread alone; elsewhere there is nothing to listen to.
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.getsignal(number) for number in _SIGNALS}
            for number in _SIGNALS:
                signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            self._since = time.monotonic()
        elif time.monotonic() - self._since > _ONE_SIGNAL:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
