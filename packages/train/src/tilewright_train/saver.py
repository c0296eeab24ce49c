"""Checkpoints written by a thread while the training goes on, one at a time.

The training waits for a copy of its state alone, and for the former checkpoint where that is not
yet on the disk. Writing needs little of Python: safetensors, SHA-256 and the disk work outside its
lock.
"""

import threading
from collections.abc import Callable
from pathlib import Path

from tilewright_train.checkpoint_state import save
from tilewright_train.errors import one_line
from tilewright_train.snapshot import Snapshot


class Saver:
    """Writes a run's checkpoints in the background, or at once.

    Args:
        root: The run's folder of checkpoints.
        keep: Newest checkpoints to leave.
        keep_every: Those of multiples of so many steps stay as well.
        background: Whether a thread writes.
        before: Called first; a checkpoint must not be ahead of the metrics on the disk.
        after: Called when it is there.
        go_on: Whether a checkpoint that cannot be written is said and left out, but for the last.
        say: Takes a line for a person.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        keep_every: int | None,
        background: bool,
        before: Callable[[], None],
        after: Callable[[], None],
        go_on: bool,
        say: Callable[[str], None],
    ) -> None:
        self._root = root
        self._keep = keep
        self._keep_every = keep_every
        self._background = background
        self._before = before
        self._after = after
        self._go_on = go_on
        self._say = say
        self._thread: threading.Thread | None = None
        self._step = 0
        self._failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        """Called by the thread where the run is not to go on: nobody need wait until it asks."""
        self.failed = 0
        """Checkpoints that could not be written."""

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written now."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, snapshot: Snapshot, *, prune: bool = True) -> None:
        """Write a checkpoint. Its tensors stay as they are until `wait` returns.

        Args:
            snapshot: What it holds.
            prune: Whether older ones go; not where it may be worse than they are.
        """
        assert self._thread is None, "the former checkpoint is waited for before its memory is used"
        self._step = snapshot.step
        if not self._background:
            self._write(snapshot, prune)
            return
        # A daemon: a second Ctrl-C ends the process at once, with the checkpoint unnamed.
        self._thread = threading.Thread(target=self._write, args=(snapshot, prune), daemon=True)
        self._thread.start()

    def wait(self, *, last: bool = False) -> None:
        """Return when what was started is on the disk, or is said not to be.

        Args:
            last: Of the run: nobody goes on without this one.

        Raises:
            OSError: It could not be written, and the run is not to go on without it.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is None:
            return
        self.failed += 1
        if last or not self._go_on or not isinstance(failure, OSError):
            raise failure
        self._say(
            f"not saved    step {self._step}: {one_line(failure)}; training goes on"
            " (--on-save-failure continue), older checkpoints are whole"
        )

    def finish(self) -> None:
        """Let what is being written end, where the run has failed already."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, snapshot: Snapshot, prune: bool) -> None:
        try:
            self._before()
            keep = self._keep if prune else None
            save(self._root, snapshot, keep=keep, keep_every=self._keep_every)
            self._after()
        except BaseException as error:  # raised where somebody waits
            self._failure = error
            if not self._go_on:
                self.on_failure()
