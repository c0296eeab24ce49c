"""A cache on the disk: folders that are found again by what they depend on, and never half there.

An entry is written beside its place and renamed into it, so a killed run leaves none that is half
written. Its name is a hash of everything it depends on: when any of that changes it is made anew,
and only then.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tilewright_train.errors import writing

REMEDY = "make room, or give another --cache-dir"
"""What to do when the cache cannot be written."""


def default_cache() -> Path:
    """$XDG_CACHE_HOME/tilewright, else ~/.cache/tilewright."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tilewright"


def writable_cache(folder: Path, fallback: Path) -> Path:
    """`folder` if files can be made there, else `fallback`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return fallback


def entry(
    cache: Path,
    kind: str,
    depends_on: Mapping[str, Any],
    build: Callable[[Path], None],
    is_whole: Callable[[Path], bool],
) -> tuple[Path, bool]:
    """Make sure that the cache holds an entry.

    Args:
        cache: The cache's folder; made where it is missing.
        kind: What the entry holds; its name begins so.
        depends_on: Everything that decides on its content, as JSON.
        build: Writes the content into an empty folder.
        is_whole: Whether a folder is an entry that nothing has damaged.

    Returns:
        The entry's folder, and whether it was there already.

    Raises:
        OSError: The cache cannot be written.
    """
    key = hashlib.sha256(json.dumps(dict(depends_on), sort_keys=True).encode()).hexdigest()[:20]
    folder = cache / f"{kind}-{key}"
    if is_whole(folder):
        return folder, True
    with writing(cache, REMEDY):
        cache.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    try:
        build(beside)
        # An entry that is not whole was damaged from outside. Another process may be as far as
        # this one is; its entry is as good.
        if folder.exists() and not is_whole(folder):
            shutil.rmtree(folder)
        with contextlib.suppress(OSError):
            beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if not is_whole(folder):
        raise OSError(f"{folder} cannot be written: give another --cache-dir")
    return folder, False
