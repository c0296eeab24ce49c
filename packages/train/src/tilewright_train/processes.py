"""What one process of a run does for all of them.

The first process reads the corpus and writes the run; the others wait. If it fails, they learn why
and fail too, so that none is left waiting.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from tilewright_dist import DistributedEnvironment
from tilewright_train.errors import InputError, one_line

T = TypeVar("T")


def local_processes() -> int:
    """Processes of this run on this host, as torchrun says; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def on_first(environment: DistributedEnvironment, action: Callable[[], T]) -> T:
    """Run `action` in the first process and give its result, which can be pickled, to all.

    Raises:
        ValueError, OSError: What the action raised, in the first process.
        InputError: The same in the others.
    """
    group = environment.process_group
    if group is None:
        return action()
    failure: Exception | None = None
    outcome: list[Any] = [None, None]  # what went wrong, what came out
    if environment.is_main:
        try:
            outcome[1] = action()
        except (ValueError, OSError) as error:
            failure = error
            outcome[0] = one_line(error)
    dist.broadcast_object_list(outcome, src=0, group=group)
    if failure is not None:
        raise failure
    if outcome[0] is not None:
        raise InputError(outcome[0])
    return outcome[1]


def gather(environment: DistributedEnvironment, mine: dict[str, T]) -> dict[str, T]:
    """Every process's dictionary joined into one, in every process."""
    if environment.process_group is None:
        return mine
    everyone: list[dict[str, T]] = [{} for _ in range(environment.world_size)]
    dist.all_gather_object(everyone, mine, group=environment.process_group)
    return {name: value for part in everyone for name, value in part.items()}
