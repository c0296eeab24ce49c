"""The folder of one run: its name, its room on the disk, and where everything in it lies."""

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright_train.errors import InputError
from tilewright_train.layers import CONFIG_FILE, SUMMARY_FILE
from tilewright_train.metrics import METRICS_FILE
from tilewright_train.whole_files import write_whole

HAS_SAVED = "has_saved"
"""Of run.json: whether the run ever had a whole checkpoint."""

_MARGIN = 8_000_000  # bytes for metrics, picture and JSON


@dataclass(frozen=True)
class RunDirectory:
    """Where the parts of a run are."""

    root: Path

    @property
    def config(self) -> Path:
        """The options, without open values."""
        return self.root / CONFIG_FILE

    @property
    def facts(self) -> Path:
        """What the run is: versions, corpus, model, machine, choices."""
        return self.root / "run.json"

    @property
    def metrics(self) -> Path:
        """One line a step."""
        return self.root / METRICS_FILE

    @property
    def checkpoints(self) -> Path:
        """step-000120 and so on."""
        return self.root / "checkpoints"

    @property
    def has_saved(self) -> bool | None:
        """Whether a checkpoint has been whole, be it there or not; None if the run does not say."""
        facts = self._read_facts()
        return bool(facts[HAS_SAVED]) if HAS_SAVED in facts else None

    def note_saved(self) -> None:
        """Say for later that one is. A disk that is full by now loses the note, not the run."""
        facts = self._read_facts()
        if not facts or facts.get(HAS_SAVED):
            return
        with contextlib.suppress(OSError):
            write_whole(self.facts, json.dumps({**facts, HAS_SAVED: True}, indent=2) + "\n")

    def _read_facts(self) -> dict[str, Any]:
        try:
            facts = json.loads(self.facts.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    @property
    def summary(self) -> Path:
        """How the run ended; its presence says that it did."""
        return self.root / SUMMARY_FILE

    @property
    def picture(self) -> Path:
        """The loss curve."""
        return self.root / "report" / "loss.png"

    @property
    def answers(self) -> Path:
        """Of SFT: how many held-out tasks were answered, by steps done."""
        return self.root / "answers.json"

    @property
    def left_out(self) -> Path:
        """Batches of updates that were not made."""
        return self.root / "skipped"

    def sample(self, step: int) -> Path:
        """What the model wrote after `step`."""
        return self.root / "samples" / f"step-{step:06d}.txt"


def check_room(out: Path, needed: int) -> None:
    """Make the folder of all runs and see that `needed` bytes and a margin can be written there.

    Raises:
        InputError: It is read-only or full, or something else has its name.
    """
    probe = out / f".probe-{uuid.uuid4().hex[:8]}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as stream:
            stream.write(bytes(4096))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "is full" if full else f"cannot be written ({(error.strerror or '').lower()})"
        raise InputError(f"{out} {reason}: give another --out") from None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    free, wanted = shutil.disk_usage(out).free, needed + _MARGIN
    if free < wanted:
        raise InputError(
            f"{out} has {free / 1e6:.0f} MB free and this run needs {wanted / 1e6:.0f} MB: make"
            " room, give another --out, or a smaller --keep"
        )


def _is_begun(file: Path) -> bool:
    """Whether a file is one of those that a run has before its config.toml."""
    return file.name == RunDirectory(file.parent).facts.name or file.suffix == ".partial"


@contextlib.contextmanager
def removed_if_not_begun(run: RunDirectory) -> Iterator[None]:
    """Remove the folder of a new run where an error of the user's ends it before it has begun.

    Otherwise it would be the latest one, which --resume takes. What it holds besides its options
    stays.
    """
    try:
        yield
    except (ValueError, TypeError, OSError):
        with contextlib.suppress(OSError):
            for file in [*run.root.glob("*.partial"), run.facts, run.config]:
                file.unlink(missing_ok=True)
            if run.checkpoints.exists():
                run.checkpoints.rmdir()
            run.root.rmdir()
        raise


def create(out: Path, name: str | None, stem: str) -> RunDirectory:
    """Make the folder of a new run.

    Args:
        out: The folder of all runs.
        name: Its name; None for `stem` and the next free number.
        stem: Corpus and preset.

    Raises:
        InputError: The name is taken.
    """
    if name is not None:
        root = out / name
        # What a run was killed over before it had begun is in nobody's way.
        taken = root.exists() and (
            not root.is_dir() or any(not _is_begun(f) for f in root.iterdir())
        )
        if taken:
            raise InputError(
                f"{root} is not empty: give another --name, or go on with it by --resume {root}"
            )
        root.mkdir(exist_ok=True)
        return RunDirectory(root)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "run"
    number = 1
    while True:
        root = out / f"{stem}-{number:03d}"
        try:
            root.mkdir()
        except FileExistsError:
            number += 1
        else:
            return RunDirectory(root)
