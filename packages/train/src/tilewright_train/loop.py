"""The training loop: batches in, updates and records out, checkpoints on the way.

One step is a forward and a backward of this process's rows, the average of the gradients over all
processes, a clip by the global norm and an update; what a loss is, `objectives` says. On a GPU the
host runs one step ahead: the numbers of a step are copied to the host while the next one is being
queued, so that reporting every step costs no waiting.
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn

from tilewright_dist import DistributedDataParallel, DistributedEnvironment
from tilewright_train.batches import BatchSampler
from tilewright_train.errors import InputError
from tilewright_train.evaluation import Validation
from tilewright_train.guilty import LeftOut
from tilewright_train.loading import BatchLoader, LoadingOptions
from tilewright_train.machine import peak_memory
from tilewright_train.metrics import Record
from tilewright_train.objectives import Objective
from tilewright_train.signals import StopRequest
from tilewright_train.step_guard import Outcome, StepGuard
from tilewright_train.watching import Watch


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How long the loop runs and when it does what."""

    steps: int
    """Updates of the whole run."""
    micro_batch_size: int
    """Rows that this process computes together."""
    max_skipped: int
    """Updates in a row that may be left out."""
    eval_every: int
    """Steps between validation losses; there is one before the first step and one at the end."""
    save_every: int
    """Steps between checkpoints; there is one at the end."""
    sample_every: int | None
    """Steps between samples; None for none before the end."""
    flops_per_token: int
    """Of training."""
    peak_flops: float | None
    """Of one device; None where it is not known."""


@dataclass(frozen=True)
class _Pending:
    """A step whose numbers are still on their way to the host."""

    step: int
    lr: float
    items: int  # predictions or pairs
    waited: float  # seconds that the host waited for the batch
    # [8 + K] on the host: the outcome's five, this process's part of the loss, the loss, processes
    # that want to stop, the objective's sums
    numbers: torch.Tensor
    arrived: torch.cuda.Event | None


class TrainingLoop:
    """Runs a model from one step to the last.

    Args:
        objective: Gives the loss of a batch.
        module: What it calls, on its device, or the wrapper of that for several processes.
        optimizer: Of the model's parameters.
        scheduler: Stepped after every update.
        guard: Makes the updates, or leaves them out.
        sampler: Rows of this process.
        options: When to do what.
        environment: Of this process.
        autocast: Precision of the forward pass.
        loading: Who reads the batches.
        evaluate: Measures on validation rows; called by all processes together.
        save: Writes a checkpoint of (steps done, seconds so far, whether it may take the place of
            older ones); called by all together.
        fallback: Names the checkpoint from before updates were left out; called by all together.
        emit: Takes every record, in order.
        sample: Draws a sample after a step; called by all processes together.
        watch: Looks at steps on demand.
        left_out: Is told of every update that was not made; called by all processes together.
        stop: Tells whether somebody asked to stop.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        guard: StepGuard,
        sampler: BatchSampler,
        options: LoopOptions,
        environment: DistributedEnvironment,
        autocast: AbstractContextManager,
        loading: LoadingOptions,
        evaluate: Callable[[], Validation],
        save: Callable[[int, float, bool], None],
        fallback: Callable[[], str],
        emit: Callable[[Record], None],
        sample: Callable[[int], None],
        watch: Watch,
        left_out: Callable[[LeftOut], None],
        stop: StopRequest,
    ) -> None:
        self.objective = objective
        self.module = module
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.guard = guard
        self.sampler = sampler
        self.options = options
        self.environment = environment
        self.autocast = autocast
        self.loading = loading
        self.evaluate = evaluate
        self.save = save
        self.fallback = fallback
        self.emit = emit
        self.sample = sample
        self.watch = watch
        self.left_out = left_out
        self.stop = stop
        self._pending: deque[_Pending] = deque()
        self._stop_wanted = False
        self._in_a_row = 0  # updates left out until now
        self._clock = _StepClock(environment.device)

    def run(self, done: int, seconds: float) -> int:
        """Train until the last step, or until somebody asked to stop.

        Args:
            done: Steps that are done already.
            seconds: What they took.

        Returns:
            Steps that are done now. They are saved.

        Raises:
            InputError: Too many updates in a row were left out.
            OSError: A checkpoint or a record cannot be written.
        """
        self._began = time.perf_counter() - seconds
        saved, owed = done, False
        if done == 0:
            self.emit(self._measured(Record(step=0), self.evaluate()))
        self._parts = self.sampler.parts(self.options.micro_batch_size)
        self._batches = BatchLoader(
            self.sampler,
            range(done, self.options.steps),
            self.environment.device,
            self.loading,
            parts=self._parts,
        )
        self._clock.restart()
        while done < self.options.steps and not self._stop_wanted:
            with self.watch.step(done + 1):
                self._start_step(done)
            done += 1
            last = done == self.options.steps
            evaluates = last or done % self.options.eval_every == 0
            # Where updates are being left out, the checkpoint waits for one that is made.
            owed |= done % self.options.save_every == 0
            ahead = 1 if self.environment.device.type == "cuda" else 0
            every = self.options.sample_every
            samples = every is not None and done % every == 0 and not last
            if not (evaluates or owed or samples or last):
                self._finish_steps(keep=ahead)
                continue
            record = self._finish_steps(keep=0, hold_last=True)
            if evaluates:
                record = self._measured(record, self.evaluate())
            self.emit(record)
            if samples:
                self.sample(done)
            self._clock.restart()
            if owed and not self._in_a_row:  # the next step bears what it has to wait for
                self.save(done, self._seconds(), True)
                saved, owed = done, False
        self._batches.close()
        self._finish_steps(keep=0)
        if saved < done:
            self.save(done, self._seconds(), not self._in_a_row)
        return done

    def _start_step(self, step: int) -> None:
        """Queue everything that step number `step` does."""
        # The mean over the items of all processes and parts, whatever each of them has: gradients
        # are summed over the parts, and averaged over the processes.
        items = self.sampler.targets(step)
        losses, sums = [], []
        for part in range(self._parts):
            batch = next(self._batches)
            with self._synchronized(part == self._parts - 1):
                with self.autocast:
                    loss, of_batch = self.objective.loss(self.module, batch, items)
                loss = loss * self.environment.world_size
                self.guard.scaled(loss).backward()
            losses.append(loss.detach())
            sums.append(of_batch)
        with self.watch.range("communication"):
            if isinstance(self.module, DistributedDataParallel):
                self.module.finish_gradient_synchronization()
            own = torch.stack(losses).sum()
            shared = self._shared(own, torch.stack(sums).sum(dim=0))
        lr = float(self.optimizer.param_groups[0]["lr"])
        scale = self.guard.loss_scale.scale if self.guard.loss_scale is not None else None
        self.watch.gradients(step + 1, scale)
        with self.watch.range("optimizer"):
            outcome = self.guard.clip_and_step(shared[0])
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.updated()
        waited = self._batches.take_waited()
        numbers = self._on_the_way(torch.cat([own[None].to(shared), shared]), outcome)
        self._pending.append(_Pending(step + 1, lr, items, waited, *numbers))

    def _synchronized(self, last: bool) -> AbstractContextManager:
        """Processes exchange gradients after the last part alone."""
        if last or not isinstance(self.module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.module.no_sync()

    def _shared(self, loss: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        """[2 + K]: the mean loss, the processes that want to stop, the objective's sums."""
        group = self.environment.process_group
        wants_stop = torch.full_like(loss, float(self.stop.requested))
        shared = torch.cat([torch.stack([loss, wants_stop]), sums.to(loss)])
        if group is not None:
            dist.all_reduce(shared, group=group)
            shared[0] /= self.environment.world_size
        return shared

    def _on_the_way(
        self, shared: torch.Tensor, outcome: Outcome
    ) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Start copying a step's numbers to the host."""
        numbers = torch.cat([torch.stack([number.to(shared) for number in outcome]), shared])
        if numbers.device.type == "cpu":
            return numbers, None
        on_host = numbers.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event(enable_timing=True)
        arrived.record()
        return on_host, arrived

    def _finish_steps(self, *, keep: int, hold_last: bool = False) -> Record:
        """Wait for all pending steps but `keep` and emit their records; the last one may be held.

        Returns:
            The last record that was waited for.
        """
        record = Record(step=0)
        while len(self._pending) > keep:
            record = self._finish_step(self._pending.popleft())
            if not (hold_last and not self._pending):
                self.emit(record)
        return record

    def _finish_step(self, pending: _Pending) -> Record:
        if pending.arrived is not None:
            pending.arrived.synchronize()
        *outcome, own, loss, wants_stop = pending.numbers[:8].tolist()
        sums = pending.numbers[8:].tolist()
        norm, skipped, in_a_row, in_all, scale = outcome
        self._stop_wanted |= wants_stop > 0
        self._in_a_row = int(in_a_row)
        if skipped:
            why = "spike" if skipped > 1 else "not finite"
            self.left_out(
                LeftOut(pending.step, why, loss, norm, pending.lr, int(in_a_row), scale, own)
            )
        if in_a_row >= self.options.max_skipped:
            raise InputError(
                f"{int(in_a_row)} updates in a row were left out, the last at step {pending.step}"
                f" with loss {loss:.4g} and gradient norm {norm:.4g}: start again with a smaller"
                f" --lr (it was {pending.lr:.2e}) or a longer --warmup-steps, or allow more with"
                f" --max-skipped; {self.fallback()}"
            )
        a_step = self.sampler.batch_size * self.sampler.seq_len
        rate = a_step / self._clock.lap(pending.arrived)
        peak = self.options.peak_flops
        flops = rate * self.options.flops_per_token / self.environment.world_size
        return Record(
            step=pending.step,
            loss=loss if math.isfinite(loss) else None,
            lr=pending.lr,
            grad_norm=norm if math.isfinite(norm) else None,
            skipped_steps=int(in_all),
            loss_scale=scale if self.guard.loss_scale is not None else None,
            tokens=pending.step * a_step,
            tokens_per_second=rate,
            data_seconds=pending.waited,
            mfu=flops / peak if peak is not None else None,
            peak_memory_bytes=peak_memory(self.environment.device),
            time=self._seconds(),
            metrics=self.objective.means(sums, pending.items) if math.isfinite(loss) else {},
        )

    def _measured(self, record: Record, validation: Validation) -> Record:
        memory = peak_memory(self.environment.device)
        own = {f"val_{name}": value for name, value in validation.metrics.items()}
        return replace(
            record,
            val_loss=validation.loss,
            peak_memory_bytes=memory,
            time=self._seconds(),
            metrics={**record.metrics, **own},
        )

    def _seconds(self) -> float:
        """Seconds of the run so far, those before a resume included."""
        return time.perf_counter() - self._began


class _StepClock:
    """Seconds from the end of one step to the end of the next.

    On a GPU from its own events: the host reads the numbers of two steps at once now and then, so
    its clock would give one of them no time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        """The next step begins now, after a measurement; or waits for a checkpoint first."""
        self._since = time.perf_counter()
        if self._device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def lap(self, arrived: torch.cuda.Event | None) -> float:
        """Seconds that the step took whose numbers have arrived."""
        if arrived is not None:
            seconds = self._event.elapsed_time(arrived) / 1000
            self._event = arrived
            return seconds
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds
