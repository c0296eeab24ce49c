"""One run from its options to its last line: prepare, train, report; whatever its objective.

`run` is what the commands `train-pretrain` and `train-sft` call and what a script may
call. Each part is in a file of its own; here is their order.
"""

import contextlib
import importlib
import math
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from tilewright_dist import DistributedEnvironment, RankFailure, init_from_environment
from tilewright_dist.channel import CollectiveError
from tilewright_dist.failure import naming_the_missing
from tilewright_kernels import backend_report
from tilewright_model import count_parameters, flops_per_token
from tilewright_train import automatic, checkpoint, machine, out_of_memory, snapshot
from tilewright_train.automatic import Chosen
from tilewright_train.config import REFERENCE_EMA, REFERENCE_START, PretrainConfig, learned_with
from tilewright_train.dpo import loss_at_start
from tilewright_train.errors import InputError, RankLost, TrainingStopped
from tilewright_train.evaluation import Validation, validate
from tilewright_train.examination import examine
from tilewright_train.finish import answer_tasks, finish, sample_text
from tilewright_train.guilty import LeftOut, broken_parameter
from tilewright_train.layers import write_toml
from tilewright_train.loading import LoadingOptions
from tilewright_train.loop import LoopOptions, TrainingLoop
from tilewright_train.metrics import MetricsFile, Record
from tilewright_train.precision import arithmetic
from tilewright_train.preference_report import finish_stories
from tilewright_train.preparation import Prepared, prepare
from tilewright_train.processes import gather, local_processes, on_first
from tilewright_train.progress import Reporter, make_reporter
from tilewright_train.random_states import random_states
from tilewright_train.replicas import (
    check_divisible,
    is_sharded,
    wait_for_parameters,
    whole_model,
    whole_state,
    whole_weights,
)
from tilewright_train.run_directory import RunDirectory
from tilewright_train.run_lock import locked
from tilewright_train.saver import Saver
from tilewright_train.saving_time import SavingTime, clock_of
from tilewright_train.signals import StopRequest
from tilewright_train.tensorboard_log import TensorBoardLog, check_installed
from tilewright_train.trial import try_first_batch
from tilewright_train.watching import Watch, WatchOptions

# Of the loss before the first step, where the reference was computed in other batches, in bf16.
_ROUNDING = 0.02

# The first process may encode a large corpus while the others wait in a collective.
_PATIENCE = timedelta(hours=2)


def run(config: PretrainConfig, stream: TextIO | None = None) -> Path:
    """Train, or go on training.

    Under torchrun every process calls this; the first one writes and prints.

    Args:
        config: From `layers.parse`, or made by hand.
        stream: Takes the lines for a person; by default the standard output.

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
            automatic.model_config(chosen)
            settled = chosen.settled
            stack.enter_context(
                machine.configured(
                    threads=settled.threads,
                    deterministic=config.machine.deterministic,
                    tf32=config.machine.tf32,
                    backend=settled.backend,
                    device=settled.device,
                )
            )
            environment = stack.enter_context(
                init_from_environment(settled.device, timeout=_PATIENCE)
            )
        _check_watching(chosen, environment)
        reporter = Reporter()
        if environment.is_main:
            reporter = make_reporter(stream or sys.stdout, settled.log_every)
        if _is_finished(config, reporter):
            return Path(config.run.resume)

        def hold(root: Path) -> None:
            on_first(environment, lambda: stack.enter_context(locked(root)))

        _import_optimizers_meanwhile()
        _say_choices(chosen, environment, reporter)
        with (
            out_of_memory.explained(chosen, environment.world_size),
            _lost_ranks_are_named(environment),
        ):
            if config.run.resume != "never":
                hold(Path(config.run.resume))
            with _as_input_errors():
                prepared = prepare(chosen, environment, reporter)
            if config.run.resume == "never":
                hold(prepared.run.root)
            _Training(chosen, prepared, environment, reporter).run()
        return prepared.run.root


def _import_optimizers_meanwhile() -> None:
    """Import tilewright_optim in a thread: torch's compiler comes with it, 3.5 s of Python.

    The vocabulary is trained and the corpus encoded at the same time, outside Python's lock, so the
    first loss comes about that much earlier.
    """
    threading.Thread(
        target=importlib.import_module, args=("tilewright_optim",), daemon=True
    ).start()


def _check_watching(chosen: Chosen, environment: DistributedEnvironment) -> None:
    """Refuse to look at what is not there, before a run has its name."""
    config, steps = chosen.config, chosen.settled.steps
    options, profile = config.run, config.run.profiled_steps
    check_divisible(config)
    divided = environment.process_group is not None and config.machine.parallel != "ddp"
    if options.grad_norms_every and divided:
        raise InputError(
            "grad_norms_every needs whole gradients in every process: use --parallel ddp, or leave"
            " it out"
        )
    if options.memory_snapshot and environment.device.type != "cuda":
        raise InputError("memory_snapshot records a GPU's allocator: leave it out on a CPU")
    if profile is not None and profile[0] > steps:
        raise InputError(
            f"profile {options.profile} begins behind the last of the {steps} steps: give steps"
            f" from 1 to {steps}"
        )
    if options.tensorboard:
        on_first(environment, check_installed)


@contextlib.contextmanager
def _as_input_errors() -> Iterator[None]:
    """While options are looked at, a ValueError or TypeError is the user's to mend.

    Later on it would be ours, and keeps its traceback.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error


@contextlib.contextmanager
def _lost_ranks_are_named(environment: DistributedEnvironment) -> Iterator[None]:
    """Say which process no longer answers, where a collective fails.

    gloo's errors are plain RuntimeErrors. Of those that came from something else all processes
    answer, and they keep their traceback.
    """
    group = environment.process_group
    try:
        yield
    except RankFailure as failure:
        raise RankLost(str(failure)) from failure
    except RuntimeError as error:
        if group is None or isinstance(error, torch.OutOfMemoryError | TrainingStopped):
            raise
        if not _is_of_a_connection(error):
            raise
        try:
            with naming_the_missing(group, "an exchange"):
                raise CollectiveError(str(error)) from error
        except RankFailure as failure:
            raise RankLost(str(failure)) from error


def _is_of_a_connection(error: RuntimeError) -> bool:
    """Whether a backend of torch.distributed raised this, by its type or by gloo's words."""
    words = ("connection", "gloo", "nccl", "timed out", "socket")
    return isinstance(error, dist.DistError) or any(w in str(error).lower() for w in words)


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
        value = f"{choice.value:g}" if isinstance(choice.value, float) else str(choice.value)
        reporter.say(f"{choice.name:<12} {value or repr(value):<8} {choice.reason}")
    if environment.process_group is not None:
        reporter.say(f"processes    {environment.world_size:<8} torchrun says so")


class _Training:
    """A prepared run while it trains: what the loop asks for, with this process's part in it."""

    def __init__(
        self,
        chosen: Chosen,
        prepared: Prepared,
        environment: DistributedEnvironment,
        reporter: Reporter,
    ) -> None:
        self.chosen = chosen
        self.prepared = prepared
        self.environment = environment
        self.reporter = reporter
        self.autocast = arithmetic(chosen.settled.precision).autocast(environment.device.type)
        self.watch = self._watch()
        self.watch.resume(prepared.done)
        self.board = None
        if chosen.config.run.tensorboard and environment.is_main:
            self.board = TensorBoardLog(prepared.run.root / "tensorboard", prepared.done)
        self.metrics = MetricsFile(prepared.run.metrics) if environment.is_main else None
        options = chosen.config.run
        self.memory = snapshot.HostMemory(environment.device) if options.async_save else None
        self.saver = Saver(
            prepared.run.checkpoints,
            keep=options.keep,
            keep_every=options.keep_every,
            background=options.async_save,
            before=self._flush_metrics,
            after=prepared.run.note_saved,
            go_on=options.on_save_failure == "continue",
            say=reporter.say,
        )
        self.saving = SavingTime(clock_of(environment.device))

    def run(self) -> None:
        """Train to the end and say how it was; or stop when asked to, and say how to go on."""
        steps, prepared = self.chosen.settled.steps, self.prepared
        self._introduce()
        try:
            self._try_first_batch()
            if prepared.done == 0:
                self._show_the_start()
        except BaseException:
            if self.metrics is not None:
                self.metrics.close()
            raise
        backend_report(reset=True)
        self.reporter.begin(prepared.done, steps, self._ways())
        with StopRequest() as stop:
            self.saver.on_failure = stop.ask
            began = time.perf_counter()
            try:
                done = self._loop(stop).run(prepared.done, prepared.seconds)
                with self.saving.end():
                    self._wait_for_saver(last=True)
                ended = time.perf_counter()
            except KeyboardInterrupt:
                raise  # the second signal, which does not wait
            except BaseException:
                self.saver.finish()
                raise
            finally:
                self.watch.close()
                if self.board is not None:
                    self.board.close()
                self.reporter.end()
                if self.metrics is not None:
                    self.metrics.close()
        if done < steps:
            raise TrainingStopped(
                f"stopped after step {done} of {steps}, which is saved; go on with:"
                f" {self.chosen.config.command} --resume {prepared.run.root}",
                128 + (stop.signal or 15),
            )
        whole = self._whole()
        if self.environment.is_main:
            saving = {
                "saving": self.saving.summary(ended - began),
                "checkpoints_not_saved": self.saver.failed,
            }
            finish(self.chosen, whole, self.autocast, self.reporter, saving)

    def _show_the_start(self) -> None:
        """What the model can do and writes before its first step."""
        whole = self._whole()
        if self.environment.is_main:
            answer_tasks(self.chosen, whole, 0, self.autocast, self.reporter)
            finish_stories(self.chosen, whole, 0, self.autocast, self.reporter)
            self._write_sample(0, whole)

    def _try_first_batch(self) -> None:
        """Compile, and see that memory is enough; the run may get a smaller micro-batch."""
        tried = try_first_batch(
            self.chosen, self.prepared, self.environment, self.autocast, self.reporter
        )
        if tried is not self.chosen and self.environment.is_main:
            write_toml(tried.config, self.prepared.run.config, tried.reasons)
        self.chosen = tried

    def _introduce(self) -> None:
        parameters = count_parameters(self.prepared.model_config)
        epochs = self.prepared.sampler.epochs(self.chosen.settled.steps)
        self.reporter.say(
            f"model        {parameters.total / 1e6:.2f} M parameters,"
            f" {parameters.embedding / 1e6:.2f} M of them the embedding;"
            f" {machine.describe(self.environment.device)}"
        )
        root = self.prepared.run.root
        self.reporter.say(f"run          {root}, {epochs:.2g} times through the training tokens")
        self.reporter.say()

    def _loop(self, stop: StopRequest) -> TrainingLoop:
        config, settled, prepared = self.chosen.config, self.chosen.settled, self.prepared
        return TrainingLoop(
            objective=prepared.objective,
            module=prepared.trainee.module,
            optimizer=prepared.trainee.optimizer,
            scheduler=prepared.trainee.scheduler,
            guard=prepared.trainee.guard,
            sampler=prepared.sampler,
            options=LoopOptions(
                steps=settled.steps,
                micro_batch_size=settled.micro_batch_size,
                max_skipped=config.training.max_skipped,
                eval_every=settled.eval_every,
                save_every=settled.save_every,
                sample_every=config.run.sample_every,
                flops_per_token=self._flops_per_token(),
                peak_flops=machine.peak_flops(
                    self.environment.device, settled.precision, config.machine.tf32
                ),
            ),
            environment=self.environment,
            autocast=self.autocast,
            loading=LoadingOptions(
                workers=settled.workers,
                prefetch=config.data.prefetch,
                pin_memory=config.data.pin_memory,
            ),
            evaluate=self._evaluate,
            save=self._save,
            fallback=self._fallback,
            emit=self._emit,
            left_out=self._left_out,
            sample=self._sample,
            watch=self.watch,
            stop=stop,
        )

    def _flops_per_token(self) -> int:
        """Of a step: three forward passes' worth, and of DPO one of the reference."""
        flops = flops_per_token(self.prepared.model_config, self.chosen.settled.seq_len)
        config = self.chosen.config
        has_reference = config.run.objective == "dpo" and not config.dpo.precompute
        return flops * 4 // 3 if has_reference else flops

    def _ways(self) -> int:
        """Among how many ways a model that knows nothing chooses: its loss is ln of that."""
        config = self.chosen.config
        if config.run.objective != "dpo":
            return self.prepared.model_config.vocab_size
        at_start = loss_at_start(config.dpo)
        return 2 if at_start == math.log(2) else 0

    def _evaluate(self) -> Validation:
        validation = self._validate()
        wait_for_parameters(self.prepared.trainee.optimizer)
        if not math.isfinite(validation.loss):
            broken = self._broken_parameter()
            raise InputError(
                f"the validation loss is {validation.loss}; first not finite: "
                + (f"parameter {broken}" if broken else "an output of the model")
                + ": begin again with a smaller --lr, or in another --precision; "
                + self._fallback()
            )
        return validation

    def _validate(self) -> Validation:
        return validate(
            self.prepared.objective,
            self.prepared.trainee.called,
            self.prepared.validation,
            batch_size=self.chosen.settled.micro_batch_size,
            environment=self.environment,
            autocast=self.autocast,
        )

    def _check_start(self, loss: float) -> None:
        """Refuse a reference that is not where the policy begins, though it should be.

        The loss is then known before anything is computed; rounding may move it a little.
        """
        options = self.chosen.config.dpo
        moved = options.reference not in (REFERENCE_START, REFERENCE_EMA)
        expected = None if moved else loss_at_start(options)
        if self.chosen.config.run.objective != "dpo" or expected is None:
            return
        if not math.isclose(loss, expected, rel_tol=_ROUNDING):
            raise InputError(
                f"the loss before the first step is {loss:.6f}, not {expected:.6f}: the reference's"
                " log-probabilities are not those of the model that this begins with; remove the"
                " cache, or leave --precompute out"
            )

    def _emit(self, record: Record) -> None:
        if record.step == 0 and record.val_loss is not None:
            self._check_start(record.val_loss)
        if self.metrics is not None:
            self.metrics.write(record)
        if self.board is not None:
            self.board.write(record)
        if record.tokens_per_second:
            tokens = self.prepared.sampler.batch_size * self.prepared.sampler.seq_len
            self.saving.step(tokens / record.tokens_per_second, beside=self.saver.writing)
        if record.step == self.prepared.done + 1:
            self._reserve()
        self.reporter.record(record)

    def _reserve(self) -> None:
        """Have memory for checkpoints made ready, now that the optimizer has its states."""
        trainee = self.prepared.trainee
        if self.memory is None or not self.environment.is_main or is_sharded(trainee.optimizer):
            return
        snapshot.reserve(
            self.memory,
            model=trainee.model,
            optimizer=trainee.optimizer,
            reference=self.prepared.objective.tensors(),
        )

    def _watch(self) -> Watch:
        options, done = self.chosen.config.run, self.prepared.done
        wants = options.profile or options.memory_snapshot or options.grad_norms_every
        if not wants or not self.environment.is_main:
            return Watch(self.prepared.trainee.model, None)
        third, profile = done + 3, options.profiled_steps
        if profile is not None:  # of those that are still to come
            profile = max(profile[0], done + 1), min(profile[1], self.chosen.settled.steps + 1)
            if profile[0] >= profile[1]:
                self.reporter.say(
                    f"profile      none: the steps {options.profile} are done already"
                )
                profile = None
        return Watch(
            self.prepared.trainee.model,
            WatchOptions(
                folder=self.prepared.run.root,
                profile=profile,
                memory=(third, third + 2) if options.memory_snapshot else None,
                norms_every=options.grad_norms_every,
                say=self.reporter.say,
            ),
        )

    def _sample(self, step: int) -> None:
        """Draw a sample after a step; random numbers of the run are left as they are."""
        whole = self._whole()
        if self.environment.is_main:
            self._write_sample(step, whole)

    def _whole(self) -> Prepared:
        """The run with weights that a process can write with by itself. Called by all together."""
        trainee = self.prepared.trainee
        wait_for_parameters(trainee.optimizer)
        weights = whole_weights(trainee.model, trainee.optimizer)
        if not weights:  # every process has them; or this one does not write
            return self.prepared
        model = whole_model(self.prepared.model_config, weights, self.environment.device)
        model.train(trainee.model.training)
        return replace(self.prepared, trainee=replace(trainee, model=model))

    def _write_sample(self, step: int, whole: Prepared) -> None:
        if self.prepared.template is None:
            try:
                text = sample_text(self.chosen, whole, step, self.autocast)
            except FloatingPointError:  # the steps say what broke, and stop the run if need be
                text = "none, since what the model computes is not finite"
            when = "" if step else "before training: "
            self.reporter.say(f"sample       {when}{' '.join(text.split())[:160]}")

    def _left_out(self, left_out: LeftOut) -> None:
        """Say which update was not made and why; name what broke it and keep its batch."""
        if left_out.is_overflow and left_out.in_a_row < self.chosen.config.training.max_skipped:
            return  # the loss scale comes down by itself
        told = examine(left_out, self.chosen, self.prepared, self.environment, self.autocast)
        self.reporter.say(told)

    def _fallback(self) -> str:
        """The newest checkpoint, for a person whose run has gone wrong since."""

        def newest() -> str:
            self.saver.finish()
            there = checkpoint.all_checkpoints(self.prepared.run.checkpoints)
            return (
                f"the newest checkpoint from before is {there[-1]} (--init begins with its weights)"
                if there
                else "no checkpoint was saved before"
            )

        return on_first(self.environment, newest)

    def _check_weights(self, step: int) -> None:
        """Refuse to save weights that no later step can mend, in whatever process they are."""
        if broken := self._broken_parameter():
            raise InputError(
                f"step {step} is not saved: parameter {broken}; start again with a smaller --lr,"
                f" or in another --precision; {self._fallback()}"
            )

    def _broken_parameter(self) -> str | None:
        """The first one that is not finite, in whatever process. Called by all together."""
        wait_for_parameters(self.prepared.trainee.optimizer)
        mine = {str(self.environment.rank): broken_parameter(self.prepared.trainee.model)}
        return next((name for name in gather(self.environment, mine).values() if name), None)

    def _save(self, step: int, seconds: float, prune: bool) -> None:
        """Have a checkpoint written. All processes call this together; the first one writes.

        Args:
            step: Steps that are done.
            seconds: What they took.
            prune: Whether older ones may go.

        Raises:
            InputError: A weight is not finite.
        """
        with self.saving.hold():
            self._start_saving(step, seconds, prune)

    def _start_saving(self, step: int, seconds: float, prune: bool) -> None:
        self._wait_for_saver()  # its memory is taken anew
        self._check_weights(step)
        environment, prepared = self.environment, self.prepared
        trainee = prepared.trainee
        optimizer_state = whole_state(trainee.optimizer)
        copy = self.memory.copy if self.memory is not None else None
        weights = whole_weights(trainee.model, trainee.optimizer, copy)
        states = gather(environment, random_states(environment.rank, environment.device))
        rows = step * prepared.sampler.batch_size
        if environment.is_main:
            self.saver.start(
                snapshot.take(
                    step,
                    model=trainee.model,
                    optimizer=trainee.optimizer,
                    optimizer_state=optimizer_state,
                    weights=weights,
                    scheduler=trainee.scheduler,
                    random_states=states,
                    tokenizer=prepared.corpus.tokenizer.to_str(),
                    chat_template=prepared.chat_template,
                    reference=prepared.objective.tensors(),
                    facts={
                        "seconds": seconds,
                        "processes": environment.world_size,
                        "options": learned_with(self.chosen.config),
                        "rows": rows,
                        "tokens": rows * prepared.sampler.seq_len,
                        "guard": trainee.guard.state_dict(),
                    },
                    memory=self.memory,
                    fresh=is_sharded(trainee.optimizer),
                ),
                prune=prune,
            )
        if self.memory is None:
            self._wait_for_saver()

    def _wait_for_saver(self, *, last: bool = False) -> None:
        """Return, in all processes, when the checkpoint that is being written is there."""
        on_first(self.environment, lambda: self.saver.wait(last=last))

    def _flush_metrics(self) -> None:
        if self.metrics is not None:
            self.metrics.flush()
