"""What a run of DPO has that the others have not: pairs as rows, and a reference."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tilewright_dist import DistributedEnvironment
from tilewright_model import CausalLM
from tilewright_train.automatic import Chosen
from tilewright_train.batches import MixedRows, validation_numbers
from tilewright_train.config import REFERENCE_EMA, REFERENCE_START, DpoOptions
from tilewright_train.corpus import Corpus
from tilewright_train.data import TrainingRows, ValidationRows
from tilewright_train.errors import InputError
from tilewright_train.objectives import DirectPreference
from tilewright_train.pairs import PairPlan, PairRows, plan_pairs
from tilewright_train.precision import arithmetic
from tilewright_train.preferences import EQUAL, MERGED, WITHOUT_COMPLETION
from tilewright_train.processes import on_first
from tilewright_train.progress import Reporter
from tilewright_train.reference import (
    FrozenReference,
    KnownReference,
    MovingReference,
    Precomputed,
    Reference,
    check_same_tokens,
    load_precomputed,
    load_reference,
    model_sha256,
    precompute,
)
from tilewright_train.replicas import divide_like
from tilewright_train.run_directory import RunDirectory
from tilewright_train.samples import SPLITS
from tilewright_train.start import Start, find_start
from tilewright_train.tokenizer import end_token

_SEEDS_APART = 1_000_003  # so that each source has an order of its own


@dataclass(frozen=True, kw_only=True)
class PairData:
    """Pairs to train and to validate on."""

    training: TrainingRows
    validation: ValidationRows


def find_reference(options: DpoOptions, start: Start) -> Start:
    """The model that the policy is compared with.

    Raises:
        InputError: There is none in the folder that was given.
    """
    if options.reference in (REFERENCE_START, REFERENCE_EMA):
        return start
    return find_start(Path(options.reference))


def reference_facts(options: DpoOptions, start: Start) -> dict[str, Any]:
    """What run.json says of the reference."""
    found = find_reference(options, start)
    return {"folder": str(found.folder), "sha256": model_sha256(found)}


def check_same_reference(run: RunDirectory, options: DpoOptions, start: Start) -> None:
    """A resumed run compares with what it compared with before.

    Raises:
        InputError: Its weights or its configuration have changed since.
    """
    before = json.loads(run.facts.read_text(encoding="utf-8")).get("reference")
    now = reference_facts(options, start)
    if before != now:
        raise InputError(
            f"the reference of {run.root} has changed since it began: restore {now['folder']}, or"
            f" start a new run with --config {run.config}"
        )


def prepare_pairs(
    chosen: Chosen,
    corpus: Corpus,
    start: Start,
    cache: Path,
    environment: DistributedEnvironment,
    reporter: Reporter,
) -> PairData:
    """Rows of pairs, with the reference's log-probabilities where they are to be known before.

    Args:
        chosen: Options without open values.
        corpus: Pairs as tokens.
        start: What the policy begins with.
        cache: Keeps log-probabilities.
        environment: Of this process; all processes call this together.
        reporter: Says what is used and what is left out.

    Raises:
        InputError: No pair fits, or the reference cannot be used.
        OSError: The cache cannot be written.
    """
    config, settled = chosen.config, chosen.settled
    check_same_tokens(find_reference(config.dpo, start), corpus.tokenizer_file)
    plans = [
        [
            plan_pairs(source.train, settled.seq_len, "training"),
            plan_pairs(source.validation, settled.seq_len, "validation"),
        ]
        for source in corpus.sources
    ]
    _say_pairs(corpus, plans, settled.seq_len, reporter)
    known: list[list[torch.Tensor | None]] = [[None, None] for _ in plans]
    if config.dpo.precompute:
        known = _known(chosen, corpus, plans, start, cache, environment, reporter)
    padding = None if config.data.packing == "best_fit" else end_token(corpus.tokenizer)
    seed = config.training.seed
    training = [
        PairRows(
            source.train, plan[0], seed=seed + _SEEDS_APART * i, padding=padding, reference=kept[0]
        )
        for i, (source, plan, kept) in enumerate(zip(corpus.sources, plans, known, strict=True))
    ]
    validation = [
        PairRows(source.validation, plan[1], seed=None, padding=padding, reference=kept[1])
        for source, plan, kept in zip(corpus.sources, plans, known, strict=True)
    ]
    shares = config.data.weights or [float(rows.count) for rows in training]
    count = sum(rows.count for rows in validation)
    budget = settled.eval_tokens
    return PairData(
        training=TrainingRows(
            rows=training[0] if len(training) == 1 else MixedRows(training, shares, seed=seed),
            plans=(),
        ),
        validation=ValidationRows(
            parts=tuple(
                (rows, tuple(validation_numbers(rows, budget * rows.count // count)))
                for rows in validation
            )
        ),
    )


def make_objective(
    chosen: Chosen,
    start: Start,
    policy: CausalLM,
    vocab_size: int,
    wait: Callable[[], None],
) -> DirectPreference:
    """The loss, with the reference on the policy's device, divided where the policy is.

    Args:
        chosen: Options without open values.
        start: What the policy begins with.
        policy: Without wrappers; where it is divided, all processes call this together.
        vocab_size: Entries of its tokenizer.
        wait: Returns when the policy's weights are there after a step.
    """
    options, precision = chosen.config.dpo, chosen.settled.precision
    reference: Reference = KnownReference()
    if not options.precompute:
        found = find_reference(options, start)
        # Whole on the host, where it is divided: a GPU may have no room for it.
        parameter = policy.embed_tokens.weight
        device = torch.device("cpu") if isinstance(parameter, DTensor) else parameter.device
        positions = policy.config.max_position_embeddings
        model = load_reference(found, vocab_size, positions, precision, device)
        reference = FrozenReference(model)
        divide_like(policy, reference.scorer, precision)
        if options.reference == REFERENCE_EMA:
            reference = MovingReference(model, policy, options.ema_decay, wait)
    return DirectPreference(options, reference)


def _known(
    chosen: Chosen,
    corpus: Corpus,
    plans: list[list[PairPlan]],
    start: Start,
    cache: Path,
    environment: DistributedEnvironment,
    reporter: Reporter,
) -> list[list[torch.Tensor | None]]:
    """For each source the log-probabilities of its training and its validation pairs."""
    found = find_reference(chosen.config.dpo, start)
    positions, precision = chosen.settled.seq_len, chosen.settled.precision
    depends_on = {
        "model": model_sha256(found),
        "tokenizer": corpus.tokenizer.to_str(),
        "seq_len": positions,
        "precision": precision,
        # Other devices and kernels round otherwise: step 0 would not be ln 2 to the last digit.
        "device": environment.device.type,
        "backend": chosen.settled.backend,
    }
    models: list[CausalLM] = []

    def make_model() -> CausalLM:
        if not models:
            device = environment.device
            models.append(load_reference(found, corpus.vocab_size, positions, precision, device))
        return models[0]

    def compute() -> list[Path]:
        folders = []
        for source, (train, validation) in zip(corpus.sources, plans, strict=True):
            splits = ((source.train, train), (source.validation, validation))
            folder, was_there = precompute(
                Precomputed(splits=splits, sha256=source.facts.sha256),
                make_model,
                depends_on,
                padding=end_token(corpus.tokenizer),
                autocast=arithmetic(precision).autocast(environment.device.type),
                cache=cache,
            )
            since = " since an earlier run" if was_there else ""
            reporter.say(f"reference    log-probabilities in {folder}{since}")
            folders.append(folder)
        return folders

    folders = on_first(environment, compute)
    return [[load_precomputed(folder, split) for split in SPLITS] for folder in folders]


def _say_pairs(
    corpus: Corpus, plans: list[list[PairPlan]], seq_len: int, reporter: Reporter
) -> None:
    train, validation = (sum(plan[i].pairs for plan in plans) for i in (0, 1))
    both = [part for plan in plans for part in plan]
    truncated = sum(plan.truncated for plan in both)
    dropped = sum(plan.dropped for plan in both)
    counts = {
        name: sum(source.facts.counts.get(name, 0) for source in corpus.sources)
        for name in (EQUAL, MERGED, WITHOUT_COMPLETION)
    }
    notes = (
        (counts[EQUAL], "with equal sides, kept"),
        (truncated, f"cut off behind {seq_len} tokens"),
        (dropped, f"left out: the prompt alone fills {seq_len} tokens"),
        (counts[WITHOUT_COMPLETION], "skipped: the assistant says nothing on one side"),
        (counts[MERGED], "whose completion shares a token with the prompt, which does not count"),
    )
    said = "".join(f"; {number:,} {what}" for number, what in notes if number)
    reporter.say(f"pairs        {train:,} to train on, {validation:,} to validate{said}")
