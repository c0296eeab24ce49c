"""Sources as tokens: a vocabulary trained on them, and each one encoded and cached.

One entry of the cache holds a tokenizer, one entry each source's two splits (`samples`). A source
whose bytes, tokenizer and settings are those of an earlier run is not encoded again.
"""

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers import __version__ as tokenizers_version

from tilewright_train import cache as caching
from tilewright_train.config import DataOptions
from tilewright_train.errors import InputError, writing
from tilewright_train.record_files import SkippedLines
from tilewright_train.records import Kind, Record, text_of
from tilewright_train.samples import (
    Encoded,
    Samples,
    have_sizes,
    open_samples,
    sha256_of,
    write_samples,
)
from tilewright_train.sources import Reading, Source
from tilewright_train.tokenizer import (
    TOKENIZER_FILE,
    encode,
    load_tokenizer,
    sample,
    sample_budget,
    train_tokenizer,
)

_FORMAT = 4  # of an entry; part of its key, so an older entry is never read as a newer one
_FACTS = "facts.json"

Encoder = Callable[[Tokenizer, Iterator[tuple[bool, Record]], "Counter[str]"], Iterable[Encoded]]
"""Turns marked records into samples, and counts what it leaves out or shortens by a name."""


def encode_texts(
    tokenizer: Tokenizer, records: Iterator[tuple[bool, Record]], counts: "Counter[str]"
) -> Iterator[Encoded]:
    """The encoder of pretraining: every token of a text, and the end token behind it."""
    texts = ((mark, text) for mark, text in records if isinstance(text, str))
    for mark, tokens, is_last in encode(tokenizer, texts):
        yield Encoded(mark, tokens, None, is_last)


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How records of one kind become samples."""

    kind: Kind = "text"
    """Of the records that are read."""
    encoder: Encoder = encode_texts
    """Turns them into tokens."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """All that the encoder depends on besides tokenizer and records, as JSON."""


@dataclass(frozen=True, kw_only=True)
class TokenFacts:
    """What a run records about the tokens of a source."""

    train_tokens: int
    """Tokens to train on."""
    train_samples: int
    """Documents, conversations, or twice the pairs."""
    validation_tokens: int
    """Tokens that are kept for validation."""
    validation_samples: int
    """Likewise."""
    sha256: str
    """Of the token files."""
    skipped_lines: int
    """Lines that were no records."""
    skipped_examples: tuple[str, ...]
    """The first of them, with file, line and reason."""
    counts: dict[str, int]
    """What the encoder counted."""


@dataclass(frozen=True, kw_only=True)
class EncodedSource:
    """A source as tokens."""

    train: Samples
    """To train on."""
    validation: Samples
    """Kept for validation."""
    facts: TokenFacts
    """What identifies them."""
    folder: Path
    """The entry of the cache."""


def prepare_tokenizer(
    sources: Sequence[Source],
    options: DataOptions,
    vocab_size: int,
    cache: Path,
    kind: Kind = "text",
) -> Path:
    """The tokenizer.json of a vocabulary trained on all that `sources` say, in the cache.

    Args:
        sources: What is read; the validation side is left out.
        options: How it is read and split.
        vocab_size: Entries to train.
        cache: The cache's folder.
        kind: Of the records.

    Raises:
        InputError: A source cannot be read, or leaves a side of the split empty.
        OSError: The cache cannot be written.
    """

    def texts(source: Source) -> Iterator[str]:
        for is_validation, record in source.records(kind, _reading(options)):
            if not is_validation:
                yield text_of(record)

    def build(folder: Path) -> None:
        # All of them are gone through to sample evenly: they need not fit in memory.
        everything = (text for source in sources for text in texts(source))
        size = sum(source.size for source in sources)
        chosen = sample(everything, size, sample_budget(vocab_size))
        tokenizer = train_tokenizer(chosen, vocab_size)
        with writing(folder.parent, caching.REMEDY):
            (folder / TOKENIZER_FILE).write_text(tokenizer.to_str(), encoding="utf-8")

    def is_whole(folder: Path) -> bool:
        try:
            load_tokenizer(folder / TOKENIZER_FILE)
        except (InputError, OSError):
            return False
        return True

    depends_on = {
        "format": _FORMAT,
        "tokenizers": tokenizers_version,
        "sources": [source.sha256 for source in sources],
        "vocab_size": vocab_size,
        "kind": kind,
        "validation_fraction": options.validation_fraction,
        "on_bad_line": options.on_bad_line,
    }
    folder, _ = caching.entry(cache, "tokenizer", depends_on, build, is_whole)
    return folder / TOKENIZER_FILE


def prepare(
    source: Source,
    options: DataOptions,
    tokenizer: Tokenizer,
    cache: Path,
    encoding: Encoding | None = None,
) -> tuple[Path, bool]:
    """Make sure that the cache holds `source` in tokens.

    Args:
        source: What is read.
        options: How it is read and split.
        tokenizer: Text to tokens.
        cache: The cache's folder; made where it is missing.
        encoding: How records become samples; by default texts of which every token is predicted.

    Returns:
        The entry's folder, and whether it was there already.

    Raises:
        InputError: The source cannot be read, or leaves a side of the split empty.
        OSError: The cache cannot be written.
    """
    how = encoding or Encoding()

    def build(folder: Path) -> None:
        reading = _reading(options)
        counts: Counter[str] = Counter()
        records = source.records(how.kind, reading)
        sizes = write_samples(how.encoder(tokenizer, records, counts), folder)
        facts = TokenFacts(
            **sizes,
            sha256=sha256_of(folder),
            skipped_lines=reading.skipped.count,
            skipped_examples=tuple(reading.skipped.examples),
            counts=dict(counts),
        )
        with writing(folder.parent, caching.REMEDY):
            (folder / _FACTS).write_text(json.dumps(dataclasses.asdict(facts), indent=2))

    depends_on = {
        "format": _FORMAT,
        "tokenizers": tokenizers_version,
        "source": source.sha256,
        "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "kind": how.kind,
        "settings": dict(how.settings),
        "validation_fraction": options.validation_fraction,
        "on_bad_line": options.on_bad_line,
        "byteorder": sys.byteorder,
    }
    return caching.entry(cache, f"{how.kind}-{_FORMAT}", depends_on, build, _is_whole)


def load(folder: Path) -> EncodedSource:
    """Map the tokens of an entry that `prepare` made.

    Raises:
        InputError: A file is not what the entry's facts say.
    """
    if not _is_whole(folder):
        raise InputError(f"{folder} is damaged: remove it and start again")
    record = json.loads((folder / _FACTS).read_text())
    record["skipped_examples"] = tuple(record["skipped_examples"])
    facts = TokenFacts(**record)
    if sha256_of(folder) != facts.sha256:
        raise InputError(f"{folder} is damaged: remove it and start again")
    return EncodedSource(
        train=open_samples(folder, "train"),
        validation=open_samples(folder, "validation"),
        facts=facts,
        folder=folder,
    )


def _reading(options: DataOptions) -> Reading:
    return Reading(
        validation_fraction=options.validation_fraction,
        on_bad_line=options.on_bad_line,
        skipped=SkippedLines(),
    )


def _is_whole(folder: Path) -> bool:
    """Whether the entry has its facts and token files of the right size."""
    try:
        facts = json.loads((folder / _FACTS).read_text())
        return have_sizes(folder, facts) and isinstance(facts["sha256"], str)
    except (OSError, ValueError, KeyError, TypeError):
        return False
