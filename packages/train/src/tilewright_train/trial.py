"""The first batch, tried before the loop: kernels compile, and memory is seen to be enough.

A forward and a backward without an update: nothing of the run changes, not even its random
numbers. A micro-batch that the plan chose is halved until it fits; one that was asked for is an
error with what would fit.
"""

import dataclasses
import gc
import time
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from tilewright_dist import DistributedEnvironment
from tilewright_train.automatic import Chosen
from tilewright_train.config import with_options
from tilewright_train.errors import InputError
from tilewright_train.memory_plan import StepShape, plan_memory
from tilewright_train.out_of_memory import explanation, is_out_of_memory
from tilewright_train.plan import gib
from tilewright_train.preparation import Prepared
from tilewright_train.progress import Reporter, format_seconds
from tilewright_train.replicas import is_fully_sharded


def try_first_batch(
    chosen: Chosen,
    prepared: Prepared,
    environment: DistributedEnvironment,
    autocast: AbstractContextManager,
    reporter: Reporter,
) -> Chosen:
    """The options with a micro-batch that fits, which are those that were given if it did.

    Args:
        chosen: The options.
        prepared: The run; its next step's first batch is tried.
        environment: Of this process; all call this together.
        autocast: Precision of the forward pass.
        reporter: Says what a step takes.

    Raises:
        InputError: It does not fit.
    """
    rows = prepared.sampler.batch_size // environment.world_size
    together = min(chosen.settled.micro_batch_size, rows)
    may_change = "micro_batch_size" in chosen.reasons
    while True:
        begin = time.perf_counter()
        needed, problem = _try(together, chosen, prepared, environment, autocast)
        room = _room(environment.device)
        fits = problem is None and (room is None or needed <= room)
        cut_off = problem is not None and is_fully_sharded(prepared.trainee.module)
        if not cut_off and _all(fits, environment):
            ranks = environment.world_size if is_fully_sharded(prepared.trainee.module) else 1
            step = dataclasses.replace(chosen.step_shape(ranks), rows=together)
            _say(step, needed, time.perf_counter() - begin, prepared, reporter)
            return _with_rows(chosen, together)
        smaller = max((n for n in range(1, together) if rows % n == 0), default=None)
        # The others of a cut off pass wait for this process's part of it.
        if cut_off or not may_change or smaller is None:
            chosen = _with_rows(chosen, together)
            raise InputError(explanation(chosen, environment.world_size, problem or ""))
        reporter.say(f"trial        {together} rows at a time do not fit: {smaller}")
        together = smaller


def _try(
    together: int,
    chosen: Chosen,
    prepared: Prepared,
    environment: DistributedEnvironment,
    autocast: AbstractContextManager,
) -> tuple[int, str | None]:
    """Bytes that a step will need, and what refused them."""
    device, trainee, sampler = environment.device, prepared.trainee, prepared.sampler
    parts = max(1, sampler.batch_size // environment.world_size // together)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    problem = None
    parameters = [p for p in trainee.model.parameters() if p.requires_grad]
    loss = gradients = None
    with torch.random.fork_rng([device] if on_gpu else []):
        try:
            batch = sampler.batch(prepared.done, 0, parts).to(device)
            with autocast:
                items = sampler.targets(prepared.done)
                loss, _ = prepared.objective.loss(trainee.called, batch, items)
            loss = trainee.guard.scaled(loss)
            if is_fully_sharded(trainee.module):  # its parameters are not those of the graph
                loss.backward()
                trainee.optimizer.zero_grad(set_to_none=True)
            else:
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            if on_gpu:
                torch.cuda.synchronize(device)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            problem = str(error)
    del loss, gradients
    peak = 0
    if on_gpu:
        gc.collect()
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()
        if not trainee.optimizer.state:  # the first update makes them
            peak += plan_memory(
                prepared.model_config, chosen.step_shape(environment.world_size)
            ).optimizer
    return peak, problem


def _room(device: torch.device) -> int | None:
    """Bytes that the process can allocate on a GPU; None for a CPU, which swaps."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def _all(fits: bool, environment: DistributedEnvironment) -> bool:
    if environment.process_group is None:
        return fits
    everyone = torch.tensor(int(fits), device=environment.device)
    dist.all_reduce(everyone, dist.ReduceOp.MIN, group=environment.process_group)
    return bool(everyone)


def _say(
    step: StepShape,
    needed: int,
    seconds: float,
    prepared: Prepared,
    reporter: Reporter,
) -> None:
    memory = ""
    if needed:
        memory = (
            f", {gib(needed)} at the highest ({gib(plan_memory(prepared.model_config, step).total)}"
            " by the plan)"
        )
    reporter.say(
        f"trial        {step.rows} rows at a time: forward and backward in"
        f" {format_seconds(seconds) if seconds >= 60 else f'{seconds:.1f} s'}{memory}"
    )


def _with_rows(chosen: Chosen, rows: int) -> Chosen:
    if rows == chosen.settled.micro_batch_size:
        return chosen
    return dataclasses.replace(
        chosen,
        config=with_options(chosen.config, micro_batch_size=rows),
        settled=dataclasses.replace(chosen.settled, micro_batch_size=rows),
        choices=tuple(
            dataclasses.replace(choice, value=rows, reason="the most that fit when tried")
            if choice.name == "micro_batch_size"
            else choice
            for choice in chosen.choices
        ),
    )
