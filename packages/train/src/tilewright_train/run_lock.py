"""One process writes in a run's folder: a lock that ends with the process that holds it.

It is the operating system's lock on a file (POSIX, of the process: workers that are forked do not
hold it), so a run that is killed leaves none behind.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from tilewright_train.errors import InputError, one_line, writing

try:
    import fcntl
except ImportError:  # Windows: the lock is left out
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "run.lock"


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold a run's folder while the block lasts.

    Args:
        root: The run's folder; it exists.

    Raises:
        InputError: Another process has it.
        OSError: The folder cannot be written.
    """
    path = root / LOCK_FILE
    with writing(root, "make it writable, or start a new run in another --out"):
        stream = path.open("a+", encoding="utf-8")
    with stream:
        if fcntl is not None:
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise InputError(
                        f"{root} cannot be locked ({one_line(error)}): give an --out on a file"
                        " system that has locks"
                    ) from error
                stream.seek(0)
                holder = stream.read().strip() or "another process"
                raise InputError(
                    f"{root} is in use by {holder}: wait for it or stop it, or start a new run with"
                    " another --name"
                ) from None
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        yield
