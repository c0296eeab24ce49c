"""Everything before the first step: the folder of the run, its tokens, its model, its state.

A user's mistakes end here, before anything is trained: each is an `InputError`.
"""

import contextlib
import functools
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tilewright_dist import DistributedEnvironment
from tilewright_model import CausalLM, ModelConfig, count_parameters, flops_per_token
from tilewright_train import checkpoint, checkpoint_state, machine
from tilewright_train.automatic import Chosen, model_config
from tilewright_train.batches import BatchSampler
from tilewright_train.cache import default_cache, writable_cache
from tilewright_train.chat_template import CHATML, ChatTemplate, read_template
from tilewright_train.config import DataOptions, PretrainConfig, learned_with
from tilewright_train.conversations import (
    WITHOUT_ASSISTANT,
    chat_encoding,
    chat_tokenizer,
    end_of_turn,
    missing_chat_tokens,
)
from tilewright_train.corpus import Corpus, corpus_facts, load_corpus, prepare_corpus
from tilewright_train.data import (
    RowOptions,
    TrainingRows,
    ValidationRows,
    training_rows,
    validation_rows,
)
from tilewright_train.dpo import SequenceLogProbs
from tilewright_train.errors import InputError
from tilewright_train.layers import write_toml
from tilewright_train.objectives import NextToken, Objective
from tilewright_train.optimizers import make_optimizer
from tilewright_train.precision import arithmetic, cast_weights
from tilewright_train.preference_run import (
    check_same_reference,
    make_objective,
    prepare_pairs,
    reference_facts,
)
from tilewright_train.preferences import WITHOUT_COMPLETION, pair_encoding
from tilewright_train.processes import on_first
from tilewright_train.progress import Reporter
from tilewright_train.random_states import seed_all, set_random_states
from tilewright_train.record_groups import REFUSED
from tilewright_train.replicas import made_on, replicate, wait_for_parameters
from tilewright_train.resuming import (
    check_same_options,
    check_same_tokens,
    check_same_vocabulary,
    find_checkpoint,
)
from tilewright_train.run_directory import (
    HAS_SAVED,
    RunDirectory,
    check_room,
    create,
    removed_if_not_begun,
)
from tilewright_train.sources import Source, for_kind, open_source
from tilewright_train.start import (
    Start,
    find_start,
    grown_vocabulary,
    load_start,
    saved_vocabulary,
)
from tilewright_train.step_guard import StepGuard
from tilewright_train.tokenizer import (
    FEWEST_ENTRIES,
    TOKENIZER_FILE,
    end_token,
    load_tokenizer,
    tokenizer_file,
    vocabulary_rows,
)
from tilewright_train.tokens import Encoding, prepare_tokenizer
from tilewright_train.whole_files import write_whole


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """What is trained, and what trains it."""

    model: CausalLM
    called: nn.Module
    """What the objective calls, without wrappers: the model, or of DPO `SequenceLogProbs`."""
    module: nn.Module
    """What is called to train: the same, or its wrapper for several processes."""
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    guard: StepGuard
    """Clips gradients, and leaves updates out."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that can start."""

    run: RunDirectory
    corpus: Corpus
    chat_template: str | None
    """What is saved beside the tokenizer, for whoever fine-tunes next."""
    template: ChatTemplate | None
    """Of SFT and DPO: how conversations are written."""
    model_config: ModelConfig
    trainee: Trainee
    objective: Objective
    """What it learns."""
    training: TrainingRows
    """What the sampler reads."""
    sampler: BatchSampler
    validation: ValidationRows
    """The rows of the validation loss."""
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
    config = chosen.config
    loaded: list[Corpus] = []  # of the first process, which need not check them twice

    start = None
    if config.model.init != "scratch":
        older = config.run.resume_from_older
        start = find_start(Path(config.model.init), from_older=older)
    template = _template(chosen, start)

    def prepare_files() -> tuple[list[Path], RunDirectory]:
        corpus, run = _prepare_files(chosen, start, template, environment, reporter)
        loaded.append(corpus)
        return [corpus.tokenizer_file, *(source.folder for source in corpus.sources)], run

    (file, *entries), run = on_first(environment, prepare_files)
    corpus = loaded[0] if loaded else load_corpus(file, entries)
    is_new = environment.is_main and config.run.resume == "never"
    with removed_if_not_begun(run) if is_new else contextlib.nullcontext():
        return _prepare_training(chosen, corpus, run, start, template, environment, reporter)


def _prepare_training(
    chosen: Chosen,
    corpus: Corpus,
    run: RunDirectory,
    start: Start | None,
    template: ChatTemplate | None,
    environment: DistributedEnvironment,
    reporter: Reporter,
) -> Prepared:
    """Every process's part: rows, model, objective, and the checkpoint to go on with."""
    config, settled = chosen.config, chosen.settled
    options = RowOptions(
        packing=config.data.packing,
        document_mask=settled.document_mask == "on",
        seq_len=settled.seq_len,
        padding=end_token(corpus.tokenizer),
    )
    if config.run.objective == "dpo":
        assert start is not None
        pairs = prepare_pairs(chosen, corpus, start, _cache(config), environment, reporter)
        training, validation = pairs.training, pairs.validation
    else:
        training = training_rows(
            [source.train for source in corpus.sources],
            config.data.weights,
            options,
            config.training.seed,
        )
        validation = validation_rows(
            [source.validation for source in corpus.sources], options, settled.eval_tokens
        )
    _say_packing(training, reporter)
    sampler = BatchSampler(
        training.rows,
        batch_size=settled.batch_size,
        rank=environment.rank,
        world_size=environment.world_size,
    )
    sampler.parts(settled.micro_batch_size)  # complains now, not after the model is built
    shape = _shape(chosen, start, corpus)
    trainee = build(chosen, shape, environment, start)
    objective: Objective = NextToken()
    if config.run.objective == "dpo":
        assert start is not None
        wait = functools.partial(wait_for_parameters, trainee.optimizer)
        objective = make_objective(chosen, start, trainee.model, corpus.vocab_size, wait)
    done, seconds = 0, 0.0
    if config.run.resume != "never":
        older = config.run.resume_from_older
        found = on_first(
            environment, lambda: find_checkpoint(run, older, settled.save_every, reporter)
        )
        done = found.step
        rows = done * settled.batch_size
        if found.folder is not None:
            check_same_vocabulary(found.folder, corpus)
        seconds = _load_checkpoint(found, config, rows, trainee, environment, reporter)
        if found.folder is not None:
            objective.load(checkpoint_state.load_reference(found.folder))
    return Prepared(
        run=run,
        corpus=corpus,
        chat_template=template.source if template else _kept_template(config.data, start),
        template=template,
        model_config=shape,
        trainee=trainee,
        objective=objective,
        training=training,
        sampler=sampler,
        validation=validation,
        done=done,
        seconds=seconds,
    )


def build(
    chosen: Chosen,
    shape: ModelConfig,
    environment: DistributedEnvironment,
    start: Start | None = None,
) -> Trainee:
    """Model, optimizer and schedule: the same weights on every device and process.

    They come from the seed, or from the checkpoint to start with.
    """
    # Imported here, behind the thread that `pretraining` starts for it.
    from tilewright_optim import WarmupCosine

    options, settled = chosen.config.training, chosen.settled
    seed_all(options.seed)
    parallel = chosen.config.machine.parallel
    model = CausalLM(shape).to(made_on(shape, parallel, environment))
    if start is not None:
        load_start(start, model)
    cast_weights(model, settled.precision)
    model.recompute = chosen.config.machine.recompute
    if chosen.config.machine.compile:
        for block in model.layers:  # one by one, so that gradient hooks fire between them
            block.compile(fullgraph=True)
    called: nn.Module = model
    if chosen.config.run.objective == "dpo":
        called = SequenceLogProbs(model).eval()  # dropout would not be the reference's
    module, optimizer = replicate(
        called,
        lambda _: make_optimizer(options, model, settled.lr, settled.precision),
        parallel=parallel,
        precision=settled.precision,
        environment=environment,
        max_grad_norm=options.max_grad_norm,
    )
    scheduler = WarmupCosine(
        optimizer, settled.warmup_steps, settled.steps, min_lr_ratio=options.min_lr_ratio
    )
    guard = StepGuard(
        optimizer,
        [parameter for group in optimizer.param_groups for parameter in group["params"]],
        max_grad_norm=options.max_grad_norm,
        device=environment.device,
        on_spike=options.on_spike,
        scales_loss=arithmetic(settled.precision).scales_loss,
    )
    return Trainee(
        model=model,
        called=called,
        module=module,
        optimizer=optimizer,
        scheduler=scheduler,
        guard=guard,
    )


def _kept_template(options: DataOptions, start: Start | None) -> str | None:
    """The template that came with the tokenizer."""
    if start is None and options.tokenizer is not None:
        start = Start(tokenizer_file(options.tokenizer).parent)
    return start.chat_template if start else None


def _template(chosen: Chosen, start: Start | None) -> ChatTemplate | None:
    """How conversations are written: as asked for, as before, or as ChatML."""
    if chosen.config.run.objective == "pretrain":
        return None
    if given := chosen.config.data.chat_template:
        return ChatTemplate(read_template(given))
    return ChatTemplate(_kept_template(chosen.config.data, start) or CHATML)


def _shape(chosen: Chosen, start: Start | None, corpus: Corpus) -> ModelConfig:
    """The model: its vocabulary is the tokenizer's, or that of the checkpoint, grown."""
    if start is None and chosen.config.run.objective == "pretrain":
        return model_config(chosen, corpus.vocab_size)
    rows = saved_vocabulary(start) if start else 0
    return model_config(chosen, grown_vocabulary(rows, corpus.vocab_size))


def checkpoint_bytes(shape: ModelConfig) -> int:
    """Size of a checkpoint: weights and two moments in float32, and a tokenizer."""
    return 12 * count_parameters(shape).total + 100 * shape.vocab_size


def _say_packing(training: TrainingRows, reporter: Reporter) -> None:
    if not training.plans:
        return
    rows = sum(plan.rows for plan in training.plans)
    cut = f", {training.truncated} samples cut off" if training.truncated else ""
    left_out = f", {training.dropped} left out: nothing to predict" if training.dropped else ""
    reporter.say(
        f"packing      {training.efficiency:.1%} of {rows:,} rows is tokens, the rest padding"
        f"{cut}{left_out}"
    )


def _prepare_files(
    chosen: Chosen,
    start: Start | None,
    template: ChatTemplate | None,
    environment: DistributedEnvironment,
    reporter: Reporter,
) -> tuple[Corpus, RunDirectory]:
    """The first process's part: room on the disk, tokens in the cache, the run's folder."""
    config, settled = chosen.config, chosen.settled
    resumed = Path(config.run.resume) if config.run.resume != "never" else None
    shape = model_config(chosen)
    # A checkpoint is written before the oldest one is removed.
    most = min(config.run.keep + 1, -(-settled.steps // settled.save_every))
    if every := config.run.keep_every:
        most += settled.steps // math.lcm(every, settled.save_every)
    there = len(checkpoint.all_checkpoints(RunDirectory(resumed).checkpoints)) if resumed else 0
    room = checkpoint_bytes(shape) * max(1, most - there)
    check_room(resumed or config.run.out, room)
    encoding = _encoding(config, template)
    sources = [for_kind(open_source(data), encoding.kind) for data in config.data.data]
    for source in sources:
        reporter.say(f"corpus       {source.describe()}")
    cache = _cache(config)
    file = start.tokenizer_file if start else _own_tokenizer(config.data)
    if resumed is not None and config.run.accept_changed_data:
        # Other texts would give another vocabulary than the model has learned.
        file = _tokenizer_of(RunDirectory(resumed)) or file
    if start is not None or template is not None:
        reporter.say(f"begins with  {start.folder if start else 'random weights'}")
    if template is not None:
        file = chat_tokenizer(
            file or _trained_tokenizer(sources, config, shape.vocab_size, template, cache),
            template,
            cache,
        )
        end_of_turn(load_tokenizer(file), template)  # complains before anything is read
    corpus = prepare_corpus(
        sources,
        config.data,
        shape.vocab_size,
        cache,
        tokenizer_file=file,
        encoding=encoding,
    )
    for encoded, was_there in zip(corpus.sources, corpus.were_there, strict=True):
        facts = encoded.facts
        reporter.say(
            f"tokens       {facts.train_tokens:,} to train on, {facts.validation_tokens:,} to"
            f" validate, vocabulary {corpus.vocab_size:,}, in {encoded.folder}"
            f"{' since an earlier run' if was_there else ''}"
        )
        if facts.skipped_lines:
            examples = "; ".join(facts.skipped_examples)
            reporter.say(f"skipped      {facts.skipped_lines} lines: {examples}")
        if silent := facts.counts.get(WITHOUT_ASSISTANT):
            reporter.say(f"skipped      {silent} conversations in which the assistant says nothing")
        if refused := facts.counts.get(REFUSED):
            reporter.say(f"skipped      {refused} conversations on which the chat template raises")
    _check_spoken(corpus)
    if resumed is not None:
        run = RunDirectory(resumed)
        if config.run.objective == "dpo":
            assert start is not None
            check_same_reference(run, config.dpo, start)
        check_same_tokens(run, corpus, config.run.accept_changed_data, reporter)
    else:
        what = "" if config.run.objective == "pretrain" else f"-{config.run.objective}"
        stem = f"{'-'.join(source.name for source in sources)}-{settled.preset}{what}"
        run = create(config.run.out, config.run.name, stem)
        shape = _shape(chosen, start, corpus)
        record = _facts_of(chosen, shape, sources, corpus, environment)
        if config.run.objective == "dpo":
            assert start is not None
            record["reference"] = reference_facts(config.dpo, start)
        with removed_if_not_begun(run):
            write_whole(run.facts, json.dumps(record, indent=2) + "\n")
            write_toml(config, run.config, chosen.reasons)
            run.checkpoints.mkdir()  # so that its absence later says that it was removed
    return corpus, run


def _cache(config: PretrainConfig) -> Path:
    return writable_cache(config.data.cache_dir or default_cache(), config.run.out / ".cache")


def _own_tokenizer(options: DataOptions) -> Path | None:
    """The tokenizer.json that was given.

    Raises:
        InputError: It has other entries than were asked for.
    """
    if options.tokenizer is None:
        return None
    file = tokenizer_file(options.tokenizer)
    entries = vocabulary_rows(load_tokenizer(file))
    if entries != options.vocab_size:
        raise InputError(
            f"{file} has {entries:,} entries and --vocab-size is {options.vocab_size:,}: the"
            " tokenizer does not fit the model; leave --vocab-size out"
        )
    return file


def _trained_tokenizer(
    sources: Sequence[Source],
    config: PretrainConfig,
    vocab_size: int,
    template: ChatTemplate,
    cache: Path,
) -> Path:
    """A vocabulary of what the conversations say, with room for the template's special tokens.

    Raises:
        InputError: There is no room for them.
    """
    added = missing_chat_tokens((), template)
    entries = vocab_size - len(added)
    if entries < FEWEST_ENTRIES:
        raise InputError(
            f"--vocab-size {vocab_size} has no room for {' and '.join(added)}, which the chat"
            f" template writes, beside the end token and 256 bytes: give {FEWEST_ENTRIES} +"
            f" {len(added)} = {FEWEST_ENTRIES + len(added)} or more"
        )
    return prepare_tokenizer(sources, config.data, entries, cache, "conversation")


def _encoding(config: PretrainConfig, template: ChatTemplate | None) -> Encoding:
    """How records become samples."""
    if template is None:
        return Encoding()
    skips = config.data.on_bad_line == "skip"
    if config.run.objective == "dpo":
        return pair_encoding(template, skip_refused=skips)
    return chat_encoding(template, skip_refused=skips)


_LEFT_OUT = {
    WITHOUT_ASSISTANT: (
        "in no conversation for {side} the assistant says anything ({count} were skipped): give"
        " --data more with turns of the role assistant"
    ),
    WITHOUT_COMPLETION: (
        "in no pair for {side} the assistant says something on both sides ({count} were skipped):"
        " give --data more whose chosen and rejected end with turns of the role assistant"
    ),
    REFUSED: (
        "the chat template raises on all records for {side} ({count} were skipped): mend the data,"
        " or give another --chat-template"
    ),
}


def _check_spoken(corpus: Corpus) -> None:
    """Refuse data of which one side of the split is left out whole, before a run is begun."""
    for source in corpus.sources:
        facts = source.facts
        kept = {"training": facts.train_samples, "validation": facts.validation_samples}
        count, reason = max((facts.counts.get(name, 0), name) for name in _LEFT_OUT)
        for side, samples in kept.items():
            if count and not samples:
                raise InputError(_LEFT_OUT[reason].format(side=side, count=count))


def _facts_of(
    chosen: Chosen,
    shape: ModelConfig,
    sources: Sequence[Source],
    corpus: Corpus,
    environment: DistributedEnvironment,
) -> dict[str, Any]:
    """run.json: what this run is, for those who find it later."""
    return {
        "corpus": [source.facts() for source in sources],
        "tokens": corpus_facts(corpus),
        "model": asdict(shape),
        "parameters": count_parameters(shape).total,
        HAS_SAVED: False,
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


def _tokenizer_of(run: RunDirectory) -> Path | None:
    """tokenizer.json of the newest checkpoint, where there is one."""
    found = checkpoint.all_checkpoints(run.checkpoints)
    return found[-1] / TOKENIZER_FILE if found else None


def _load_checkpoint(
    found: checkpoint.Found,
    config: PretrainConfig,
    rows: int,
    trainee: Trainee,
    environment: DistributedEnvironment,
    reporter: Reporter,
) -> float:
    """Load the checkpoint that was found, if any; returns the seconds that its steps took.

    Raises:
        InputError: It is of another model or optimizer, or has read other rows than `rows`.
    """
    if found.folder is None:
        return 0.0
    facts, states = checkpoint_state.load(
        found.folder,
        model=trainee.model,
        optimizer=trainee.optimizer,
        scheduler=trainee.scheduler,
    )
    if facts.get("rows", rows) != rows:
        raise InputError(
            f"{found.folder} has read {facts['rows']} rows, which is not {found.step} steps of this"
            " run's batch_size: put its own config.toml back, or start a new run"
        )
    check_same_options(found.folder, facts.get("options", {}), learned_with(config))
    trainee.guard.load_state_dict(facts.get("guard", {}))
    set_random_states(states, environment.rank, environment.device)
    if facts["processes"] != environment.world_size:
        reporter.say(
            f"note         {facts['processes']} processes before, {environment.world_size} now:"
            " sums are taken in another order, so the last bits may differ"
        )
    return facts["seconds"]
