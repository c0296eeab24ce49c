"""Errors that a user can mend, and how they read.

Whatever a user can get wrong is raised as an `InputError` (or a plain ValueError or OSError from
deeper down) whose text names the value and the remedy; the command line prints that text as one
line. Errors of our own making keep their traceback.
"""

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path


class InputError(ValueError):
    """Something a user gave cannot be used. The message names the value and the remedy."""


class TrainingStopped(RuntimeError):
    """A signal ended the training after a step was finished and saved.

    Attributes:
        exit_status: 128 + the number of the signal, as a shell expects it.
    """

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class RankLost(RuntimeError):
    """Another process of the run died or hangs; the message names it. torchrun starts all again."""


@contextlib.contextmanager
def writing(folder: Path, remedy: str) -> Iterator[None]:
    """Give an OSError of what is written inside a place and a remedy.

    Some have neither: array.tofile says «file too large» and no more.

    Args:
        folder: What is written into.
        remedy: What a user does about it.

    Raises:
        OSError: The same with a message for the user.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({one_line(error)}): {remedy}") from error


def suggest(name: str, known: Iterable[str]) -> str:
    """« (did you mean 'x'?)» with the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def one_line(error: BaseException) -> str:
    """The message of `error` on one line.

    An OSError of the operating system is spelled «path: reason», without its number.
    """
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename is not None else ""
        return f"{name}{error.strerror.lower()}"
    return " ".join(str(error).split()) or type(error).__name__
