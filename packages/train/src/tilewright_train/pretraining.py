"""One pretraining run from its options to its last line: prepare, train, report.

`run` is what the command `train-pretrain` calls and what a script may call. Each part is in a file
of its own; here is their order.
"""

import contextlib
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch

from tilewright_dist import DistributedEnvironment, init_from_environment
from tilewright_kernels import backend_report
from tilewright_model import count_parameters, flops_per_token
from tilewright_train import automatic, checkpoint, machine
from tilewright_train.automatic import Chosen
from tilewright_train.config import PretrainConfig
from tilewright_train.errors import InputError, TrainingStopped
from tilewright_train.evaluation import validation_loss
from tilewright_train.finish import finish
from tilewright_train.loop import LoopOptions, TrainingLoop
from tilewright_train.metrics import MetricsFile, Record
from tilewright_train.preparation import Prepared, prepare
from tilewright_train.processes import gather, local_processes, on_first
from tilewright_train.progress import Reporter, make_reporter
from tilewright_train.run_directory import RunDirectory
from tilewright_train.signals import StopRequest

# The first process may encode a large corpus while the others wait in a collective.
_PATIENCE = timedelta(hours=2)


def run(config: PretrainConfig, stream: TextIO = sys.stdout) -> Path:
    """Train, or go on training.

    Under torchrun every process calls this; the first one writes and prints.

    Args:
        config: From `layers.parse`, or made by hand.
        stream: What a person reads.

    Returns:
        The folder of the run.

    Raises:
        InputError: Something that the user gave cannot be used, or the loss is no longer finite.
        OSError: A file cannot be read or written.
        TrainingStopped: Ctrl-C or SIGTERM came; the run is saved.
    """
    with contextlib.ExitStack() as stack:
        with _as_input_errors():
            chosen = automatic.choose(config, local_processes=local_processes())
            automatic.model_config(chosen.config)
            stack.enter_context(machine.configured(chosen.config.machine))
            environment = stack.enter_context(
                init_from_environment(chosen.config.machine.device, timeout=_PATIENCE)
            )
        every = chosen.config.run.log_every
        reporter = make_reporter(stream, every) if environment.is_main else Reporter()
        if _is_finished(config, reporter):
            return Path(config.run.resume)
        _say_choices(chosen, environment, reporter)
        with _as_input_errors():
            prepared = prepare(chosen, environment, reporter)
        try:
            _train(chosen.config, prepared, environment, reporter)
        except torch.OutOfMemoryError as error:
            training = chosen.config.training
            raise InputError(
                f"out of memory with batch_size {training.batch_size} and seq_len"
                f" {training.seq_len} ({error}): start again with a smaller one or another --preset"
            ) from error
        return prepared.run.root


@contextlib.contextmanager
def _as_input_errors() -> Iterator[None]:
    """While options are looked at, a ValueError or TypeError is the user's to mend.

    Later on it would be ours, and keeps its traceback.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error


def _is_finished(config: PretrainConfig, reporter: Reporter) -> bool:
    """Whether the run to resume has come to its end already."""
    if config.run.resume == "never":
        return False
    run = RunDirectory(Path(config.run.resume))
    if run.summary.exists():
        reporter.say(f"{run.root} is finished: its losses are in {run.picture}")
        return True
    return False


def _say_choices(chosen: Chosen, environment: DistributedEnvironment, reporter: Reporter) -> None:
    for choice in chosen.choices:
        value = repr(choice.value) if isinstance(choice.value, str) else f"{choice.value:g}"
        reporter.say(f"{choice.name:<12} {value.strip(chr(39)) or chr(34) * 2:<8} {choice.reason}")
    if environment.process_group is not None:
        reporter.say(f"processes    {environment.world_size}        torchrun says so")


def _train(
    config: PretrainConfig,
    prepared: Prepared,
    environment: DistributedEnvironment,
    reporter: Reporter,
) -> None:
    """Run the loop, then say how it ended."""
    model, shape = prepared.trainee.model, prepared.model_config
    training, run = config.training, prepared.run
    precision = config.machine.precision
    device = environment.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    parameters = count_parameters(shape)
    reporter.say(
        f"model        {parameters.total / 1e6:.2f} M parameters,"
        f" {parameters.embedding / 1e6:.2f} M of them the embedding; {machine.describe(device)}"
    )
    epochs = prepared.sampler.epochs(training.steps)
    reporter.say(f"run          {run.root}, {epochs:.2g} times through the training tokens")
    reporter.say()

    def evaluate() -> float:
        return validation_loss(
            model,
            prepared.validation,
            batch_size=max(1, training.batch_size // environment.world_size),
            environment=environment,
            autocast=autocast,
        )

    def save(step: int, seconds: float) -> None:
        states = gather(environment, checkpoint.random_states(environment.rank, device))

        def write() -> None:
            checkpoint.save(
                run.checkpoints,
                step,
                **vars(prepared.trainee),
                random_states=states,
                tokenizer=prepared.tokens.tokenizer.to_str(),
                facts={"seconds": seconds, "processes": environment.world_size},
                keep=config.run.keep,
            )

        on_first(environment, write)

    metrics = MetricsFile(run.metrics) if environment.is_main else None

    def emit(record: Record) -> None:
        if metrics is not None:
            metrics.write(record)
        reporter.record(record)

    backend_report(reset=True)
    reporter.begin(prepared.done, training.steps, shape.vocab_size)
    with StopRequest() as stop:
        loop = TrainingLoop(
            **vars(prepared.trainee),
            sampler=prepared.sampler,
            options=LoopOptions(
                steps=training.steps,
                max_grad_norm=training.max_grad_norm,
                eval_every=config.run.eval_every,
                save_every=config.run.save_every,
                flops_per_token=flops_per_token(shape, training.seq_len),
                peak_flops=machine.peak_flops(device, precision),
            ),
            environment=environment,
            autocast=autocast,
            evaluate=evaluate,
            save=save,
            emit=emit,
            stop=stop,
        )
        try:
            done = loop.run(prepared.done, prepared.seconds)
        finally:
            reporter.end()
            if metrics is not None:
                metrics.close()
    if done < training.steps:
        raise TrainingStopped(
            f"stopped after step {done} of {training.steps}, which is saved; go on with:"
            f" train-pretrain --resume {run.root}",
            128 + (stop.signal or 15),
        )
    if environment.is_main:
        finish(config, prepared, autocast, reporter)
