"""A corpus as tokens: a trained vocabulary and two encoded splits, cached by what they depend on.

An entry of the cache is a folder that is written beside its place and renamed into it, so a killed
run leaves none that is half written. Token files are raw int32 and are mapped, not read: a corpus
need not fit in memory.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from tokenizers import Tokenizer
from tokenizers import __version__ as tokenizers_version

from tilewright_train.config import DataOptions
from tilewright_train.corpus import Corpus, split
from tilewright_train.documents import SkippedLines
from tilewright_train.errors import InputError, writing
from tilewright_train.tokenizer import (
    TOKENIZER_FILE,
    encode,
    load_tokenizer,
    sample,
    sample_budget,
    train_tokenizer,
)

_REMEDY = "make room, or give another --cache-dir"
_FORMAT = 1  # of an entry; part of its key, so an older entry is never read as a newer one
_FACTS = "facts.json"
_FILES = {"train": "train.int32", "validation": "validation.int32"}


@dataclass(frozen=True, kw_only=True)
class TokenFacts:
    """What a run records about its tokens, and compares when it is resumed."""

    vocab_size: int
    """Entries of the vocabulary; fewer than asked for where the corpus is small."""
    train_tokens: int
    """Tokens to train on."""
    validation_tokens: int
    """Tokens that are kept for validation."""
    sha256: str
    """Of the tokenizer and both token files."""
    skipped_lines: int
    """Lines of jsonl that were no documents."""
    skipped_examples: tuple[str, ...]
    """The first of them, with file, line and reason."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """An encoded corpus."""

    tokenizer: Tokenizer
    """Text to tokens and back."""
    train: torch.Tensor
    """[N] int32: documents one behind the other, an end token behind each."""
    validation: torch.Tensor
    """[M] int32, likewise."""
    facts: TokenFacts
    """What identifies them."""
    folder: Path
    """The entry of the cache."""


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


def prepare(
    corpus: Corpus, options: DataOptions, vocab_size: int, cache: Path
) -> tuple[Path, bool]:
    """Make sure that the cache holds `corpus` in tokens.

    Args:
        corpus: The files.
        options: How they are read and split.
        vocab_size: Entries to train.
        cache: The cache's folder; made where it is missing.

    Returns:
        The entry's folder, and whether it was there already.

    Raises:
        InputError: The corpus cannot be read, or leaves a side of the split empty.
        OSError: The cache cannot be written.
    """
    depends_on = {
        "format": _FORMAT,
        "tokenizers": tokenizers_version,
        "corpus": corpus.sha256,
        "vocab_size": vocab_size,
        "validation_fraction": options.validation_fraction,
        "on_bad_line": options.on_bad_line,
        "byteorder": sys.byteorder,
    }
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:20]
    folder = cache / f"{_FORMAT}-{key}"
    if _is_whole(folder):
        return folder, True
    with writing(cache, _REMEDY):
        cache.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    try:
        _build(corpus, options, vocab_size, beside)
        # An entry that is not whole was damaged from outside. Another process may be as far as
        # this one is; its entry is as good.
        if folder.exists() and not _is_whole(folder):
            shutil.rmtree(folder)
        with contextlib.suppress(OSError):
            beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if not _is_whole(folder):
        raise OSError(f"{folder} cannot be written: give another --cache-dir")
    return folder, False


def load(folder: Path) -> Tokens:
    """Map the tokens of an entry that `prepare` made.

    Raises:
        InputError: A file is not what the entry's facts say.
    """
    record = json.loads((folder / _FACTS).read_text())
    record["skipped_examples"] = tuple(record["skipped_examples"])
    facts = TokenFacts(**record)
    sizes = {"train": facts.train_tokens, "validation": facts.validation_tokens}
    if not _is_whole(folder) or _sha256(folder) != facts.sha256:
        raise InputError(f"{folder} is damaged: remove it and start again")
    splits = {
        name: torch.from_file(str(folder / file), size=sizes[name], dtype=torch.int32)
        for name, file in _FILES.items()
    }
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    return Tokens(tokenizer=tokenizer, facts=facts, folder=folder, **splits)


def _build(corpus: Corpus, options: DataOptions, vocab_size: int, folder: Path) -> None:
    """Train the vocabulary, encode both splits and write the entry into `folder`."""
    # The corpus is read twice, to sample and to encode: it need not fit in memory.
    skipped = SkippedLines()

    def marked(counter: SkippedLines) -> Iterator[tuple[bool, str]]:
        documents = corpus.documents(options.on_bad_line, counter)
        return split(documents, options.validation_fraction)

    training = (text for is_validation, text in marked(SkippedLines()) if not is_validation)
    texts = sample(training, corpus.size, sample_budget(vocab_size))
    tokenizer = train_tokenizer(texts, vocab_size)
    with writing(folder.parent, _REMEDY):
        (folder / TOKENIZER_FILE).write_text(tokenizer.to_str(), encoding="utf-8")
    counts = _write_splits(encode(tokenizer, marked(skipped)), folder)
    facts = TokenFacts(
        vocab_size=tokenizer.get_vocab_size(),
        train_tokens=counts["train"],
        validation_tokens=counts["validation"],
        sha256=_sha256(folder),
        skipped_lines=skipped.count,
        skipped_examples=tuple(skipped.examples),
    )
    with writing(folder.parent, _REMEDY):
        (folder / _FACTS).write_text(json.dumps(dataclasses.asdict(facts), indent=2))


def _write_splits(encoded: Iterable[tuple[bool, list[int]]], folder: Path) -> dict[str, int]:
    """Write the token files into `folder`; returns how many tokens each holds.

    An OSError of `encoded`, which reads the corpus, passes as it is: only writes are the cache's.
    """
    counts = dict.fromkeys(_FILES, 0)
    streams: dict[str, BinaryIO] = {}
    try:
        for name, file in _FILES.items():
            with writing(folder.parent, _REMEDY):
                streams[name] = (folder / file).open("wb")
        for is_validation, tokens in encoded:
            name = "validation" if is_validation else "train"
            with writing(folder.parent, _REMEDY):
                array("i", tokens).tofile(streams[name])
            counts[name] += len(tokens)
        with writing(folder.parent, _REMEDY):
            for stream in streams.values():
                stream.close()
    finally:
        for stream in streams.values():
            with contextlib.suppress(OSError):  # the write that failed above fails here again
                stream.close()
    return counts


def _is_whole(folder: Path) -> bool:
    """Whether the entry has its facts and token files of the right size."""
    try:
        facts = json.loads((folder / _FACTS).read_text())
        sizes = {name: (folder / file).stat().st_size for name, file in _FILES.items()}
        return (folder / TOKENIZER_FILE).is_file() and all(
            size == 4 * facts[f"{name}_tokens"] for name, size in sizes.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(folder: Path) -> str:
    """Of the tokenizer and both token files."""
    digest = hashlib.sha256()
    for name in (TOKENIZER_FILE, *_FILES.values()):
        with (folder / name).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
