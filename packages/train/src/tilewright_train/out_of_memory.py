"""An out-of-memory error, explained: what the plan says is where, and the flags that would fit."""

import contextlib
from collections.abc import Iterator

import torch

from tilewright_train.automatic import Chosen, model_config
from tilewright_train.errors import InputError
from tilewright_train.hardware import accelerator_here
from tilewright_train.plan import breakdown, gib, make_plan, ways_to_fit

_WAYS = 4


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused.

    A GPU's allocator raises torch.OutOfMemoryError and Python's MemoryError, but the CPU allocator
    of torch a plain RuntimeError.
    """
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def explained(chosen: Chosen, world_size: int) -> Iterator[None]:
    """Turn an error for want of memory into one that says what to make smaller.

    Raises:
        InputError: The model, its state or a step does not fit.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(explanation(chosen, world_size, str(error))) from error


def explanation(chosen: Chosen, world_size: int, reason: str = "") -> str:
    """What does not fit and what would.

    Args:
        chosen: The options.
        world_size: Processes.
        reason: The allocator's own words.
    """
    settled, device = chosen.settled, torch.device(chosen.settled.device)
    step = chosen.step_shape(world_size)
    plan = make_plan(model_config(chosen), step, accelerator_here(device))
    room = f" of {gib(plan.gpu.memory)}" if plan.gpu else ""
    held = ""
    if device.type == "cuda":
        held = (
            f"; {gib(torch.cuda.max_memory_allocated(device))} were allocated at most,"
            f" {gib(torch.cuda.max_memory_reserved(device))} reserved"
        )
    ways = [f"{flags} ({gib(memory.total)})" for flags, memory in ways_to_fit(plan)[:_WAYS]]
    smaller = "start again with " + (
        " or ".join(ways) if ways else "another --preset or a smaller --seq-len"
    )
    words = f" ({' '.join(reason.split())})" if reason else ""
    return (
        f"out of memory with {step.rows} of {settled.batch_size} rows at a time and seq_len"
        f" {settled.seq_len}{words}{held}; by the plan a step takes {gib(plan.memory.total)}{room}"
        f" ({breakdown(plan.memory)}): {smaller}"
    )
