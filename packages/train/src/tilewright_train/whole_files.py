"""Small files that are there whole or as they were before, whenever the process is killed."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place, flush it to the disk and give it its name.

    Raises:
        OSError: It cannot be written. What was there before is intact.
    """
    beside = path.with_name(f"{path.name}.partial")
    with beside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)
