"""Checkpoints: safetensors and JSON, written whole or not at all, checked before they are read.

`checkpoints/step-000120/` holds config.json, model.safetensors and tokenizer.json (a model that
other programs can load), chat_template.jinja where it chats, optimizer.safetensors,
random.safetensors, training.json, and last of all MANIFEST.json (`manifest`) with size and SHA-256
of each and its own. The folder is written beside its place, flushed to the disk and renamed: under
its name it is complete, or damaged from outside. Large tensors are spread over several files,
model-00001-of-00003 and so on. Here is the folder; `checkpoint_state` writes and reads what is in
it.
"""

import contextlib
import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tilewright_model.staged_files import flush
from tilewright_train import manifest as manifests
from tilewright_train.errors import InputError, writing

MANIFEST = manifests.NAME
RANDOM = "random.safetensors"
TRAINING = "training.json"
_EXPECTED = {"config.json", "tokenizer.json", RANDOM, TRAINING}
_IN_PARTS = ("model", "optimizer")
_PART = re.compile(r"(.+?)(?:-(\d{5})-of-(\d{5}))?\.safetensors")
_HASHED_TOGETHER = 4
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Found:
    """Where a run goes on."""

    folder: Path | None
    """The checkpoint to read; None where the run has none yet."""
    damaged: tuple[Path, ...] = ()
    """Newer ones that were passed over."""

    @property
    def step(self) -> int:
        """Steps that are done; 0 without a checkpoint."""
        return step_of(self.folder) if self.folder else 0


def step_of(folder: Path) -> int:
    """The number in a checkpoint's name."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise InputError(f"{folder} is not named like a checkpoint (step-000120)")
    return int(match.group(1))


def is_named_like_one(folder: Path) -> bool:
    """Whether a folder's name is that of a checkpoint."""
    return _NAME.fullmatch(folder.name) is not None


def all_checkpoints(root: Path) -> list[Path]:
    """The checkpoints in `root`, oldest first, whole or not."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if _NAME.fullmatch(p.name)), key=step_of)


def find(root: Path, *, from_older: bool) -> Found:
    """The newest checkpoint in `root`.

    Args:
        root: The run's folder of checkpoints.
        from_older: Where the newest is damaged, take the newest that is whole.

    Raises:
        InputError: The newest is damaged (the message names the file) and `from_older` is not set,
            or all of them are.
    """
    damaged: list[Path] = []
    problem = ""
    for folder in reversed(all_checkpoints(root)):
        found = damage(folder)
        if found is None:
            if damaged and not from_older:
                raise InputError(
                    f"{problem}; to go on from {folder.name}, the newest whole checkpoint, add"
                    " --resume-from-older"
                )
            return Found(folder, tuple(damaged))
        problem = problem or found
        damaged.append(folder)
    if damaged:
        raise InputError(f"{problem}; no other checkpoint in {root} is whole: start a new run")
    return Found(None)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing takes it for one; it is not removed."""
    aside = folder.with_name(f"{folder.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is whole."""
    manifest = folder / MANIFEST
    try:
        files = manifests.read(manifest)
    except FileNotFoundError:
        return f"{manifest} is missing: the checkpoint is incomplete"
    except manifests.Altered as altered:
        return f"{manifest} {altered}: the checkpoint is damaged"
    except (ValueError, OSError, RecursionError):
        return f"{manifest} cannot be read: the checkpoint is damaged"
    if not _lists_a_checkpoint(files):
        return f"{manifest} does not list a checkpoint's files: the checkpoint is damaged"
    for name, facts in files.items():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing: the checkpoint is incomplete"
        size = file.stat().st_size
        if size != facts["size"]:
            return f"{file} has {size} bytes, not {facts['size']}: the checkpoint is damaged"
        if _sha256(file) != facts["sha256"]:
            return f"{file} does not match its checksum: the checkpoint is damaged"
    return None


def _lists_a_checkpoint(files: object) -> bool:
    """Whether a manifest's list names all expected files, each with its size and checksum."""
    return (
        isinstance(files, dict)
        and files.keys() >= _EXPECTED
        and all(_all_parts(name, files) for name in _IN_PARTS)
        and all(
            isinstance(facts, dict)
            and type(facts.get("size")) is int
            and isinstance(facts.get("sha256"), str)
            for facts in files.values()
        )
    )


def _all_parts(stem: str, names: Iterable[str]) -> bool:
    """Whether `stem`.safetensors is there, or every one of its parts."""
    found = [m for name in names if (m := _PART.fullmatch(name)) and m.group(1) == stem]
    return bool(found) and all(len(found) == int(match.group(3) or 1) for match in found)


@contextlib.contextmanager
def new_checkpoint(root: Path, step: int) -> Iterator[Path]:
    """A folder to write the checkpoint of `step` in, which gets its name when all of it is there.

    Args:
        root: The run's folder of checkpoints; made where it is missing.
        step: Steps that are done.

    Raises:
        OSError: It cannot be written. Other checkpoints are intact, and nothing of it is left.
    """
    folder = root / f"step-{step:06d}"
    beside = root / f".{folder.name}.partial"
    remedy = f"make room, then go on with --resume {root.parent}"
    try:
        with writing(root, remedy):
            root.mkdir(parents=True, exist_ok=True)
            for rest in root.glob(".step-*.partial"):  # of a run that was killed here
                shutil.rmtree(rest)
            beside.mkdir()
            yield beside
            seal(beside)
            _replace(folder, beside)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def prune(root: Path, *, keep: int, keep_every: int | None) -> None:
    """Remove checkpoints but the newest `keep` and those of every `keep_every`-th step."""
    for old in all_checkpoints(root)[:-keep]:
        if keep_every is None or step_of(old) % keep_every:
            # Without its name first: a kill in between must not leave half of it under that.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.partial")))


def seal(folder: Path) -> None:
    """Flush all files, write the manifest over them, flush it and the folder."""
    manifest = folder / MANIFEST
    files = sorted(file for file in folder.iterdir() if file.is_file() and file != manifest)
    with ThreadPoolExecutor(_HASHED_TOGETHER) as threads:  # SHA-256 runs outside Python's lock
        sums = list(threads.map(_sha256, files))
    listed = {
        file.name: {"size": file.stat().st_size, "sha256": sha256}
        for file, sha256 in zip(files, sums, strict=True)
    }
    manifest.write_text(manifests.text(listed))
    for path in (*files, manifest, folder):
        flush(path)


def _replace(folder: Path, beside: Path) -> None:
    """Give `beside` its name, which is free unless somebody put something there."""
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    flush(folder.parent)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
