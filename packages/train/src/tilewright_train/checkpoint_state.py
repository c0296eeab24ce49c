"""A run's state in a checkpoint's files, and back into a model, its optimizer and its schedule.

Nothing depends on the number of processes: states stand under their parameter's name, whole,
whatever mode of parallelism divided them, and the place in the data is the number of rows that were
read. So a run goes on at any number of processes that divides its batch.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tilewright_model import CausalLM, ModelConfig
from tilewright_model.checkpoint import MAX_SHARD_BYTES, names_by_file, write_checkpoint
from tilewright_train import optimizer_state as optimizer_states
from tilewright_train.chat_template import TEMPLATE_FILE
from tilewright_train.checkpoint import RANDOM, TRAINING, new_checkpoint, prune
from tilewright_train.errors import InputError
from tilewright_train.replicas import load_weights
from tilewright_train.snapshot import Snapshot
from tilewright_train.tokenizer import TOKENIZER_FILE

_REFERENCE = "reference.safetensors"

# What a resumed run reads of training.json.
_NEEDED = {
    "facts": {"seconds": {}, "processes": {}},
    "optimizer": {"groups": {}, "plain": {}},
    "scheduler": {},
}


def save(
    root: Path,
    snapshot: Snapshot,
    *,
    keep: int | None,
    keep_every: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a checkpoint and remove older ones.

    Args:
        root: The run's folder of checkpoints; made where it is missing.
        snapshot: What it holds.
        keep: Newest checkpoints to leave, this one included; None leaves all.
        keep_every: Checkpoints of multiples of so many steps stay as well.
        max_shard_bytes: More tensors than that are spread over several files.

    Raises:
        OSError: It cannot be written. Older checkpoints are intact.
    """
    with new_checkpoint(root, snapshot.step) as folder:
        write_state(folder, snapshot, max_shard_bytes=max_shard_bytes)
    if keep is not None:
        prune(root, keep=keep, keep_every=keep_every)


def write_state(folder: Path, snapshot: Snapshot, *, max_shard_bytes: int) -> None:
    """Write all files of a checkpoint but its manifest."""
    snapshot.wait()
    write_checkpoint(folder, snapshot.config, snapshot.weights, max_shard_bytes=max_shard_bytes)
    (folder / TOKENIZER_FILE).write_text(snapshot.tokenizer, encoding="utf-8")
    if snapshot.chat_template is not None:
        (folder / TEMPLATE_FILE).write_text(snapshot.chat_template, encoding="utf-8")
    parts = names_by_file(snapshot.optimizer, max_shard_bytes)
    for number, names in enumerate(parts, start=1):
        part = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        tensors = {name: snapshot.optimizer[name] for name in names}
        _save_tensors(tensors, folder / f"optimizer{part}.safetensors")
    _save_tensors(snapshot.random, folder / RANDOM)
    if snapshot.reference:
        _save_tensors(snapshot.reference, folder / _REFERENCE)
    training = {
        "step": snapshot.step,
        "facts": snapshot.facts,
        "optimizer": snapshot.optimizer_record,
        "scheduler": snapshot.scheduler,
    }
    (folder / TRAINING).write_text(json.dumps(training, indent=1))


def load(
    folder: Path,
    *,
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a whole checkpoint (see `checkpoint.find`) into a model, its optimizer and its schedule.

    Returns:
        The facts and the random states of the snapshot.

    Raises:
        InputError: It belongs to another model or optimizer; the message says what differs.
    """
    saved = CausalLM.from_pretrained(folder)
    if different := _differences(saved.config, model.config):
        raise InputError(
            f"{folder} holds another model than this run's: {different}; put the run's own"
            " checkpoints there, or start a new run"
        )
    load_weights(model, saved.state_dict())
    training, random = read_training(folder), load_random(folder)
    try:
        optimizer_states.restore(optimizer, model, load_optimizer(folder), training["optimizer"])
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    scheduler.load_state_dict(training["scheduler"])
    return training["facts"], random


def load_reference(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of DPO's moving reference by parameter; empty where a run has none."""
    file = folder / _REFERENCE
    return load_file(file) if file.exists() else {}


def read_training(folder: Path) -> dict[str, Any]:
    """training.json: step, facts, the optimizer's record, the schedule.

    Raises:
        InputError: Something that a resumed run needs is not in it.
    """
    file = folder / TRAINING
    training = json.loads(file.read_text(encoding="utf-8"))
    missing = _missing(training, _NEEDED)
    if missing is not None:
        raise InputError(
            f"{file} has no {missing!r}: another version of tilewright-train wrote it; go on with"
            f" that one, or begin a new run with --init {folder}"
        )
    return training


def load_optimizer(folder: Path) -> dict[str, torch.Tensor]:
    """States by «parameter.state», from one file or several; mapped, not read."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("optimizer*.safetensors")):
        tensors |= load_file(file)
    return tensors


def load_random(folder: Path) -> dict[str, torch.Tensor]:
    """States of random generators by rank and name.

    Raises:
        InputError: Those of a process that wrote it are missing.
    """
    states = load_file(folder / RANDOM)
    processes = read_training(folder)["facts"]["processes"]
    for rank in range(processes):
        if f"rank{rank}.cpu" not in states:
            raise InputError(
                f"{folder / RANDOM} has no state rank{rank}.cpu, and {processes} processes wrote"
                f" it: the run would go on with other random numbers; begin a new run with --init"
                f" {folder}"
            )
    return states


def _missing(found: Any, needed: Mapping[str, Any], before: str = "") -> str | None:
    """The first of the `needed` keys that is not there, or has none below it; «optimizer.groups»"""
    for key, below in needed.items():
        if not isinstance(found, Mapping) or key not in found:
            return f"{before}{key}"
        if below and (missing := _missing(found[key], below, f"{before}{key}.")):
            return missing
    return None


def _differences(saved: ModelConfig, wanted: ModelConfig) -> str:
    """The fields that differ, with both values."""
    fields = [field.name for field in dataclasses.fields(saved)]
    pairs = [(name, getattr(saved, name), getattr(wanted, name)) for name in fields]
    return ", ".join(f"{name} {one}, not {other}" for name, one, other in pairs if one != other)


def _save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    try:
        save_file({name: _alone(tensor) for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # a full disk comes as this, not as an OSError
        raise OSError(f"cannot write {path}: {error}") from error


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, with memory of its own: step counts may be views of one tensor."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
