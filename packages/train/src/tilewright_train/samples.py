"""Samples as tokens on the disk: the memory-mapped shards that training reads.

A shard is one split of one source: `tokens` holds its samples one behind the other, `ends` where
each of them ends, and `targets`, where there is one, which tokens are to be predicted. The files
are raw and are mapped, not read: a shard need not fit in memory.
"""

import contextlib
import hashlib
import mmap
import warnings
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from tilewright_train.cache import REMEDY
from tilewright_train.errors import writing

SPLITS = ("train", "validation")

_COUNTED = 1 << 16  # targets that are in memory at once while they are counted

# File ending: type of the elements, their code in `array`.
_FORMATS = {
    "tokens.int32": (torch.int32, "i"),
    "ends.int64": (torch.int64, "q"),
    "targets.uint8": (torch.uint8, "B"),
}


class Encoded(NamedTuple):
    """A sample, or a part of a long one, as tokens."""

    validation: bool
    """Which split it belongs to."""
    tokens: Sequence[int]
    """Below 2³¹."""
    targets: Sequence[int] | None = None
    """1 for a token that is to be predicted, 0 for one that is only read; None for all 1."""
    is_last: bool = True
    """Whether the sample ends here; if not, the next part of the same split goes on."""


@dataclass(frozen=True, eq=False)
class Samples:
    """One split of one source."""

    tokens: torch.Tensor
    """[N] int32: samples one behind the other."""
    ends: torch.Tensor
    """[S] int64: sample s is tokens[ends[s - 1] : ends[s]]."""
    targets: torch.Tensor | None = None
    """[N] uint8: 1 where a token is to be predicted; None where all are."""
    place: tuple[Path, str] | None = None
    """Folder and split of the files, from which another process maps them anew."""

    def __reduce__(self) -> tuple[Any, ...]:
        if self.place is None:
            return Samples, (self.tokens, self.ends, self.targets)
        return open_samples, self.place

    @property
    def lengths(self) -> torch.Tensor:
        """[S] int64: tokens of each sample."""
        return torch.diff(self.ends, prepend=self.ends.new_zeros(1))


def open_samples(folder: Path, split: str) -> Samples:
    """Map a split that `write_samples` wrote."""
    parts = {}
    for ending, (dtype, _) in _FORMATS.items():
        path = folder / f"{split}.{ending}"
        if path.exists():
            parts[ending.split(".")[0]] = _map(path, dtype)
    return Samples(**parts, place=(folder, split))


def targets_before(targets: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """How many tokens before each place are to be predicted, without a sum over the whole split.

    Args:
        targets: [N] uint8.
        places: [P] int64, ascending, from 0 to N.

    Returns:
        [P] int64.
    """
    counts = torch.zeros_like(places)
    before = 0
    for first in range(0, targets.numel(), _COUNTED):
        sums = targets[first : first + _COUNTED].cumsum(0, dtype=torch.int64)
        bounds = torch.tensor([first, first + sums.numel()])
        here = slice(*torch.searchsorted(places, bounds, right=True).tolist())
        counts[here] = before + sums[places[here] - first - 1]
        before += int(sums[-1])
    return counts


def _map(path: Path, dtype: torch.dtype) -> torch.Tensor:
    """A file's content, read as it is used and dropped again when memory is short; not writable.

    torch.from_file maps privately and writably, for which the system reserves as much memory.
    """
    if not path.stat().st_size:
        return torch.empty(0, dtype=dtype)
    with path.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(mapped, dtype=dtype)


def write_samples(encoded: Iterable[Encoded], folder: Path) -> dict[str, int]:
    """Write both splits into `folder`; at most one part is in memory at a time.

    An OSError of `encoded`, which reads the source, passes as it is: only writes are the cache's.

    Returns:
        «train_tokens», «train_samples» and the same of validation.

    Raises:
        OSError: The folder cannot be written.
    """
    counts = dict.fromkeys((f"{s}_{what}" for s in SPLITS for what in ("tokens", "samples")), 0)
    streams: dict[str, BinaryIO] = {}

    def append(split: str, ending: str, values: Sequence[int]) -> None:
        name = f"{split}.{ending}"
        with writing(folder.parent, REMEDY):
            if name not in streams:
                streams[name] = (folder / name).open("wb")
            array(_FORMATS[ending][1], values).tofile(streams[name])

    try:
        for split in SPLITS:
            append(split, "tokens.int32", ())
            append(split, "ends.int64", ())
        for part in encoded:
            split = SPLITS[part.validation]
            append(split, "tokens.int32", part.tokens)
            if part.targets is not None:
                append(split, "targets.uint8", part.targets)
            counts[f"{split}_tokens"] += len(part.tokens)
            if part.is_last:
                append(split, "ends.int64", (counts[f"{split}_tokens"],))
                counts[f"{split}_samples"] += 1
        with writing(folder.parent, REMEDY):
            for stream in streams.values():
                stream.close()
    finally:
        for stream in streams.values():
            with contextlib.suppress(OSError):  # the write that failed above fails here again
                stream.close()
    return counts


def have_sizes(folder: Path, counts: dict[str, Any]) -> bool:
    """Whether the files of `folder` are as long as `counts` of `write_samples` say.

    Raises:
        OSError: One of them is not there.
        KeyError: `counts` are no such counts.
    """
    for split in SPLITS:
        tokens, samples = counts[f"{split}_tokens"], counts[f"{split}_samples"]
        wanted = {"tokens.int32": 4 * tokens, "ends.int64": 8 * samples}
        if (folder / f"{split}.targets.uint8").exists():
            wanted["targets.uint8"] = tokens
        if any((folder / f"{split}.{e}").stat().st_size != size for e, size in wanted.items()):
            return False
    return True


def sha256_of(folder: Path) -> str:
    """Of the names and bytes of all files of both splits."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for ending in _FORMATS:
            path = folder / f"{split}.{ending}"
            if path.exists():
                with path.open("rb") as stream:
                    digest.update(f"{path.name}\0".encode())
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
