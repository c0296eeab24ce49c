"""Lines for people: plain where piped, live on a terminal, nothing where silent."""

import io

import pytest
from rich.console import Console

from tilewright_train.metrics import Record
from tilewright_train.progress import (
    LiveReporter,
    PlainReporter,
    format_record,
    format_seconds,
    make_reporter,
)

STEP = Record(
    step=30, loss=4.5, lr=1e-3, grad_norm=0.25, tokens=9, tokens_per_second=12_345.0, mfu=0.412,
    peak_memory_bytes=3 * 2**30, time=1.0,
)  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_says_all_that_is_known() -> None:
    assert format_record(STEP, 100, 4096, 65.0) == (
        "step  30/100  loss 4.5000  lr 1.00e-03  grad norm 0.25  12.3k tokens/s  41.2% of peak"
        "  3.00 GiB  1:05 left"
    )


def test_what_is_not_known_is_left_out() -> None:
    record = Record(step=1, loss=1.0, val_loss=2.0, lr=1.0, grad_norm=1.0, peak_memory_bytes=2**30)
    line = "step 1/5  loss 1.0000  val loss 2.0000  lr 1.00e+00  grad norm 1.00  1.00 GiB"
    assert format_record(record, 5, 4096, None) == line


def test_the_model_before_training_is_compared_with_chance() -> None:
    line = format_record(Record(step=0, val_loss=8.3), 10, 4096, None)
    assert line == "step  0/10  val loss 8.3000  (ln 4096 = 8.3178)"


def test_seconds() -> None:
    assert [format_seconds(s) for s in (0.4, 65, 3725)] == ["0:00", "1:05", "1:02:05"]


def lines_of(reporter: PlainReporter, stream: io.StringIO, steps: int) -> list[str]:
    reporter.begin(0, steps, 300)
    for step in range(steps + 1):
        val_loss = 2.0 if step in (0, steps) else None
        reporter.record(Record(step=step, loss=1.0, val_loss=val_loss, lr=1.0, grad_norm=1.0))
    reporter.end()
    return stream.getvalue().splitlines()


def test_piped_lines_are_plain_text_at_the_asked_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # which makes rich colour its output even in a pipe
    stream = io.StringIO()
    reporter = make_reporter(stream, every=5)
    assert isinstance(reporter, PlainReporter)
    lines = lines_of(reporter, stream, 12)
    assert [line.split("/")[0] for line in lines] == [f"step {s:>2}" for s in (0, 1, 5, 10, 12)]
    assert "\x1b" not in stream.getvalue()
    assert "left" in lines[2]


def test_a_terminal_gets_a_bar_and_keeps_the_validation_losses() -> None:
    stream = Terminal()
    assert isinstance(make_reporter(stream, every=5), LiveReporter)
    reporter = LiveReporter(Console(file=stream, force_terminal=True, width=120))
    reporter.say("[brackets] stay")
    reporter.begin(0, 3, 300)
    for step in range(4):
        reporter.record(
            Record(step=step, loss=1.0, lr=1.0, grad_norm=1.0, val_loss=2.0 if step == 2 else 9.0)
            if step
            else Record(step=0, val_loss=5.5)
        )
    reporter.end()
    text = stream.getvalue()
    assert "[brackets] stay" in text
    assert "val loss 5.5000  (ln 300" in text
    assert "\x1b[" in text
