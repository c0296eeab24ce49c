"""All sources of a run as tokens: one vocabulary, one encoding each."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tilewright_train import tokens
from tilewright_train.config import DataOptions
from tilewright_train.sources import Source
from tilewright_train.tokenizer import load_tokenizer, vocabulary_rows


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Encoded sources and the tokenizer that they share."""

    tokenizer: Tokenizer
    """Text to tokens and back."""
    tokenizer_file: Path
    """The tokenizer.json that it was read from."""
    sources: tuple[tokens.EncodedSource, ...]
    """In the order in which they were asked for."""
    were_there: tuple[bool, ...]
    """Of each source, whether an earlier run had encoded it."""

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary; fewer than asked for where the texts are few."""
        return vocabulary_rows(self.tokenizer)

    @property
    def sha256(self) -> str:
        """Of the tokenizer and all tokens."""
        parts = [self.tokenizer.to_str(), *(source.facts.sha256 for source in self.sources)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def prepare_corpus(
    sources: Sequence[Source],
    options: DataOptions,
    vocab_size: int,
    cache: Path,
    *,
    tokenizer_file: Path | None = None,
    encoding: tokens.Encoding | None = None,
) -> Corpus:
    """Have the cache hold the tokenizer and every source in its tokens, and map them.

    Args:
        sources: What is read.
        options: How it is read and split.
        vocab_size: Entries to train, where no tokenizer is given.
        cache: The cache's folder.
        tokenizer_file: A tokenizer.json to use instead of training one.
        encoding: How records become samples; by default texts of which every token is predicted.

    Raises:
        InputError: A source cannot be read, or leaves a side of the split empty.
        OSError: The cache cannot be written.
    """
    file = tokenizer_file or tokens.prepare_tokenizer(sources, options, vocab_size, cache)
    tokenizer = load_tokenizer(file)
    made = [tokens.prepare(source, options, tokenizer, cache, encoding) for source in sources]
    return _load(file, [folder for folder, _ in made], tuple(was_there for _, was_there in made))


def load_corpus(tokenizer_file: Path, entries: Sequence[Path]) -> Corpus:
    """Map what `prepare_corpus` of another process has prepared.

    Raises:
        InputError: A file is damaged.
    """
    return _load(tokenizer_file, entries, (True,) * len(entries))


def corpus_facts(corpus: Corpus) -> dict[str, Any]:
    """What run.json says of the tokens."""
    facts = [source.facts for source in corpus.sources]
    return {
        "vocab_size": corpus.vocab_size,
        "train_tokens": sum(fact.train_tokens for fact in facts),
        "validation_tokens": sum(fact.validation_tokens for fact in facts),
        "sha256": corpus.sha256,
        "sources": [dataclasses.asdict(fact) for fact in facts],
    }


def _load(file: Path, entries: Sequence[Path], were_there: tuple[bool, ...]) -> Corpus:
    return Corpus(
        tokenizer=load_tokenizer(file),
        tokenizer_file=file,
        sources=tuple(tokens.load(entry) for entry in entries),
        were_there=were_there,
    )
