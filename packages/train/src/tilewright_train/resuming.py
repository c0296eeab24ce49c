"""What a resumed run goes on with: its checkpoint, and that it fits the run's data and options."""

import json
from pathlib import Path
from typing import Any

from tilewright_train import checkpoint
from tilewright_train.corpus import Corpus, corpus_facts
from tilewright_train.errors import InputError
from tilewright_train.metrics import read_metrics, truncate_metrics
from tilewright_train.progress import Reporter
from tilewright_train.run_directory import RunDirectory
from tilewright_train.tokenizer import TOKENIZER_FILE, load_tokenizer
from tilewright_train.whole_files import write_whole


def check_same_tokens(run: RunDirectory, corpus: Corpus, accept: bool, reporter: Reporter) -> None:
    """A resumed run reads what it read before, or `accept` says that it need not."""
    try:
        facts = json.loads(run.facts.read_text(encoding="utf-8"))
        before = facts["tokens"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{run.facts} cannot be read: start a new run") from None
    if before == corpus.sha256:
        return
    if not accept:
        raise InputError(
            f"the data of {run.root} have changed since it began, so it cannot go on with the same"
            " tokens: restore them, add --accept-changed-data to go on with other ones, or start a"
            f" new run with --config {run.config}"
        )
    reporter.say(f"data         have changed since {run.root} began: it goes on with other tokens")
    facts |= {"tokens": corpus_facts(corpus), "tokens_before": facts["tokens"]}
    write_whole(run.facts, json.dumps(facts, indent=2) + "\n")


def find_checkpoint(
    run: RunDirectory, older: bool, save_every: int, reporter: Reporter
) -> checkpoint.Found:
    """Where the run goes on; what lies behind that point is dropped or set aside.

    Args:
        run: Its folder.
        older: Whether to pass over checkpoints that are damaged.
        save_every: Steps between its checkpoints.
        reporter: Says what is found.

    Raises:
        InputError: A checkpoint is damaged, or the run has saved some and all of them are gone.
    """
    found = checkpoint.find(run.checkpoints, from_older=older)
    if found.folder is None:
        _check_nothing_was_saved(run, save_every)
    else:
        run.note_saved()  # a run of before there was the note, or killed before it was written
    for folder in found.damaged:
        reporter.say(f"damaged      {folder} is now {checkpoint.set_aside(folder).name}")
    truncate_metrics(run.metrics, found.step)
    where = f"after step {found.step}" if found.folder else "at the start: no checkpoint yet"
    reporter.say(f"resume       {run.root} {where}")
    return found


def _check_nothing_was_saved(run: RunDirectory, save_every: int) -> None:
    """Refuse to start again, and to drop the metrics, where checkpoints were removed.

    How far a run came says nothing: it may have been killed in its first save, have failed to save,
    or be resumed with another --save-every. So run.json says whether it has saved. A run of before
    it did so is taken to have saved once it has reached twice `save_every`, as a checkpoint is
    written until the next one at most. The folder of checkpoints is there from the start.
    """
    reached = max((record.step for record in read_metrics(run.metrics)), default=0)
    saved = run.has_saved
    if saved is None:
        saved = reached > 2 * save_every
    if reached > 0 and (saved or not run.checkpoints.is_dir()):
        raise InputError(
            f"{run.checkpoints} holds no checkpoint, but {run.metrics} reaches step {reached}: put"
            f" the checkpoints back, or start a new run with --config {run.config}"
        )


def check_same_vocabulary(folder: Path, corpus: Corpus) -> None:
    """A checkpoint's numbers of tokens mean what this run's mean."""
    saved = load_tokenizer(folder / TOKENIZER_FILE).get_vocab(with_added_tokens=True)
    own = corpus.tokenizer.get_vocab(with_added_tokens=True)
    if saved != own:
        raise InputError(
            f"{folder} has another vocabulary than this run, {len(saved)} entries and not"
            f" {len(own)}, or others: put the run's own checkpoints there, or start a new run"
        )


def check_same_options(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """The run's config.toml is that with which the checkpoint was trained."""
    for name, value in before.items():
        if name in now and now[name] != value:
            raise InputError(
                f"{folder} was trained with {name} {value!r} and the run's config.toml gives"
                f" {now[name]!r}: put {value!r} back, or start a new run"
            )
