"""What the other ranks say when one dies, hangs, drifts or makes a NaN."""

import os
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tilewright_dist import (
    DistributedDataParallel,
    DivergenceError,
    NonFiniteGradientError,
    RankFailure,
    ShardedOptimizer,
    verify_replicas,
)
from tilewright_dist.testing import run_ranks


def train_until_rank_1_stops(rank, how):
    """The message of the error, and how long after the stop it came."""
    group: Any = dist.new_group(timeout=timedelta(seconds=4))
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    wrapper = DistributedDataParallel(model, process_group=group, bucket_cap_mb=1e-4)
    kind: Any = torch.optim.AdamW
    optimizer = ShardedOptimizer(model.parameters(), kind, ddp=wrapper, overlap_gather=False)

    def stop(_):
        if rank == 1 and how == "dies":
            os._exit(1)
        if rank == 1:
            time.sleep(11)  # more than the others' timeout and roll call
            os._exit(1)

    began = time.monotonic()
    for step in range(3):
        if step == 2:
            # In the middle of backward: the last layers' buckets are on their way.
            model[1].weight.register_hook(stop)  # pyrefly: ignore
            began = time.monotonic()
        try:
            wrapper(torch.ones(2, 8)).sum().backward()
        except RankFailure as error:
            return str(error), time.monotonic() - began
        optimizer.step()
        optimizer.zero_grad()
    return None


# Of four ranks in a ring one has no connection to the one that died.
@pytest.mark.parametrize(("how", "world_size"), [("dies", 4), ("hangs", 3)])
def test_the_others_name_the_rank_that_stopped(how, world_size):
    results = run_ranks(train_until_rank_1_stops, how, world_size=world_size, may_die=[1])
    assert results[1] is None
    for rank in set(range(world_size)) - {1}:
        message, seconds = results[rank]
        assert message.startswith(
            f"rank {rank}: gradient synchronization 2 failed, rank(s) 1 died or hang."
        )
        assert seconds < 4 + 5 + 3  # timeout, roll call, a busy machine


def drift(rank):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    DistributedDataParallel(model)
    group: Any = dist.group.WORLD
    verify_replicas(model, group)
    if rank == 2:
        with torch.no_grad():
            weight = model[0].weight
            # Values that change places: a plain sum would not see it.
            weight[0, 0], weight[0, 1] = weight[0, 1].clone(), weight[0, 0].clone()  # pyrefly: ignore
    with pytest.raises(DivergenceError) as caught:
        verify_replicas(model, group)
    return str(caught.value)


def test_a_replica_that_differs_is_named():
    for message in run_ranks(drift, world_size=3):
        assert message.startswith("replicas differ from the usual value: '0.weight' on rank 2.")


def nonfinite(rank):
    model = nn.ModuleDict({"good": nn.Linear(2, 2), "bad": nn.Linear(2, 2)})
    wrapper = DistributedDataParallel(model)
    values = torch.full((1, 2), float("nan") if rank == 1 else 1.0)

    def backward():
        (model["good"](torch.ones(1, 2)).sum() + model["bad"](values).sum()).backward()
        model.zero_grad()

    backward()  # unobserved: nothing is said
    with (
        pytest.raises(NonFiniteGradientError, match="before averaging") as caught,
        wrapper.detect_nonfinite_gradients(),
    ):
        backward()
    return str(caught.value)


def test_nonfinite_gradient_is_traced_to_its_rank():
    for message in run_ranks(nonfinite):
        assert message.endswith("before averaging: 'bad.weight' on rank 1")
