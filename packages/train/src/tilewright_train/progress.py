"""What a person sees: a live line on a terminal, plain lines anywhere else.

`Reporter` itself is silent, for the processes of a distributed run that are not the first.
"""

import math
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from tilewright_train.metrics import Record


class Reporter:
    """Says nothing."""

    def say(self, text: str = "") -> None:
        """A line that stays."""

    def begin(self, first: int, total: int, ways: int) -> None:
        """Training starts behind step `first` of `total`."""

    def record(self, record: Record) -> None:
        """One more step is known."""

    def end(self) -> None:
        """Training is over, for whatever reason."""


class PlainReporter(Reporter):
    """Lines of text: one for every `every` steps and for every validation loss."""

    def __init__(self, stream: TextIO, every: int) -> None:
        self.stream = stream
        self.every = every
        self._clock = _Clock()
        self._total = 0
        self._ways = 0

    def say(self, text: str = "") -> None:
        """Print it."""
        print(text, file=self.stream, flush=True)

    def begin(self, first: int, total: int, ways: int) -> None:
        """Start the clock."""
        self._total, self._ways = total, ways
        self._clock.start(first, total)
        self._first = first

    def record(self, record: Record) -> None:
        """Print a line, if it is this step's turn."""
        is_first = record.step == self._first + 1
        if record.val_loss is not None or record.step % self.every == 0 or is_first:
            left = self._clock.left(record.step)
            self.say(format_record(record, self._total, self._ways, left))


class LiveReporter(Reporter):
    """A bar that moves, and a line that stays for every validation loss."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._clock = _Clock()
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def say(self, text: str = "") -> None:
        """Print it above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, first: int, total: int, ways: int) -> None:
        """Show the bar."""
        self._total, self._ways = total, ways
        self._clock.start(first, total)
        self._progress = Progress(
            BarColumn(bar_width=16),
            TextColumn("{task.description}", markup=False),
            console=self.console,
            transient=True,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task(f"step {first}/{total}", total=total, completed=first)
        self._progress.start()

    def record(self, record: Record) -> None:
        """Move the bar; a validation loss leaves its line above it."""
        line = format_record(record, self._total, self._ways, self._clock.left(record.step))
        if record.val_loss is not None:
            self.say(line)
        if self._progress is not None:
            self._progress.update(self._task, completed=record.step, description=line)

    def end(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def make_reporter(stream: TextIO, every: int) -> Reporter:
    """Live where `stream` is a terminal, plain lines elsewhere."""
    if stream.isatty():
        return LiveReporter(Console(file=stream))
    return PlainReporter(stream, every)


def format_record(record: Record, total: int, ways: int, seconds_left: float | None) -> str:
    """One line about a step; what is not known is left out."""
    step = f"step {record.step:>{len(str(total))}}/{total}"
    if record.step == 0:
        known = f"  (ln {ways} = {math.log(ways):.4f})" if ways else ""
        return f"{step}  val loss {record.val_loss:.4f}{known}"
    rate, mfu, memory = record.tokens_per_second, record.mfu, record.peak_memory_bytes
    parts = (
        step,
        f"loss {record.loss:.4f}" if record.loss is not None else "loss not finite",
        f"val loss {record.val_loss:.4f}" if record.val_loss is not None else None,
        _accuracy(record),
        f"lr {record.lr:.2e}",
        f"grad norm {record.grad_norm:.2f}" if record.grad_norm is not None else None,
        f"{record.skipped_steps} left out" if record.skipped_steps else None,
        f"scale {record.loss_scale:g}" if record.loss_scale is not None else None,
        f"{_thousands(rate)} tokens/s" if rate is not None else None,
        f"{mfu:.1%} of peak" if mfu is not None else None,
        f"{memory / 2**30:.2f} GiB",
        f"{format_seconds(seconds_left)} left" if seconds_left is not None else None,
    )
    return "  ".join(part for part in parts if part is not None)


def _accuracy(record: Record) -> str | None:
    """Of DPO: how often the reward of the chosen side is the larger one, best on validation."""
    name = "rewards/accuracies"
    value = record.metrics.get(f"val_{name}", record.metrics.get(name))
    return None if value is None else f"accuracy {value:.0%}"


def format_seconds(seconds: float) -> str:
    """1:05, or 1:02:03."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    head = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
    return f"{head}:{whole % 60:02d}"


def _thousands(rate: float) -> str:
    return f"{rate / 1e6:.2f}M" if rate >= 1e6 else f"{rate / 1e3:.1f}k"


class _Clock:
    """Time left, from the steps of this process; its first step is slow and is left out."""

    def start(self, first: int, total: int) -> None:
        self._first, self._total = first, total
        self._since = time.perf_counter()

    def left(self, step: int) -> float | None:
        """Seconds until the last step, once two steps are known."""
        if step <= self._first + 1:
            self._since = time.perf_counter()
            return None
        elapsed = time.perf_counter() - self._since
        return elapsed / (step - self._first - 1) * (self._total - step)
