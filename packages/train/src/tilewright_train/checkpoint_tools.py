"""What can be done with checkpoints that lie there: compare, spread anew, hand on to others.

Tensors are mapped and looked at one by one, so a checkpoint need not fit in memory twice.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tilewright_model.checkpoint import read_config, read_weights, write_checkpoint
from tilewright_train import checkpoint
from tilewright_train.chat_template import TEMPLATE_FILE, ChatTemplate, read_template
from tilewright_train.checkpoint import new_checkpoint, step_of
from tilewright_train.checkpoint_state import (
    load_optimizer,
    load_random,
    load_reference,
    read_training,
    write_state,
)
from tilewright_train.conversations import end_of_turn
from tilewright_train.errors import InputError, writing
from tilewright_train.run_directory import RunDirectory
from tilewright_train.snapshot import Snapshot
from tilewright_train.tokenizer import TOKENIZER_FILE, end_token, load_tokenizer

_KINDS = ("model", "optimizer", "reference", "random")


def whole_checkpoint(place: Path) -> Path:
    """The checkpoint at `place`: itself, or the newest one of a run.

    Raises:
        InputError: There is none, or it is damaged.
    """
    folder = checkpoints_at(place)[-1]
    if problem := checkpoint.damage(folder):
        raise InputError(f"{problem}; restore it, or name another checkpoint")
    return folder


def checkpoints_at(place: Path) -> list[Path]:
    """The checkpoint at `place`, or those of a run, oldest first, whole or not.

    Raises:
        InputError: There is none.
    """
    if (place / checkpoint.MANIFEST).is_file() or checkpoint.is_named_like_one(place):
        if not place.is_dir():
            raise InputError(f"{place} does not exist: give the folder of a checkpoint or a run")
        return [place]
    found = checkpoint.all_checkpoints(RunDirectory(place).checkpoints)
    if not found:
        raise InputError(
            f"{place} holds no checkpoint: give the folder of one (step-000120), or of a run"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where two checkpoints differ."""

    kind: str
    """config, training, model, optimizer, reference or random."""
    name: str
    """The tensor, or the place in training.json or config.json."""
    what: str
    """How."""
    size: float = math.inf
    """Largest difference of an element; infinite where there is no such number."""


def differences(one: Path, other: Path) -> list[Difference]:
    """Everything in which two checkpoints differ, the largest difference of each kind first.

    How tensors are spread over files does not count, nor does when something was written.
    """
    found = [*_json_differences(one, other)]
    for kind in _KINDS:
        tensors = sorted(_tensor_differences(kind, one, other), key=lambda d: -d.size)
        found += tensors
    return found


def reshard(folder: Path, out: Path, max_shard_bytes: int) -> Path:
    """Write a checkpoint anew with its tensors spread over files of another size.

    Args:
        folder: A whole checkpoint.
        out: A folder of checkpoints, as that of a run, which gets one of the same name.
        max_shard_bytes: A file holds more only where a single tensor does.

    Returns:
        The new checkpoint.

    Raises:
        InputError: One of this step is in `out`.
        OSError: `out` cannot be written.
    """
    made = out / folder.name
    if made.exists():
        raise InputError(f"{made} is there already: give another folder")
    training = read_training(folder)
    config = read_config(folder)
    template = folder / TEMPLATE_FILE
    snapshot = Snapshot(
        step=training["step"],
        config=config,
        weights=read_weights(folder, config, device="cpu"),
        optimizer=load_optimizer(folder),
        optimizer_record=training["optimizer"],
        scheduler=training["scheduler"],
        random=load_random(folder),
        tokenizer=(folder / TOKENIZER_FILE).read_text(encoding="utf-8"),
        chat_template=template.read_text(encoding="utf-8") if template.exists() else None,
        facts=training["facts"],
        reference=load_reference(folder),
    )
    with new_checkpoint(out, step_of(folder)) as beside:
        write_state(beside, snapshot, max_shard_bytes=max_shard_bytes)
    return made


def export(folder: Path, out: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> None:
    """Write the model alone in Hugging Face's layout, for transformers, vLLM and others.

    Args:
        folder: A whole checkpoint.
        out: The folder to write: config.json, weights, tokenizer and chat template.
        dtype: Of the weights; None leaves it.
        max_shard_bytes: More weights than that are spread over several files.

    Raises:
        InputError: `out` holds something.
        OSError: `out` cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty: give another folder")
    config = read_config(folder)
    weights = read_weights(folder, config, device="cpu", dtype=dtype)
    with writing(out, "make room, or give another folder"):
        write_checkpoint(out, config, weights, max_shard_bytes=max_shard_bytes, origin=folder)
        _describe_tokenizer(out)


def _describe_tokenizer(out: Path) -> None:
    """Say in the files that others read which token ends a text, or a turn."""
    tokenizer = load_tokenizer(out / TOKENIZER_FILE)
    end, template = end_token(tokenizer), None
    ends = [end]
    if (out / TEMPLATE_FILE).exists():
        template = ChatTemplate(read_template(out / TEMPLATE_FILE))
        ends.insert(0, end_of_turn(tokenizer, template))
    described: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.id_to_token(ends[0]),
        "pad_token": tokenizer.id_to_token(end),
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        described["chat_template"] = template.source  # older readers look here
    values = json.loads((out / "config.json").read_text(encoding="utf-8"))
    values |= {"eos_token_id": ends[0], "pad_token_id": end}
    generation = {"eos_token_id": ends, "pad_token_id": end}
    files = {
        "tokenizer_config.json": described,
        "config.json": values,
        "generation_config.json": generation,
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _json_differences(one: Path, other: Path) -> Iterator[Difference]:
    pairs = [
        ("config", *(json.loads((f / "config.json").read_text()) for f in (one, other))),
        ("training", *(read_training(folder) for folder in (one, other))),
    ]
    for kind, first, second in pairs:
        mine, theirs = _flat(first), _flat(second)
        for name in sorted(mine.keys() | theirs.keys()):
            values = mine.get(name), theirs.get(name)
            # How long the steps took is no part of a run's state.
            if values[0] != values[1] and name != "facts.seconds":
                yield Difference(kind=kind, name=name, what=f"{values[0]!r} and {values[1]!r}")


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested objects and lists by the way to them."""
    children: dict[str, Any] = {}
    if isinstance(value, dict):
        children = {str(key): child for key, child in value.items()}
    elif isinstance(value, list):
        children = {str(index): child for index, child in enumerate(value)}
    if not children:
        return {name: value}
    leaves: dict[str, Any] = {}
    for key, child in children.items():
        leaves |= _flat(child, f"{name}.{key}" if name else key)
    return leaves


def _tensor_differences(kind: str, one: Path, other: Path) -> Iterator[Difference]:
    mine, theirs = _files_by_tensor(kind, one), _files_by_tensor(kind, other)
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs:
            yield Difference(
                kind=kind, name=name, what=f"only in {other if name in theirs else one}"
            )
            continue
        tensors = []
        for file in (mine[name], theirs[name]):
            with safe_open(file, framework="pt") as opened:
                tensors.append(opened.get_tensor(name))
        if difference := _compared(*tensors):
            what, size = difference
            yield Difference(kind=kind, name=name, what=what, size=size)


def _files_by_tensor(kind: str, folder: Path) -> dict[str, Path]:
    files = {}
    for file in sorted(folder.glob(f"{kind}*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)
    return files


def _compared(one: torch.Tensor, other: torch.Tensor) -> tuple[str, float] | None:
    """How two tensors differ, and by how much; None if their bits are equal."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        kinds = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (one, other)]
        return " and ".join(kinds), math.inf
    if torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8)):
        return None
    gap = (one.double() - other.double()).abs()
    largest = float(gap.max()) if gap.isfinite().all() else math.inf
    count = int((gap != 0).sum())  # NaN counts, as it equals nothing
    return f"{count:,} of {one.numel():,} elements, by at most {largest:.3g}", largest
