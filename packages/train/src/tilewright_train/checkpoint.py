"""Checkpoints: safetensors and JSON, written whole or not at all, checked before they are read.

`checkpoints/step-000120/` holds config.json, model.safetensors and tokenizer.json (a model that
other programs can load), chat_template.jinja where it chats, optimizer.safetensors,
random.safetensors, training.json, and last of all MANIFEST.json with size and SHA-256 of each. The
folder is written beside its place, flushed to the disk and renamed: under its name it is complete,
or damaged from outside.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tilewright_model import CausalLM
from tilewright_train import optimizer_state as optimizer_states
from tilewright_train.chat_template import TEMPLATE_FILE
from tilewright_train.errors import InputError, writing

MANIFEST = "MANIFEST.json"
_OPTIMIZER = "optimizer.safetensors"
_RANDOM = "random.safetensors"
_TRAINING = "training.json"
_TOKENIZER = "tokenizer.json"
_EXPECTED = {
    *("config.json", "model.safetensors"),  # what CausalLM.save_pretrained writes
    *(_TOKENIZER, _OPTIMIZER, _RANDOM, _TRAINING),
}
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
        files = json.loads(manifest.read_text())["files"]
    except FileNotFoundError:
        return f"{manifest} is missing: the checkpoint is incomplete"
    except (ValueError, KeyError, TypeError, OSError):
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
        and all(
            isinstance(facts, dict)
            and type(facts.get("size")) is int
            and isinstance(facts.get("sha256"), str)
            for facts in files.values()
        )
    )


def save(
    root: Path,
    step: int,
    *,
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    optimizer_state: Mapping[str, Any] | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    random_states: Mapping[str, torch.Tensor],
    tokenizer: str,
    chat_template: str | None = None,
    facts: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `step` and remove the oldest beyond `keep`.

    Args:
        root: The run's folder of checkpoints; made where it is missing.
        step: Steps that are done.
        model: Without wrappers.
        optimizer: Of the model's parameters.
        optimizer_state: Its whole state_dict, where it holds a part; None asks it.
        scheduler: Of the optimizer.
        random_states: From `random_states()` of every process.
        tokenizer: Text of tokenizer.json.
        chat_template: Text of chat_template.jinja, where the model chats.
        facts: JSON; comes back from `load`.
        keep: Checkpoints to leave, this one included.

    Returns:
        Its folder.

    Raises:
        OSError: It cannot be written. Older checkpoints are intact.
    """
    folder = root / f"step-{step:06d}"
    beside = root / f".{folder.name}.partial"
    remedy = f"make room, then go on with --resume {root.parent}"
    try:
        with writing(root, remedy):
            root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed here
            beside.mkdir()
            model.save_pretrained(beside)
            (beside / _TOKENIZER).write_text(tokenizer, encoding="utf-8")
            if chat_template is not None:
                (beside / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
            tensors, record = optimizer_states.flatten(optimizer, model, optimizer_state)
            _save_tensors(tensors, beside / _OPTIMIZER)
            _save_tensors(dict(random_states), beside / _RANDOM)
            training = {
                "step": step,
                "facts": facts,
                "optimizer": record,
                "scheduler": scheduler.state_dict(),
            }
            (beside / _TRAINING).write_text(json.dumps(training, indent=1))
            _seal(beside)
            _replace(folder, beside)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    for old in all_checkpoints(root)[:-keep]:
        shutil.rmtree(old)
    return folder


def load(
    folder: Path,
    *,
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a whole checkpoint (see `find`) into a model, its optimizer and its schedule.

    Returns:
        The facts and the random states that were given to `save`.

    Raises:
        ValueError: It belongs to another model.
    """
    saved = CausalLM.from_pretrained(folder)
    if saved.config != model.config:
        raise InputError(f"{folder} holds another model than this run's: start a new run")
    model.load_state_dict(saved.state_dict())
    training = json.loads((folder / _TRAINING).read_text())
    optimizer_states.restore(
        optimizer, model, load_file(folder / _OPTIMIZER), training["optimizer"]
    )
    scheduler.load_state_dict(training["scheduler"])
    return training["facts"], load_file(folder / _RANDOM)


def random_states(rank: int, device: torch.device) -> dict[str, torch.Tensor]:
    """States of this process's random generators, by names that hold its rank."""
    states = {f"rank{rank}.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"rank{rank}.cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, torch.Tensor], rank: int, device: torch.device) -> None:
    """Go on with the generators of `random_states`; a rank that was not there keeps its own."""
    if (state := states.get(f"rank{rank}.cpu")) is not None:
        torch.set_rng_state(state)
    if device.type == "cuda" and (state := states.get(f"rank{rank}.cuda")) is not None:
        torch.cuda.set_rng_state(state, device)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # a full disk comes as this, not as an OSError
        raise OSError(f"cannot write {path}: {error}") from error


def _seal(folder: Path) -> None:
    """Flush all files, write the manifest over them, flush it and the folder."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    listed = {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": listed}, indent=1))
    for path in (*files, manifest, folder):
        flush(path)


def _replace(folder: Path, beside: Path) -> None:
    """Give `beside` its name, which is free unless somebody put something there."""
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    flush(folder.parent)


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
