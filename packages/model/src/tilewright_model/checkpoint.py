"""A model's files: `config.json` and safetensors, written whole or not at all, read strictly.

No pickle is ever read or written. All files are written beside their places and flushed to disk
before the first is renamed over an older one. While several are, there is no configuration: who
reads then finds a checkpoint that is incomplete, never one mixed from two. On reading, every tensor
of the model must be there with its shape, and nothing else.
"""

import contextlib
import difflib
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tilewright_model.config import ModelConfig
from tilewright_model.hugging_face import (
    TOKEN_IDS,
    from_hugging_face,
    tensors_on_disk,
    to_hugging_face,
)
from tilewright_model.hugging_face_tensors import TensorOnDisk
from tilewright_model.staged_files import StagedFiles

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


MAX_SHARD_BYTES = 5_000_000_000
"""Weights beyond so many bytes are written in several files and an index."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""What lies beside a model in Hugging Face's layout and is not the model's."""


def write_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    origin: Path | None = None,
) -> None:
    """Write a model's configuration and weights into `directory`, created where missing.

    Args:
        directory: files of these names there are replaced, other shards of weights removed, and
            the rest is left alone.
        config: of the model.
        weights: its state_dict, on any device; written in the dtype they have.
        max_shard_bytes: more are split into several files and an index.
        origin: the folder that the model came from, whose tokenizer comes along.

    Raises:
        OSError: the directory cannot be written; what was there before is intact.
        ValueError: max_shard_bytes is below 1.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}: give 1 or more")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: place.of(weights[place.parameter]).detach()
        for name, place in tensors_on_disk(config).items()
    }
    shards = _shards(tensors, max_shard_bytes)
    dtype = weights["embed_tokens.weight"].dtype
    values = to_hugging_face(config, dtype, read_token_ids(origin))
    others: list[str] = []
    if origin is not None and origin.resolve() != directory.resolve():
        others = [name for name in TOKENIZER_FILES if (origin / name).is_file()]
    files = [*shards, *([INDEX_NAME] if len(shards) > 1 else [])]
    with StagedFiles(directory) as staged:
        for file, names in shards.items():
            _write_tensors(staged, file, {name: tensors[name] for name in names})
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            weight_map = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(staged, INDEX_NAME, index)
        _write_json(staged, CONFIG_NAME, values)
        for name in others:
            assert origin is not None
            with staged.file(name) as path:
                shutil.copyfile(origin / name, path)
        if not _one_rename_does(directory, files, values):
            staged.remove(CONFIG_NAME)
        staged.rename(*files)
        staged.remove(*_others(directory, files))
        staged.rename(*others, CONFIG_NAME)


def _one_rename_does(directory: Path, files: list[str], values: Mapping[str, Any]) -> bool:
    """Whether one file replaces one file under the same configuration."""
    if files != [WEIGHTS_NAME] or (directory / INDEX_NAME).exists():
        return False
    try:
        return _read_json(directory / CONFIG_NAME) == json.loads(_as_json(values))
    except (OSError, ValueError):
        return False


def names_by_file(tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Names of the tensors of each file, in their order; a larger tensor has a file of its own."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    return groups


def _shards(tensors: Mapping[str, Tensor], max_bytes: int) -> dict[str, list[str]]:
    """What each file is called, and the names of its tensors."""
    groups = names_by_file(tensors, max_bytes)
    if len(groups) == 1:
        return {WEIGHTS_NAME: groups[0]}
    count = len(groups)
    return {f"model-{i + 1:05d}-of-{count:05d}.safetensors": g for i, g in enumerate(groups)}


def _write_tensors(staged: StagedFiles, file: str, tensors: Mapping[str, Tensor]) -> None:
    on_host = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    with staged.file(file) as path:
        try:
            save_file(on_host, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {staged.directory / file}: {error}") from error


def _as_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _write_json(staged: StagedFiles, file: str, values: Mapping[str, Any]) -> None:
    with staged.file(file) as path:
        path.write_text(_as_json(values), encoding="utf-8")


def _others(directory: Path, written: Collection[str]) -> list[str]:
    """Weights of an earlier save, which a reader could take for this one's."""
    shards = [path.name for path in directory.glob("model-?????-of-?????.safetensors")]
    return [name for name in (WEIGHTS_NAME, INDEX_NAME, *shards) if name not in written]


def read_token_ids(directory: Path | None) -> dict[str, Any]:
    """Ids of special tokens in a folder's `config.json`; none where there is no such file."""
    if directory is None or not (directory / CONFIG_NAME).is_file():
        return {}
    values = _read_json(directory / CONFIG_NAME)
    return {key: values[key] for key in TOKEN_IDS if key in values}


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
        _drop_what_follows(Path(directory), config, source)
        _check_names(Path(directory), expected, source)
        _check_shapes(Path(directory), expected, source)
        pieces: dict[str, list[str]] = {}
        for name, place in expected.items():
            pieces.setdefault(place.parameter, []).append(name)
        return {
            parameter: _join({name: expected[name] for name in names}, source, device, dtype)
            for parameter, names in pieces.items()
        }


def _drop_what_follows(directory: Path, config: ModelConfig, source: dict[str, Any]) -> None:
    """Forget tensors that some files hold beside what they follow from.

    Qwen3's released files have the tied output projection as well, old ones of Llama the rotary
    frequencies.

    Raises:
        ValueError: the output projection is another matrix than the embedding.
    """
    for name in [name for name in source if name.endswith("rotary_emb.inv_freq")]:
        del source[name]
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings and head in source and embedding in source:
        tied = (source[name].get_tensor(name) for name in (head, embedding))
        if not torch.equal(*tied):
            raise ValueError(
                f"weights in {directory}: {head} is not {embedding}, and {CONFIG_NAME} ties them: "
                f"set tie_word_embeddings to false there"
            )
        del source[head]


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
    places = pieces.values()
    rows = max(place.start + place.shape[0] for place in places)
    shape = rows, *next(iter(places)).shape[1:]
    if experts := [place.expert for place in places if place.expert is not None]:
        shape = max(experts) + 1, *shape
    parameter = torch.empty(shape, dtype=dtype, device=device)
    for name, place in pieces.items():
        place.of(parameter).copy_(tensors[name])
    return parameter


def _weight_files(directory: Path) -> list[Path]:
    whole, index = directory / WEIGHTS_NAME, directory / INDEX_NAME
    if whole.is_file() or not index.is_file():
        return [whole]
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
        raise ValueError(f"{index}: weight_map must be an object from tensors to file names")
    names = sorted(set(shards.values()))
    for name in names:
        if name in ("", "..") or Path(name).name != name or "\\" in name:
            raise ValueError(f"{index}: {name!r} is not the name of a file beside it")
    return [directory / name for name in names]


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
