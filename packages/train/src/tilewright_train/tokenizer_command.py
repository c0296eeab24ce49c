"""The command `train-tokenizer`: a byte-level BPE of any data, in the form that Hugging Face reads.

It writes tokenizer.json, tokenizer_config.json and chat_template.jinja into a folder, which
`train-pretrain --tokenizer` and transformers' AutoTokenizer read, and says how many bytes a token
stands for, in the texts that it was trained on and in others.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tilewright_train.config import STDLIB, DataOptions
from tilewright_train.errors import InputError, writing
from tilewright_train.flags import parse_flags
from tilewright_train.trained import exit_status

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tilewright_train.chat_template import ChatTemplate
    from tilewright_train.sources import Reading, Source

_DESCRIPTION = """Train a vocabulary. With no argument: 4,096 entries on the Python standard
library."""

_MEASURED = 16_000_000  # characters of either side, from the first on
_SHOWN = 8  # of the longest tokens


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """What the vocabulary is trained on, and where it goes."""

    data: tuple[str, ...] = (STDLIB,)
    """Sources as train-pretrain takes them; conversations and pairs as well, all that they say."""
    vocab_size: int = 4096
    """Entries, the special tokens among them; fewer come out where the texts are few."""
    out: Path = Path("tokenizer")
    """The folder to write."""
    chat_template: Path | None = None
    """A Jinja file that turns conversations into text. Default: ChatML."""
    validation_fraction: float = 0.05
    """Share of the records that it is not trained on but measured with, 0 to 0.5."""
    on_bad_line: Literal["error", "skip"] = "error"
    """A line that is no record: stop there, or skip and count it."""

    def __post_init__(self) -> None:
        # The same checks as of a run's data.
        DataOptions(
            data=self.data,
            validation_fraction=self.validation_fraction,
            on_bad_line=self.on_bad_line,
        )
        if self.vocab_size < 259:
            raise InputError(
                f"vocab_size {self.vocab_size} is out of range: it must be at least 259, 256 bytes"
                " and three special tokens"
            )


@dataclass(frozen=True, kw_only=True)
class Density:
    """How much text a token stands for."""

    bytes: int
    tokens: int

    @property
    def bytes_per_token(self) -> float:
        """1 for a vocabulary of bytes alone."""
        return self.bytes / max(1, self.tokens)


def tokenizer() -> None:
    """Entry point."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Train and save; the exit status."""

    def action() -> None:
        options = parse_flags(
            TokenizerOptions(),
            arguments,
            prog="train-tokenizer",
            description=_DESCRIPTION,
            names=[field.name for field in dataclasses.fields(TokenizerOptions)],
        )
        make(options, print)

    return exit_status(action)


def make(options: TokenizerOptions, say: Callable[[str], None]) -> "dict[str, Density]":
    """Train a vocabulary, save it, and measure it.

    Args:
        options: On what, and where to.
        say: Takes lines for people.

    Returns:
        Bytes and tokens of «training» and «held-out» texts.

    Raises:
        InputError: Data that cannot be read, a template that cannot be used, a folder that holds a
            tokenizer already.
        OSError: The folder cannot be written.
    """
    from tilewright_train.chat_template import CHATML, ChatTemplate, read_template
    from tilewright_train.conversations import end_of_turn
    from tilewright_train.record_files import SkippedLines
    from tilewright_train.sources import Reading, for_kind, open_source
    from tilewright_train.tokenizer import TOKENIZER_FILE, vocabulary_rows
    from tilewright_train.whole_sources import kind_of

    if (options.out / TOKENIZER_FILE).exists():
        raise InputError(f"{options.out} holds a tokenizer already: give another --out")
    given = options.chat_template
    template = ChatTemplate(read_template(given) if given else CHATML)
    found = (open_source(name) for name in options.data)
    sources = [for_kind(source, kind_of(source, "text", options.on_bad_line)) for source in found]
    for source in sources:
        say(f"corpus       {source.describe()}")
    reading = Reading(
        validation_fraction=options.validation_fraction,
        on_bad_line=options.on_bad_line,
        skipped=SkippedLines(),
    )
    begin = time.perf_counter()
    made = _train(sources, reading, options.vocab_size, template)
    end_of_turn(made, template)  # complains before anything is written
    say(
        f"vocabulary   {vocabulary_rows(made):,} entries in {time.perf_counter() - begin:.1f} s;"
        f" the longest: {', '.join(map(repr, _longest(made)))}"
    )
    if reading.skipped.count:
        say(f"skipped      {reading.skipped.count} lines: {'; '.join(reading.skipped.examples)}")
    densities = {}
    for name, side in (("training", False), ("held-out", True)):
        density = _density(made, (t for s in sources for t in _texts(s, reading, side)))
        densities[name] = density
        say(
            f"{name:<12} {density.bytes_per_token:.3f} bytes a token:"
            f" {density.bytes:,} bytes, {density.tokens:,} tokens"
        )
    _save(made, template, options.out)
    say(f"saved        {options.out}")
    say(f"next         train-pretrain --tokenizer {options.out} --data {' '.join(options.data)}")
    return densities


def _train(
    sources: "Sequence[Source]", reading: "Reading", vocab_size: int, template: "ChatTemplate"
) -> "Tokenizer":
    """A vocabulary with the special tokens that the template writes, `vocab_size` with them."""
    from tilewright_train.conversations import add_chat_tokens, missing_chat_tokens
    from tilewright_train.tokenizer import sample, sample_budget, train_tokenizer

    size = sum(source.size for source in sources)
    texts = (text for source in sources for text in _texts(source, reading, False))
    chosen = sample(texts, size, sample_budget(vocab_size))
    special = missing_chat_tokens((), template)
    made = train_tokenizer(chosen, vocab_size - len(special))
    add_chat_tokens(made, special)
    return made


def _texts(source: "Source", reading: "Reading", validation: bool) -> Iterator[str]:
    """What the records of one side say."""
    from tilewright_train.records import text_of
    from tilewright_train.whole_sources import kind_of

    for side, record in source.records(kind_of(source, "text", reading.on_bad_line), reading):
        if side is validation:
            yield text_of(record)


def _density(made: "Tokenizer", texts: Iterable[str]) -> Density:
    """Of the first 16 million characters."""
    from tilewright_train.tokenizer import pieces

    size = count = characters = 0
    for text in texts:
        parts = list(pieces(text))
        size += len(text.encode())
        encoded = made.encode_batch_fast(parts, add_special_tokens=False)
        count += sum(len(part.ids) for part in encoded)
        characters += len(text)
        if characters >= _MEASURED:
            break
    return Density(bytes=size, tokens=count)


def _longest(made: "Tokenizer") -> list[str]:
    """The longest tokens as text."""
    added = made.get_added_tokens_decoder()
    entries = [(-len(t), number) for t, number in made.get_vocab().items() if number not in added]
    return [made.decode([number]) for _, number in sorted(entries)[:_SHOWN]]


def _save(made: "Tokenizer", template: "ChatTemplate", folder: Path) -> None:
    from tilewright_train.chat_template import TEMPLATE_FILE
    from tilewright_train.tokenizer import END_OF_TEXT, TOKENIZER_FILE

    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    with writing(folder, "give another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TEMPLATE_FILE).write_text(template.source, encoding="utf-8")
        text = json.dumps(described, indent=2) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        (folder / TOKENIZER_FILE).write_text(made.to_str(pretty=True), encoding="utf-8")
