"""The launcher of ranks: results by rank, and failures that neither hang nor leave processes."""

import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist

from tilewright_dist.testing import run_ranks


def sum_over_ranks(rank, offset):
    value = torch.tensor([rank + offset])
    dist.all_reduce(value)
    return rank, value


def test_results_come_by_rank():
    results = run_ranks(sum_over_ranks, 10, world_size=3)
    assert results == [(rank, torch.tensor([33])) for rank in range(3)]


def fail_on_rank_1(rank):
    if rank == 1:
        raise KeyError("planted")
    dist.barrier()


def die_on_rank_1(rank):
    if rank == 1:
        os._exit(1)
    dist.barrier()


def hang_on_rank_1(rank):
    if rank == 1:
        time.sleep(600)


@pytest.mark.parametrize(
    ("function", "timeout", "error", "message"),
    [
        (fail_on_rank_1, 60, RuntimeError, "(?s)rank 1 failed:.*KeyError: 'planted'"),
        (die_on_rank_1, 60, RuntimeError, "rank 1 died without a word|rank 0 failed"),
        # Long enough for both to start on a busy machine.
        (hang_on_rank_1, 5, TimeoutError, "rank.* 1 had not returned in time"),
    ],
)
def test_a_failing_rank_ends_the_run(function, timeout, error, message):
    with pytest.raises(error, match=message):
        run_ranks(function, timeout=timeout)
    assert multiprocessing.active_children() == []


def test_nested_functions_are_refused():
    with pytest.raises(ValueError, match="not defined at the top level"):
        run_ranks(lambda rank: rank)
