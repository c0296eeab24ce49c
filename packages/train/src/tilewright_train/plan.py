"""What a run will need, joined from closed forms: memory by kind, operations, speed, what fits.

tilewright_model gives one replica's arithmetic and tilewright_dist that of several GPUs. Nothing is
built and no GPU is touched. `train-plan` prints it; a run takes its micro-batch from it, and an
out-of-memory error its explanation.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tilewright_model import ModelConfig, count_parameters, flops_per_token
from tilewright_train.config import Parallel
from tilewright_train.hardware import Accelerator
from tilewright_train.memory_plan import (
    MARGIN,
    MemoryPlan,
    StepShape,
    largest_micro_batch,
    plan_memory,
)
from tilewright_train.progress import format_seconds
from tilewright_train.step_time import StepTime, predict_step

_GIB = 2**30

_MEANING = {
    "weights": "parameters",
    "optimizer": "its states, and masters",
    "gradients": "those that are there at that moment",
    "casts": "weights in the dtype of products, kept for backward",
    "activations": "what blocks keep for backward",
    "logits": "a chunk of them, and the loss's gradients",
    "workspace": "of the block or the update under way",
    "gathered": "embedding and head, a block and the next, whole; gradients on their way",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run on so many equal GPUs."""

    config: ModelConfig
    """The model."""
    step: StepShape
    """What each process computes."""
    memory: MemoryPlan
    """Of one GPU, at the highest moment of a step."""
    gpu: Accelerator | None
    """Where it would run; None where nothing is known about that."""
    largest: tuple[int, MemoryPlan] | None
    """The most rows that fit at a time, and their plan; None where none do, or no GPU is known."""
    time: StepTime | None
    """Of a step, where the GPU is known."""

    @property
    def tokens_a_step(self) -> int:
        """All GPUs together."""
        step = self.step
        return step.tokens * step.parts * step.world_size

    @property
    def tokens_per_second(self) -> float | None:
        """All GPUs together."""
        return None if self.time is None else self.tokens_a_step / self.time.step

    @property
    def fits(self) -> bool:
        """Whether the memory of the GPU holds it, with the margin left."""
        return self.gpu is None or self.memory.total <= (1 - MARGIN) * self.gpu.memory


def make_plan(
    config: ModelConfig, step: StepShape, gpu: Accelerator | None, *, tf32: bool = False
) -> Plan:
    """A plan of one run.

    Args:
        config: Of the model.
        step: What each process computes.
        gpu: What computes it.
        tf32: Whether float32 products take the tensor cores.

    Raises:
        ValueError: Sizes that do not fit the model.
    """
    memory = plan_memory(config, step)
    largest = time = None
    if gpu is not None:
        # Beyond what a step of this run has: what the GPU could hold.
        largest = _most_rows(config, step, gpu)
        time = predict_step(config, step, memory, gpu, tf32=tf32)
    return Plan(config=config, step=step, memory=memory, gpu=gpu, largest=largest, time=time)


def on_several(plan: Plan, counts: Sequence[int], *, tf32: bool = False) -> Iterator[Plan]:
    """The same run with its batch divided among other numbers of GPUs, in all schemes it can take.

    Numbers that do not divide the batch are left out.
    """
    rows = plan.step.rows * plan.step.parts * plan.step.world_size
    for count in counts:
        for parallel in _schemes(plan.step) if count > 1 else ("ddp",):
            if rows % count or plan.gpu is None:
                continue
            step = dataclasses.replace(
                plan.step, rows=rows // count, parts=1, parallel=parallel, world_size=count
            )
            found = largest_micro_batch(plan.config, step, plan.gpu.memory, rows // count)
            together = found[0] if found else 1
            step = dataclasses.replace(step, rows=together, parts=rows // count // together)
            yield make_plan(plan.config, step, plan.gpu, tf32=tf32)


def _schemes(step: StepShape) -> tuple[Parallel, ...]:
    """Ways to divide it, each into more than the one before; Muon needs whole matrices."""
    return ("ddp", "zero1") if step.optim == "muon" else ("ddp", "zero1", "fsdp")


def ways_to_fit(plan: Plan) -> list[tuple[str, MemoryPlan]]:
    """Flags with which the step needs less memory than it does, those that cost least first.

    Where the GPU is known only those with which it fits.
    """
    step = plan.step
    rows, tried = step.rows * step.parts, []
    changes: list[tuple[str, dict[str, Any]]] = []
    for together in (n for n in range(step.rows - 1, 0, -1) if rows % n == 0):
        changes.append(
            (f"--micro-batch-size {together}", {"rows": together, "parts": rows // together})
        )
    if step.precision in ("fp32", "fp16"):
        changes.append(("--precision bf16", {"precision": "bf16"}))
    if step.world_size > 1:
        schemes = _schemes(step)
        for parallel in schemes[schemes.index(step.parallel) + 1 :]:
            changes.append((f"--parallel {parallel}", {"parallel": parallel}))
    for mode in {"none": ("selective", "full"), "selective": ("full",)}.get(step.recompute, ()):
        changes.append((f"--recompute {mode}", {"recompute": mode}))
    if step.precision == "bf16":
        changes.append(("--precision bf16-weights", {"precision": "bf16-weights"}))
    if step.recompute != "full":
        least = {"rows": 1, "parts": rows, "recompute": "full"}
        changes.append(("--micro-batch-size 1 --recompute full", least))
    for flags, change in changes:
        memory = plan_memory(plan.config, dataclasses.replace(step, **change))
        room = plan.memory.total if plan.gpu is None else (1 - MARGIN) * plan.gpu.memory
        if memory.total < min(room, plan.memory.total):
            tried.append((flags, memory))
    # Of the smaller micro-batches the largest that fits is enough.
    smaller = [way for way in tried if way[0].split()[::2] == ["--micro-batch-size"]]
    return [*smaller[:1], *(way for way in tried if way not in smaller)]


def breakdown(memory: MemoryPlan) -> str:
    """Bytes by kind in one line, the largest first, for errors."""
    kinds = sorted(memory.kinds.items(), key=lambda kind: -kind[1])
    return ", ".join(f"{name} {gib(size)}" for name, size in kinds if size)


def gib(size: float) -> str:
    """Bytes for a person."""
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 100 else f"{size / 2**20:.2f} MiB"


def plan_lines(plan: Plan, name: str, steps: int) -> Iterator[str]:
    """The plan for a person.

    Args:
        plan: What to say.
        name: Of the model.
        steps: Of the run.
    """
    config, step, memory = plan.config, plan.step, plan.memory
    count = count_parameters(config)
    flops = flops_per_token(config, step.seq_len)
    active = "" if count.active == count.total else f", {count.active / 1e6:.1f} M of them active"
    yield (
        f"model        {name}: {count.total / 1e6:.1f} M parameters{active};"
        f" {flops / 1e9:.3g} GFLOP a token to train, at {step.seq_len} tokens"
    )
    whose = "" if step.world_size == 1 else f" on each of {step.world_size} GPUs ({step.parallel})"
    yield (
        f"step         {plan.tokens_a_step:,} tokens, {plan.tokens_a_step * flops / 1e12:.3g}"
        f" TFLOP: {step.parts} x {step.rows} rows of {step.seq_len}{whose},"
        f" {step.precision}, {step.optim}, recompute {step.recompute}"
    )
    gpu = plan.gpu
    of = "" if gpu is None else f" of {gib(gpu.memory)}, {gpu.name}"
    yield f"memory       {gib(memory.total)}{of}; highest in the {memory.moment}:"
    for kind, size in memory.kinds.items():
        if size:
            yield f"  {kind:<11}{gib(size):>12}  {_MEANING[kind]}"
    if gpu is None:
        yield "speed        not predicted: name a GPU with --gpu"
        return
    if plan.largest is None:
        yield "fits         not a single row at a time"
    else:
        rows, least = plan.largest
        yield (
            f"fits         at most {rows} rows of {step.seq_len} at a time:"
            f" {gib(least.total)}, and {MARGIN:.0%} left for what is not counted"
        )
    if not plan.fits:
        yield "             it does not fit; it would with"
        for flags, less in ways_to_fit(plan):
            yield f"  {flags:<40}{gib(less.total):>12}"
    assert plan.time is not None
    assert plan.tokens_per_second is not None
    share = plan.tokens_per_second / step.world_size * flops / gpu.peak(step.precision, True)
    yield (
        f"speed        about {plan.tokens_per_second:,.0f} tokens/s, {share:.0%} of the peak;"
        f" {plan.time.step * 1e3:.0f} ms a step, {format_seconds(steps * plan.time.step)} for"
        f" {steps} steps"
    )


def several_lines(plans: Sequence[Plan]) -> Iterator[str]:
    """Plans for several GPUs as a table."""
    yield (
        f"{'GPUs':>5}{'scheme':>8}{'rows':>10}{'memory':>12}{'step':>11}{'tokens/s':>13}"
        f"{'exposed':>11}"
    )
    for plan in plans:
        step, time = plan.step, plan.time
        assert time is not None
        assert plan.tokens_per_second is not None
        rows = f"{step.parts} x {step.rows}"
        yield (
            f"{step.world_size:>5}{step.parallel if step.world_size > 1 else '-':>8}{rows:>10}"
            f"{plan.memory.total / _GIB:>8.2f} GiB{time.step * 1e3:>8.0f} ms"
            f"{plan.tokens_per_second:>13,.0f}{time.exposed * 1e3:>8.1f} ms"
            f"{'' if plan.fits else '  does not fit'}"
        )


def _most_rows(
    config: ModelConfig, step: StepShape, gpu: Accelerator
) -> tuple[int, MemoryPlan] | None:
    """The most rows in one part, by halving: memory grows with them."""

    def planned(rows: int) -> MemoryPlan:
        return plan_memory(config, dataclasses.replace(step, rows=rows))

    room, low, high = (1 - MARGIN) * gpu.memory, 0, 1
    while high <= 1 << 20 and planned(high).total <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if planned(middle).total <= room else (low, middle)
    return (low, planned(low)) if low else None
