"""Messages: one line, and the closest name."""

import errno
import os

import pytest

from tilewright_train.errors import InputError, one_line, suggest


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


def test_suggest_names_the_closest_or_nothing() -> None:
    assert suggest("stepz", ["steps", "seed"]) == " (did you mean 'steps'?)"
    assert suggest("qqqqqq", ["steps", "seed"]) == ""
