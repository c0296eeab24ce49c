"""A model's files: `config.json` and safetensors, written whole or not at all, read strictly.

No pickle is ever read or written. Each file appears under its name complete: it is written beside
its place, flushed to disk and renamed over. On reading, every tensor of the model must be there
with its shape, and nothing else.
"""

import contextlib
import difflib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tilewright_model.config import ModelConfig
from tilewright_model.hugging_face import (
    TensorOnDisk,
    from_hugging_face,
    tensors_on_disk,
    to_hugging_face,
)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def write_checkpoint(
    directory: str | Path, config: ModelConfig, weights: Mapping[str, Tensor]
) -> None:
    """Write a model's configuration and weights into `directory`, created where missing.

    Args:
        directory: files of the two names there are replaced, others are left alone.
        config: of the model.
        weights: its state_dict, on any device; written in the dtype they have.

    Raises:
        OSError: the directory cannot be written; what was there before is intact.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, place in tensors_on_disk(config).items():
        rows = weights[place.parameter].narrow(0, place.start, place.shape[0])
        tensors[name] = rows.detach().contiguous().cpu()
    dtype = weights["embed_tokens.weight"].dtype
    text = json.dumps(to_hugging_face(config, dtype), indent=2, sort_keys=True) + "\n"
    with _replacing(directory / WEIGHTS_NAME) as path:
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {directory / WEIGHTS_NAME}: {error}") from error
    with _replacing(directory / CONFIG_NAME) as path:
        path.write_text(text, encoding="utf-8")


def read_config(directory: str | Path) -> ModelConfig:
    """The configuration in `directory`.

    Raises:
        FileNotFoundError: no such directory, or no `config.json` in it.
        ValueError: it is not JSON, or describes a model that is not computed here.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"no model directory {directory}: check the path")
    path = directory / CONFIG_NAME
    values = _read_json(path)
    try:
        return from_hugging_face(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_weights(
    directory: str | Path,
    config: ModelConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The state_dict of a model, read from `model.safetensors` or from its shards and their index.

    Args:
        directory: of the checkpoint.
        config: what shapes are held against.
        device: where the tensors are allocated; each is copied there straight from the file.
        dtype: of all tensors; by default each stays as it is in the file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or a tensor is missing, unexpected or of another shape.
    """
    expected = tensors_on_disk(config)
    paths = _weight_files(Path(directory))
    with contextlib.ExitStack() as stack:
        source = {}
        for path in paths:
            file = _open(path, stack)
            source |= dict.fromkeys(file.keys(), file)
        _check_names(Path(directory), expected, source)
        _check_shapes(Path(directory), expected, source)
        pieces: dict[str, list[str]] = {}
        for name, place in expected.items():
            pieces.setdefault(place.parameter, []).append(name)
        return {
            parameter: _join({name: expected[name] for name in names}, source, device, dtype)
            for parameter, names in pieces.items()
        }


def _join(
    pieces: Mapping[str, TensorOnDisk],
    source: Mapping[str, Any],
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> Tensor:
    """One parameter from the tensors on disk that are its rows."""
    tensors = {name: source[name].get_tensor(name) for name in pieces}
    if dtype is None:
        dtype = next(iter(tensors.values())).dtype
    shapes = [place.shape for place in pieces.values()]
    shape = (sum(rows for rows, *_ in shapes), *shapes[0][1:])
    parameter = torch.empty(shape, dtype=dtype, device=device)
    for name, place in pieces.items():
        parameter.narrow(0, place.start, place.shape[0]).copy_(tensors[name])
    return parameter


def _weight_files(directory: Path) -> list[Path]:
    whole, index = directory / WEIGHTS_NAME, directory / INDEX_NAME
    if whole.is_file() or not index.is_file():
        return [whole]
    shards = _read_json(index).get("weight_map", {})
    return [directory / name for name in sorted(set(shards.values()))]


def _open(path: Path, stack: contextlib.ExitStack) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the checkpoint is incomplete")
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it or save it again") from error


def _check_names(directory: Path, expected: Collection[str], found: Collection[str]) -> None:
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    problems = [f"tensor {n} is missing{_closest(n, unexpected or found)}" for n in missing]
    problems += [f"tensor {n} is unexpected{_closest(n, missing or expected)}" for n in unexpected]
    _fail(directory, problems)


def _check_shapes(
    directory: Path, expected: Mapping[str, TensorOnDisk], source: Mapping[str, Any]
) -> None:
    problems = []
    for name, place in expected.items():
        shape = tuple(source[name].get_slice(name).get_shape())
        if shape != place.shape:
            problems.append(f"tensor {name} is {shape}, {CONFIG_NAME} asks for {place.shape}")
    _fail(directory, problems)


def _fail(directory: Path, problems: list[str]) -> None:
    """Raise what was found, cut short: one wrong prefix makes hundreds of problems."""
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"weights in {directory}: {'; '.join(problems[:3])}{more}")


def _closest(name: str, candidates: Collection[str]) -> str:
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=0.0)
    return f" (closest: {matches[0]})" if matches else ""


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the checkpoint is incomplete")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}: it must be a JSON object")
    return values


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when the block ends well."""
    beside = path.with_name(path.name + ".tmp")
    try:
        # Created here, so that it has the permissions of any new file; safetensors' own would be
        # readable by the owner alone.
        beside.touch()
        mode = beside.stat().st_mode
        yield beside
        beside.chmod(mode)
        _flush(beside)
        beside.replace(path)
        _flush(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
