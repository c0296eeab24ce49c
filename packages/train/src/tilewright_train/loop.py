"""The training loop: batches in, updates and records out, checkpoints on the way.

One step is a forward and a backward of this process's rows, the average of the gradients over all
processes, a clip by the global norm and an update. On a GPU the host runs one step ahead: the
numbers of a step are copied to the host while the next one is being queued, so that reporting
every step costs no waiting.
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
from tilewright_train.loading import BatchLoader, LoadingOptions
from tilewright_train.machine import peak_memory
from tilewright_train.metrics import Record
from tilewright_train.replicas import clip_and_step
from tilewright_train.signals import StopRequest


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How long the loop runs and when it does what."""

    steps: int
    """Updates of the whole run."""
    micro_batch_size: int
    """Rows that this process computes together."""
    max_grad_norm: float
    """Gradients with a larger global norm are scaled down to it."""
    eval_every: int
    """Steps between validation losses; there is one before the first step and one at the end."""
    save_every: int
    """Steps between checkpoints; there is one at the end."""
    flops_per_token: int
    """Of training."""
    peak_flops: float | None
    """Of one device; None where it is not known."""


@dataclass(frozen=True)
class _Pending:
    """A step whose numbers are still on their way to the host."""

    step: int
    lr: float
    waited: float  # seconds that the host waited for the batch
    numbers: torch.Tensor  # [3] on the host: loss, gradient norm, processes that want to stop
    arrived: torch.cuda.Event | None


class TrainingLoop:
    """Runs a model from one step to the last.

    Args:
        module: What is called: the model on its device, or its wrapper for several processes.
        optimizer: Of the model's parameters.
        scheduler: Stepped after every update.
        sampler: Rows of this process.
        options: When to do what.
        environment: Of this process.
        autocast: Precision of the forward pass.
        loading: Who reads the batches.
        evaluate: Gives the validation loss; called by all processes together.
        save: Writes a checkpoint of (steps done, seconds so far); called by all together.
        emit: Takes every record, in order.
        stop: Tells whether somebody asked to stop.
    """

    def __init__(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        sampler: BatchSampler,
        options: LoopOptions,
        environment: DistributedEnvironment,
        autocast: AbstractContextManager,
        loading: LoadingOptions,
        evaluate: Callable[[], float],
        save: Callable[[int, float], None],
        emit: Callable[[Record], None],
        stop: StopRequest,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.sampler = sampler
        self.options = options
        self.environment = environment
        self.autocast = autocast
        self.loading = loading
        self.evaluate = evaluate
        self.save = save
        self.emit = emit
        self.stop = stop
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._pending: deque[_Pending] = deque()
        self._stop_wanted = False
        self._clock = _StepClock(environment.device)

    def run(self, done: int, seconds: float) -> int:
        """Train until the last step, or until somebody asked to stop.

        Args:
            done: Steps that are done already.
            seconds: What they took.

        Returns:
            Steps that are done now. They are saved.

        Raises:
            InputError: The loss is no longer finite.
            OSError: A checkpoint or a record cannot be written.
        """
        self._began = time.perf_counter() - seconds
        saved = done
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
            self._start_step(done)
            done += 1
            last = done == self.options.steps
            evaluates = last or done % self.options.eval_every == 0
            saves = last or done % self.options.save_every == 0
            ahead = 1 if self.environment.device.type == "cuda" else 0
            if not (evaluates or saves):
                self._finish_steps(keep=ahead)
                continue
            record = self._finish_steps(keep=0, hold_last=True)
            if evaluates:
                record = self._measured(record, self.evaluate())
            self.emit(record)
            if saves:
                self.save(done, self._seconds())
                saved = done
            self._clock.restart()
        self._batches.close()
        self._finish_steps(keep=0)
        if saved < done:
            self.save(done, self._seconds())
        return done

    def _start_step(self, step: int) -> None:
        """Queue everything that step number `step` does."""
        # The mean over the predictions of all processes and parts, whatever each of them has:
        # gradients are summed over the parts, and averaged over the processes.
        predictions = self.sampler.targets(step)
        losses = []
        for part in range(self._parts):
            batch = next(self._batches)
            with self._synchronized(part == self._parts - 1):
                with self.autocast:
                    loss = self.module(**batch.inputs, num_items=predictions).loss
                loss = loss * self.environment.world_size
                loss.backward()
            losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        lr = float(self.optimizer.param_groups[0]["lr"])
        norm = clip_and_step(self.optimizer, self.parameters, self.options.max_grad_norm)
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        waited = self._batches.take_waited()
        self._pending.append(self._read_later(step + 1, lr, loss, norm, waited))

    def _synchronized(self, last: bool) -> AbstractContextManager:
        """Processes exchange gradients after the last part alone."""
        if last or not isinstance(self.module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.module.no_sync()

    def _read_later(
        self, step: int, lr: float, loss: torch.Tensor, norm: torch.Tensor, waited: float
    ) -> _Pending:
        """Start copying a step's numbers to the host."""
        group = self.environment.process_group
        wants_stop = torch.full_like(loss, float(self.stop.requested))
        shared = torch.stack([loss, wants_stop])
        if group is not None:
            dist.all_reduce(shared, group=group)
            shared[0] /= self.environment.world_size
        numbers = torch.stack([shared[0], norm.to(shared), shared[1]])
        if numbers.device.type == "cpu":
            return _Pending(step, lr, waited, numbers, None)
        on_host = numbers.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event(enable_timing=True)
        arrived.record()
        return _Pending(step, lr, waited, on_host, arrived)

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
        loss, norm, wants_stop = pending.numbers.tolist()
        self._stop_wanted |= wants_stop > 0
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InputError(
                f"the loss is {loss} and the gradient norm {norm} at step {pending.step}: start"
                f" again with a smaller --lr (it was {pending.lr:.2e}) or a longer --warmup-steps"
            )
        a_step = self.sampler.batch_size * self.sampler.seq_len
        rate = a_step / self._clock.lap(pending.arrived)
        peak = self.options.peak_flops
        flops = rate * self.options.flops_per_token / self.environment.world_size
        return Record(
            step=pending.step,
            loss=loss,
            lr=pending.lr,
            grad_norm=norm,
            tokens=pending.step * a_step,
            tokens_per_second=rate,
            data_seconds=pending.waited,
            mfu=flops / peak if peak is not None else None,
            peak_memory_bytes=peak_memory(self.environment.device),
            time=self._seconds(),
        )

    def _measured(self, record: Record, val_loss: float) -> Record:
        memory = peak_memory(self.environment.device)
        return replace(record, val_loss=val_loss, peak_memory_bytes=memory, time=self._seconds())

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
        """The next step begins now, after a measurement or a checkpoint."""
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
