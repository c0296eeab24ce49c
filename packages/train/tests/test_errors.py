"""Messages: one line, and the closest name."""

import errno
import os
from pathlib import Path

import pytest

from tilewright_train.errors import InputError, one_line, suggest, writing


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("two\n   lines"), "two lines"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "runs/a"), "runs/a: permission denied"),
        (OSError("cannot write runs/a"), "cannot write runs/a"),
        (ValueError(), "ValueError"),
    ],
)  # fmt: skip
def test_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line


def test_what_cannot_be_written_has_a_place_and_a_remedy() -> None:
    error = OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    with pytest.raises(OSError, match="cannot be written") as caught, writing(Path("a"), "run"):
        raise error
    assert one_line(caught.value) == "a cannot be written (file too large): run"
    assert caught.value.__cause__ is error


def test_suggest_names_the_closest_or_nothing() -> None:
    assert suggest("stepz", ["steps", "seed"]) == " (did you mean 'steps'?)"
    assert suggest("qqqqqq", ["steps", "seed"]) == ""
