"""Everything before the first step: the folder of the run, its tokens, its model, its state.

A user's mistakes end here, before anything is trained: each is an `InputError`.
"""

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tilewright_dist import DistributedEnvironment
from tilewright_model import CausalLM, ModelConfig, count_parameters, flops_per_token
from tilewright_train import checkpoint, machine, tokens
from tilewright_train.automatic import Chosen, model_config
from tilewright_train.batches import BatchSampler, validation_rows
from tilewright_train.corpus import Corpus, open_corpus
from tilewright_train.errors import InputError
from tilewright_train.layers import write_toml
from tilewright_train.metrics import read_metrics, truncate_metrics
from tilewright_train.optimizers import make_optimizer
from tilewright_train.processes import on_first
from tilewright_train.progress import Reporter
from tilewright_train.run_directory import RunDirectory, check_room, create


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """What is trained, and what trains it."""

    model: CausalLM
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that can start."""

    run: RunDirectory
    tokens: tokens.Tokens
    model_config: ModelConfig
    trainee: Trainee
    sampler: BatchSampler
    validation: torch.Tensor
    """[R, T] int64, the rows of the validation loss."""
    done: int
    """Steps that are done already."""
    seconds: float
    """What they took."""


def prepare(chosen: Chosen, environment: DistributedEnvironment, reporter: Reporter) -> Prepared:
    """Read the corpus, make or find the run's folder, build the model, load the checkpoint.

    Args:
        chosen: Options without open values.
        environment: Of this process; all processes call this together.
        reporter: Says what is read and found.

    Raises:
        ValueError: Something that the user gave cannot be used.
        OSError: A file cannot be read or written.
    """
    config, settled = chosen.config, chosen.settled
    loaded: list[tokens.Tokens] = []  # of the first process, which need not check them twice

    def prepare_files() -> tuple[Path, RunDirectory]:
        encoded, run = _prepare_files(chosen, environment, reporter)
        loaded.append(encoded)
        return encoded.folder, run

    entry, run = on_first(environment, prepare_files)
    encoded = loaded[0] if loaded else tokens.load(entry)
    sampler = BatchSampler(
        encoded.train,
        batch_size=settled.batch_size,
        seq_len=settled.seq_len,
        seed=config.training.seed,
        rank=environment.rank,
        world_size=environment.world_size,
    )
    shape = model_config(chosen, encoded.facts.vocab_size)
    trainee = build(chosen, shape, environment.device)
    done, seconds = 0, 0.0
    if config.run.resume != "never":
        older = config.run.resume_from_older
        found = on_first(
            environment, lambda: _find_checkpoint(run, older, settled.save_every, reporter)
        )
        done, seconds = found.step, _load_checkpoint(found, trainee, environment, reporter)
    return Prepared(
        run=run,
        tokens=encoded,
        model_config=shape,
        trainee=trainee,
        sampler=sampler,
        validation=validation_rows(encoded.validation, settled.seq_len, settled.eval_tokens),
        done=done,
        seconds=seconds,
    )


def build(chosen: Chosen, shape: ModelConfig, device: torch.device) -> Trainee:
    """Model, optimizer and schedule from the seed: the same weights on every device and process."""
    # Imported here, behind the thread that `pretraining` starts for it.
    from tilewright_optim import WarmupCosine

    options, settled = chosen.config.training, chosen.settled
    torch.manual_seed(options.seed)
    model = CausalLM(shape).to(device)
    optimizer = make_optimizer(options, model, settled.lr)
    scheduler = WarmupCosine(
        optimizer, settled.warmup_steps, settled.steps, min_lr_ratio=options.min_lr_ratio
    )
    return Trainee(model=model, optimizer=optimizer, scheduler=scheduler)


def checkpoint_bytes(shape: ModelConfig) -> int:
    """Size of a checkpoint: weights and two moments in float32, and a tokenizer."""
    return 12 * count_parameters(shape).total + 100 * shape.vocab_size


def _prepare_files(
    chosen: Chosen, environment: DistributedEnvironment, reporter: Reporter
) -> tuple[tokens.Tokens, RunDirectory]:
    """The first process's part: room on the disk, tokens in the cache, the run's folder."""
    config, settled = chosen.config, chosen.settled
    resumed = Path(config.run.resume) if config.run.resume != "never" else None
    shape = model_config(chosen)
    # A checkpoint is written before the oldest one is removed.
    most = min(config.run.keep + 1, -(-settled.steps // settled.save_every))
    there = len(checkpoint.all_checkpoints(RunDirectory(resumed).checkpoints)) if resumed else 0
    room = checkpoint_bytes(shape) * max(1, most - there)
    check_room(resumed or config.run.out, room)
    corpus = open_corpus(config.data.data)
    reporter.say(f"corpus       {corpus.describe()}")
    cache = tokens.writable_cache(
        config.data.cache_dir or tokens.default_cache(), config.run.out / ".cache"
    )
    entry, cached = tokens.prepare(corpus, config.data, shape.vocab_size, cache)
    encoded = tokens.load(entry)
    facts = encoded.facts
    reporter.say(
        f"tokens       {facts.train_tokens:,} to train on, {facts.validation_tokens:,} to validate,"
        f" vocabulary {facts.vocab_size:,}, in {entry}{' since an earlier run' if cached else ''}"
    )
    if facts.skipped_lines:
        examples = "; ".join(facts.skipped_examples)
        reporter.say(f"skipped      {facts.skipped_lines} lines of jsonl: {examples}")
    if resumed is not None:
        run = RunDirectory(resumed)
        _check_same_tokens(run, facts)
    else:
        stem = f"{corpus.name}-{settled.preset}"
        run = create(config.run.out, config.run.name, stem)
        record = _facts_of(chosen, corpus, facts, environment)
        run.facts.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        write_toml(config, run.config, chosen.reasons)
        run.checkpoints.mkdir()  # so that its absence later says that it was removed
    return encoded, run


def _facts_of(
    chosen: Chosen,
    corpus: Corpus,
    facts: tokens.TokenFacts,
    environment: DistributedEnvironment,
) -> dict[str, Any]:
    """run.json: what this run is, for those who find it later."""
    shape = model_config(chosen, facts.vocab_size)
    return {
        "corpus": {
            "name": corpus.name,
            "root": str(corpus.root),
            "files": len(corpus.files),
            "bytes": corpus.size,
            "sha256": corpus.sha256,
            "python_version": corpus.python_version,
        },
        "tokens": asdict(facts),
        "model": asdict(shape),
        "parameters": count_parameters(shape).total,
        "flops_per_token": flops_per_token(shape, chosen.settled.seq_len),
        "device": machine.describe(environment.device),
        "processes": environment.world_size,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in ("tilewright-train", "triton", "tokenizers")},
        },
        "chosen": {c.name: {"value": c.value, "reason": c.reason} for c in chosen.choices},
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:  # run from a source tree, or triton on a machine without it
        return None


def _check_same_tokens(run: RunDirectory, facts: tokens.TokenFacts) -> None:
    """A resumed run reads what it read before."""
    try:
        before = json.loads(run.facts.read_text(encoding="utf-8"))["tokens"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{run.facts} cannot be read: start a new run") from None
    if before != facts.sha256:
        raise InputError(
            f"the data of {run.root} have changed since it began, so it cannot go on with the same"
            f" tokens: restore them, or start a new run with --config {run.config}"
        )


def _find_checkpoint(
    run: RunDirectory, older: bool, save_every: int, reporter: Reporter
) -> checkpoint.Found:
    """Where the run goes on; what lies behind that point is dropped or set aside.

    Raises:
        InputError: A checkpoint is damaged, or the run has saved some and all of them are gone.
    """
    found = checkpoint.find(run.checkpoints, from_older=older)
    if found.folder is None:
        _check_nothing_was_saved(run, save_every)
    for folder in found.damaged:
        reporter.say(f"damaged      {folder} is now {checkpoint.set_aside(folder).name}")
    truncate_metrics(run.metrics, found.step)
    where = f"after step {found.step}" if found.folder else "at the start: no checkpoint yet"
    reporter.say(f"resume       {run.root} {where}")
    return found


def _check_nothing_was_saved(run: RunDirectory, save_every: int) -> None:
    """Refuse to start again, and to drop the metrics, where checkpoints were removed.

    A step's record is written before its checkpoint: a run killed between the two has reached
    `save_every` itself and has none. The folder of checkpoints is there from the start.
    """
    reached = max((record.step for record in read_metrics(run.metrics)), default=0)
    if reached > save_every or (reached > 0 and not run.checkpoints.is_dir()):
        raise InputError(
            f"{run.checkpoints} holds no checkpoint, but {run.metrics} reaches step {reached}: put"
            f" the checkpoints back, or start a new run with --config {run.config}"
        )


def _load_checkpoint(
    found: checkpoint.Found,
    trainee: Trainee,
    environment: DistributedEnvironment,
    reporter: Reporter,
) -> float:
    """Load the checkpoint that was found, if any; returns the seconds that its steps took."""
    if found.folder is None:
        return 0.0
    facts, states = checkpoint.load(found.folder, **vars(trainee))
    checkpoint.set_random_states(states, environment.rank, environment.device)
    if facts["processes"] != environment.world_size:
        reporter.say(
            f"note         {facts['processes']} processes before, {environment.world_size} now:"
            " sums are taken in another order, so the last bits may differ"
        )
    return facts["seconds"]
