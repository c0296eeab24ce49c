"""Times and memory of setups, measured in turn in one process group.

All setups of a part are alive together, each with its own replica, and are timed round by round, so
that a change of clocks meets all of them. A round's time is the slowest rank's. What a setup holds
is what its replica added to the device's memory, after a step and zero_grad.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from tilewright_bench.parallel.decoder import Decoder, Size
from tilewright_bench.parallel.setups import Setup
from tilewright_dist import DistributedDataParallel, ShardedOptimizer

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How much is measured."""

    warmup: int = 3
    """Steps before the first round: compilation, and the buckets' last order."""
    rounds: int = 3
    """Of each setup."""
    steps: int = 4
    """Of a round."""


@dataclass(kw_only=True)
class Trained:
    """A setup at work."""

    setup: Setup
    module: nn.Module
    optimizer: torch.optim.Optimizer
    batch: tuple[torch.Tensor, torch.Tensor]
    held_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)
    update_seconds: list[float] = field(default_factory=list)
    loss: float = 0.0

    def backward(self) -> None:
        """Forward and backward."""
        tokens, targets = self.batch
        device = tokens.device.type
        # On CPUs float32: bfloat16 is slow there, and nothing is measured.
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = self.module(tokens, targets)
        loss.backward()
        self._loss = loss.detach()

    def update(self) -> None:
        """The optimizer's part."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # What the optimizer does not update has gradients as well.
        self.module.zero_grad(set_to_none=True)

    def step(self) -> None:
        """All of it."""
        self.backward()
        self.update()

    def last_loss(self) -> float:
        """Of the last step; waits for the device."""
        return self._loss.item()

    def drop(self) -> None:
        """Free all of it, at the same time on all ranks."""
        del self.module, self.optimizer, self.batch


@dataclass(kw_only=True)
class Progress:
    """What a part has come to."""

    running: list[Trained] = field(default_factory=list)
    """Setups at work."""
    errors: dict[str, str] = field(default_factory=dict)
    """Of those that do not work, by name."""
    is_over: bool = False
    """Whether all rounds are done, and those at work can be looked at."""


class Ladder:
    """Measures parts.

    Args:
        size: Of the decoder.
        group: The ranks.
        device: Of this rank.
        schedule: How much is measured.
        say: Prints, on the first rank.
    """

    def __init__(
        self,
        size: Size,
        group: dist.ProcessGroup,
        device: torch.device,
        schedule: Schedule,
        say: Say,
    ) -> None:
        self.size, self.group, self.device = size, group, device
        self.schedule, self.say = schedule, say

    def measure(
        self, setups: Iterable[Setup], *, compile_blocks: bool, rounds: int | None = None
    ) -> Iterator[Progress]:
        """Time setups in turn; yields after every round, so that what is there can be saved.

        Those that copy between GPUs start after a first round of the others: should they hang,
        that is kept.
        """
        rounds = self.schedule.rounds if rounds is None else rounds
        progress = Progress()
        setups = sorted(setups, key=lambda setup: setup.transport == "copy")
        for transport, group in itertools.groupby(setups, lambda setup: setup.transport):
            for setup in group:
                trained = self._start(setup, compile_blocks, progress.errors)
                if trained is not None:
                    progress.running.append(trained)
            if rounds and transport != "copy":
                self._time_all(progress.running)
                yield progress
        for _ in range(rounds - 1):
            self._time_all(progress.running)
            yield progress
        for trained in progress.running if rounds else ():
            trained.update_seconds = self._updates(trained)
        progress.is_over = True
        try:
            yield progress
        finally:
            for trained in progress.running:
                trained.drop()
            progress.running.clear()
            gc.collect()
            self._empty()

    def phases(self, trained: Trained, steps: int = 6) -> dict[str, float]:
        """Seconds of forward, backward and the optimizer, medians on this rank's device."""
        if self.device.type != "cuda":
            return {}
        found: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}
        for _ in range(steps):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
            tokens, targets = trained.batch
            events[0].record()
            with torch.autocast("cuda", torch.bfloat16):
                loss = trained.module(tokens, targets)
            events[1].record()
            loss.backward()
            events[2].record()
            trained.update()
            events[3].record()
            torch.cuda.synchronize(self.device)
            for name, begin, end in zip(found, events, events[1:], strict=False):
                found[name].append(begin.elapsed_time(end) / 1e3)
        return {name: statistics.median(seconds) for name, seconds in found.items()}

    def from_rest(self, trained: Trained, steps: int = 2) -> dict[str, dict[str, float]]:
        """Seconds of forward, backward and update on the host and on the device, which begin them
        at rest: how far the host is ahead of the device, and what it takes itself.
        """
        if self.device.type != "cuda":
            return {}
        names = ("forward", "backward", "update")
        found = {name: {"host": [], "device": []} for name in names}
        for _ in range(steps):
            self._meet()
            marks = [(time.perf_counter(), self._mark())]
            tokens, targets = trained.batch
            with torch.autocast("cuda", torch.bfloat16):
                loss = trained.module(tokens, targets)
            marks.append((time.perf_counter(), self._mark()))
            loss.backward()
            marks.append((time.perf_counter(), self._mark()))
            trained.update()
            marks.append((time.perf_counter(), self._mark()))
            self._wait()
            for name, (began, begin), (ended, end) in zip(names, marks, marks[1:], strict=False):
                found[name]["host"].append(ended - began)
                found[name]["device"].append(_seconds_between(begin, end))
        return {
            name: {side: statistics.median(values) for side, values in sides.items()}
            for name, sides in found.items()
        }

    def _start(self, setup: Setup, compile_blocks: bool, errors: dict[str, str]) -> Trained | None:
        """Build a setup and warm it up; None, on all ranks, where one of them fails."""
        self._empty()
        began = time.perf_counter()
        before = self._allocated()
        trained, message = None, ""
        try:
            trained = self._built(setup, compile_blocks)
            for _ in range(self.schedule.warmup):
                trained.step()
            trained.loss = trained.last_loss()
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        messages: list[str | None] = [None] * self.group.size()
        dist.all_gather_object(messages, message, group=self.group)
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(messages) if text]
        if failed or trained is None:
            errors[setup.name] = "; ".join(failed)
            self.say(f"  {setup.name}: {errors[setup.name]}")
            return None
        _settle(trained)
        gc.collect()
        trained.held_bytes = self._allocated() - before + _shared_bytes(trained)
        held = trained.held_bytes / 2**30
        seconds = time.perf_counter() - began
        self.say(f"  {setup.name}: holds {held:.2f} GiB, ready in {seconds:.1f} s")
        return trained

    def _built(self, setup: Setup, compile_blocks: bool) -> Trained:
        torch.manual_seed(0)
        with torch.device(self.device):
            module = Decoder(self.size)
            generator = torch.Generator(self.device).manual_seed(self.group.rank())
            shape = (2, self.size.batch, self.size.tokens)
            tokens, targets = torch.randint(self.size.vocabulary, shape, generator=generator)
        if compile_blocks:
            # Compiled code is the same on a CPU, where only that it runs is of interest.
            backend = "inductor" if self.device.type == "cuda" else "aot_eager"
            for block in module.blocks:
                block.compile(fullgraph=True, dynamic=False, backend=backend)
        wrapped, optimizer = setup.make(module)
        return Trained(setup=setup, module=wrapped, optimizer=optimizer, batch=(tokens, targets))

    def _time_all(self, running: Iterable[Trained]) -> None:
        for trained in running:
            self._round(trained)

    def _round(self, trained: Trained) -> None:
        trained.step()  # the caches are another setup's
        self._meet()
        began = time.perf_counter()
        for _ in range(self.schedule.steps):
            trained.step()
        host = time.perf_counter() - began
        _settle(trained)
        self._wait()
        seconds = time.perf_counter() - began
        trained.seconds.append(self._slowest(seconds / self.schedule.steps))
        trained.host_seconds.append(host / self.schedule.steps)

    def _updates(self, trained: Trained) -> list[float]:
        """Seconds from the end of backward until the next forward may begin, in running steps.

        What is gathered beside that forward is not in them, nor is the host, which is ahead.
        """
        self._meet()
        spans = []
        for _ in range(4):
            trained.backward()
            begin = self._mark()
            trained.update()
            spans.append((begin, self._mark()))
        _settle(trained)
        self._wait()
        return [self._slowest(_seconds_between(begin, end)) for begin, end in spans[1:]]

    def _mark(self) -> torch.cuda.Event | float:
        """Now, on the device's clock where there is one."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _meet(self) -> None:
        self._wait()
        dist.barrier(group=self.group)
        self._wait()

    def _slowest(self, seconds: float) -> float:
        value = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return value.item()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _empty(self) -> None:
        self._wait()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0


def _seconds_between(begin: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return begin.elapsed_time(end) / 1e3
    assert isinstance(end, float)
    return end - begin


def _settle(trained: Trained) -> None:
    """Let what the last step sends arrive: the next forward would wait for it."""
    if isinstance(trained.optimizer, ShardedOptimizer):
        trained.optimizer.wait_for_parameters()


def _shared_bytes(trained: Trained) -> int:
    """Memory that other ranks read, which torch's allocator does not count."""
    total = 0
    if isinstance(trained.module, DistributedDataParallel):
        total += getattr(trained.module.reducer, "shared_bytes", 0)
    if isinstance(trained.optimizer, ShardedOptimizer):
        total += trained.optimizer.shared_bytes
    return total
