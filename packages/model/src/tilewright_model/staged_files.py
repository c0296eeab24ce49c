"""Several files of a folder that appear together, after the last of them is on the disk."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


class StagedFiles:
    """Files written beside their places, which they take once all are there.

    Leaving the `with` block removes what has not taken its place. A disk that is full, or a process
    that ends, while files are written leaves the older ones as they were.

    Args:
        directory: where they go; it exists.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._names: list[str] = []

    def __enter__(self) -> "StagedFiles":
        return self

    def __exit__(self, *error: object) -> None:
        for name in self._names:
            self._beside(name).unlink(missing_ok=True)

    def _beside(self, name: str) -> Path:
        return self.directory / (name + ".tmp")

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """A path to write what will be `name`; flushed to disk when the block ends well."""
        beside = self._beside(name)
        self._names.append(name)
        # Created here, so that it has the permissions of any new file; safetensors' own would be
        # readable by the owner alone.
        beside.touch()
        mode = beside.stat().st_mode
        yield beside
        beside.chmod(mode)
        flush(beside)

    def rename(self, *names: str) -> None:
        """Have files take their places, in this order."""
        for name in names:
            self._beside(name).replace(self.directory / name)
        flush(self.directory)

    def remove(self, *names: str) -> None:
        """Remove older files, where they are, before anything that follows."""
        for name in names:
            (self.directory / name).unlink(missing_ok=True)
        flush(self.directory)


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
