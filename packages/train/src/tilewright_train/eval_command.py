"""The command `train-eval`: how well a model predicts data, with no training.

loss = mean of -ln p over all predictions, perplexity = e^loss, and

    bits per byte = Σ -ln p / (ln 2 · bytes of the predicted tokens),

which compares models of different tokenizers. Predicted ends of documents count in the sum and
stand for no byte.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tilewright_train.config import STDLIB, STORIES, DataOptions
from tilewright_train.errors import InputError
from tilewright_train.flags import parse_flags
from tilewright_train.trained import ModelChoice, Trained, exit_status, opened

if TYPE_CHECKING:
    from tilewright_train.data import ValidationRows
    from tilewright_train.records import Kind
    from tilewright_train.samples import Samples
    from tilewright_train.sources import Source
    from tilewright_train.tokens import TokenFacts

_DESCRIPTION = """Measure loss, perplexity and bits per byte of a model. With no argument: of the
latest run in --out, on the part of its data that it did not train on."""

_ALL = 2**62  # predictions
_TOGETHER = {"cpu": 2048, "cuda": 16384}  # tokens of a batch
_MASKED = 512  # the same where plain torch masks packed rows, at the square of the tokens


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ModelChoice):
    """What is measured."""

    data: tuple[str, ...] = ()
    """Sources as train-pretrain takes them. Default: those of the model's run."""
    split: Literal["auto", "all", "validation"] = "auto"
    """All records, or those that training leaves out. Default: all of your own files, validation
    of the run's data and of what is built in."""
    kind: Literal["auto", "text", "conversation"] = "auto"
    """Texts, of which all is predicted, or conversations, of which the assistant's part is.
    Default: what the first record is, of «stories» what the model's run was trained on."""
    seq_len: int | None = None
    """Tokens a row. Default: the run's, else 2,048 or as many as the model has positions."""
    packing: Literal["auto", "concat", "best_fit", "none"] = "auto"
    """How records become rows, as of train-pretrain. Default: the run's, else best_fit."""
    max_tokens: int | None = None
    """Predictions at most, spread evenly. Default: all."""
    on_bad_line: Literal["auto", "error", "skip"] = "auto"
    """A line that is no record, or a conversation that the template refuses: stop there, or skip
    and count it. Default: as the run did of its own data, else stop."""
    cache_dir: Path | None = None
    """Where encoded data are kept, as of train-pretrain."""
    json: Path | None = None
    """A file for the figures."""

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 2), ("max_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} {value} is out of range: it must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How well a source is predicted."""

    source: str
    kind: str
    loss: float
    """Mean over the predictions, in nats."""
    predictions: int
    bytes: int
    """Of the predicted tokens."""
    seconds: float

    @property
    def perplexity(self) -> float:
        """e^loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """NaN where only ends were predicted, which stand for no byte."""
        if not self.bytes:
            return math.nan
        return self.loss * self.predictions / (math.log(2) * self.bytes)


def evaluate() -> None:
    """Entry point."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the exit status."""

    def action() -> None:
        names = [field.name for field in fields(EvalOptions)]
        options = parse_flags(
            EvalOptions(), arguments, prog="train-eval", description=_DESCRIPTION, names=names
        )
        measure(options, print)

    return exit_status(action)


def measure(options: EvalOptions, say: Callable[[str], None]) -> list[Figures]:
    """Measure every source.

    Args:
        options: What.
        say: Takes lines for people.

    Raises:
        InputError: A model, a device or data that cannot be used.
    """
    from tilewright_train.sources import for_kind, open_source

    if options.json is not None and not options.json.parent.is_dir():
        raise InputError(f"{options.json.parent} is no folder: give --json a file in one")
    with opened(options, cast=False) as trained:
        data = options.data or (trained.config.data.data if trained.config else ())
        if not data:
            raise InputError(f"{trained.start.folder} is of no run here: give --data")
        say(f"model        {trained.start.folder}")
        measured = []
        for name in data:
            source = open_source(name)
            kind = _kind(options, trained, source)
            source = for_kind(source, kind)
            say(f"data         {source.describe()}")
            figures = _measure_source(options, trained, name, source, kind, say)
            measured.append(figures)
            say(
                f"{figures.kind:<12} loss {figures.loss:.4f}, perplexity {figures.perplexity:.2f},"
                f" {figures.bits_per_byte:.4f} bits per byte; {figures.predictions:,} predictions"
                f" of {figures.bytes:,} bytes in {figures.seconds:.1f} s"
            )
    if options.json is not None:
        records = [
            asdict(f) | {"perplexity": f.perplexity, "bits_per_byte": f.bits_per_byte}
            for f in measured
        ]
        facts = {"model": str(trained.start.folder), "sources": records}
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return measured


def _measure_source(
    options: EvalOptions,
    trained: Trained,
    name: str,
    source: "Source",
    kind: "Kind",
    say: Callable[[str], None],
) -> Figures:
    from tilewright_train.data import RowOptions, validation_rows
    from tilewright_train.tokenizer import end_token

    run = trained.config
    is_own = not options.data
    whole = _takes_all(options, name, is_own)
    samples, facts = _encode(options, trained, source, kind, whole=whole)
    _say_left_out(facts, say)
    positions = trained.model.config.max_position_embeddings
    seq_len = options.seq_len or (run.training.seq_len if run else None) or min(2048, positions)
    if seq_len > positions:
        raise InputError(
            f"seq_len {seq_len} is more than the model's {positions} positions: give a smaller one"
        )
    packing = options.packing
    if packing == "auto":
        packing = run.data.packing if run and is_own else "best_fit"
    if packing == "concat" and kind == "conversation":
        raise InputError("packing concat cuts conversations anywhere: give --packing best_fit")
    row_options = RowOptions(
        packing=packing,
        document_mask=not (run and run.data.document_mask == "off"),
        seq_len=seq_len,
        padding=end_token(trained.tokenizer),
    )
    if samples.targets is not None and (cut := int((samples.lengths > seq_len).sum())):
        say(f"cut off      {cut} records behind {seq_len} tokens")
    rows = validation_rows([samples], row_options, _ALL)
    if options.max_tokens is not None and rows.targets > options.max_tokens:
        # As many rows as hold so many predictions on average; of conversations few a row.
        ((_, numbers),) = rows.parts
        full = options.max_tokens * (seq_len - 1) * len(numbers) // rows.targets
        rows = validation_rows([samples], row_options, full)
    masked = packing == "best_fit" or (packing == "concat" and row_options.document_mask)
    together = _TOGETHER[trained.device.type]
    if masked and trained.device.type == "cpu":
        together = _MASKED
    return _predict(trained, rows, max(1, together // seq_len), source.name, kind)


def _kind(options: EvalOptions, trained: Trained, source: "Source") -> "Kind":
    from tilewright_train.whole_sources import kind_of

    if options.kind != "auto":
        return options.kind
    objective = trained.config.run.objective if trained.config else "pretrain"
    preferred: Kind = "text" if objective == "pretrain" else "conversation"
    if not options.data and objective != "dpo":
        return preferred
    kind = kind_of(source, preferred, _on_bad_line(options, trained))
    if kind == "preference":
        raise InputError(f"{source.name} holds pairs: train-eval reads texts and conversations")
    return kind


def _on_bad_line(options: EvalOptions, trained: Trained) -> Literal["error", "skip"]:
    if options.on_bad_line != "auto":
        return options.on_bad_line
    return trained.config.data.on_bad_line if trained.config and not options.data else "error"


def _takes_all(options: EvalOptions, name: str, is_own: bool) -> bool:
    if options.split != "auto":
        return options.split == "all"
    return not (is_own or name in (STDLIB, STORIES))


def _encode(
    options: EvalOptions, trained: Trained, source: "Source", kind: "Kind", *, whole: bool
) -> "tuple[Samples, TokenFacts]":
    """The tokens, from the cache where training or an earlier call has made them."""
    from tilewright_train import tokens
    from tilewright_train.cache import default_cache, writable_cache
    from tilewright_train.conversations import chat_encoding
    from tilewright_train.whole_sources import WholeSource

    run, encoding = trained.config, None
    on_bad_line = _on_bad_line(options, trained)
    if kind == "conversation":
        if trained.template is None:
            raise InputError(
                f"{trained.start.folder} has no chat template: give --kind text, or a model that"
                " train-sft has made"
            )
        encoding = chat_encoding(trained.template, skip_refused=on_bad_line == "skip")
    fraction = run.data.validation_fraction if run else DataOptions().validation_fraction
    reading = DataOptions(validation_fraction=fraction, on_bad_line=on_bad_line)
    cache = writable_cache(options.cache_dir or default_cache(), options.out / ".cache")
    read = WholeSource(source) if whole else source
    folder, _ = tokens.prepare(read, reading, trained.tokenizer, cache, encoding)
    encoded = tokens.load(folder)
    if not encoded.facts.validation_samples:
        raise InputError(f"in no record of {source.name} there is anything to predict: give others")
    return encoded.validation, encoded.facts


def _say_left_out(facts: "TokenFacts", say: Callable[[str], None]) -> None:
    if facts.skipped_lines:
        say(f"skipped      {facts.skipped_lines} lines: {'; '.join(facts.skipped_examples)}")
    for what, count in facts.counts.items():
        if count:
            say(f"skipped      {count} {what.replace('_', ' ')}")


def _predict(trained: Trained, rows: "ValidationRows", size: int, name: str, kind: str) -> Figures:
    import torch

    from tilewright_train.batches import IGNORE_INDEX
    from tilewright_train.token_bytes import token_bytes

    model, device = trained.model, trained.device
    sizes = token_bytes(trained.tokenizer, model.config.vocab_size)
    total = torch.zeros((), dtype=torch.float64, device=device)
    predictions = bytes_of_text = 0
    begin = time.perf_counter()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=trained.is_bf16)
    with torch.no_grad():
        for batch in rows.batches(size):
            labels = batch.labels[batch.labels != IGNORE_INDEX]
            predictions += batch.targets
            bytes_of_text += int(sizes[labels].sum())
            with autocast:
                total += model(**batch.to(device).inputs, num_items=1).loss.double()
    loss = float(total) / predictions
    return Figures(
        source=name,
        kind=kind,
        loss=loss,
        predictions=predictions,
        bytes=bytes_of_text,
        seconds=time.perf_counter() - begin,
    )
