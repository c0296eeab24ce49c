"""What one process sees makes all of them leave the update out: two processes, gloo."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from tilewright_dist import wrap
from tilewright_dist.testing import run_ranks
from tilewright_optim import AdamW
from tilewright_train import examination
from tilewright_train.batches import Batch
from tilewright_train.guilty import LeftOut
from tilewright_train.step_guard import StepGuard

Parallel = Literal["ddp", "zero1", "fsdp"]


def trained(rank: int, parallel: Parallel) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Of four steps, the second with a NaN on rank 1 alone: codes and counts, weights after."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Linear(300, 3)
    module, made = wrap(
        model,
        lambda m: AdamW(m.parameters(), 0.1),
        parallel=parallel,
        max_grad_norm=1.0 if parallel == "zero1" else None,
    )
    optimizer: Any = made
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    guard = StepGuard(
        optimizer, parameters, max_grad_norm=1.0, device=torch.device("cpu"), scales_loss=True
    )
    told, weights = [], []
    for number in range(4):
        x = torch.full((2, 300), 1.0 + number + rank)
        if (number, rank) == (1, 1):
            x[0, 7] = torch.nan
        guard.scaled(module(x).sum()).backward()
        outcome = guard.clip_and_step(torch.tensor(1.0))  # the gradients alone tell
        optimizer.zero_grad(set_to_none=True)
        if parallel != "ddp":
            optimizer.wait_for_parameters()
        told.append([int(outcome.skipped), int(outcome.in_all), int(outcome.scale)])
        weight: Any = model.weight
        weights.append((weight.full_tensor() if parallel == "fsdp" else weight).detach().clone())
    return told, weights


@pytest.mark.parametrize("parallel", get_args(Parallel))
def test_all_ranks_leave_out_what_one_cannot_make(parallel: Parallel) -> None:
    (first, mine), (second, theirs) = run_ranks(trained, parallel, world_size=2, timeout=200)
    assert first == second == [[0, 0, 65536], [1, 1, 65536], [0, 1, 32768], [0, 1, 32768]]
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(mine[0], mine[1])
    assert not torch.equal(mine[1], mine[2])
    assert mine[3].isfinite().all()


def examined(rank: int, folder: str) -> str:
    """A step whose loss was NaN on rank 1 alone, and is finite when it is computed once more."""
    ids = torch.full((1, 4), rank)
    batch = Batch(input_ids=ids, labels=ids, targets=4, tokens=4)
    sampler = SimpleNamespace(parts=lambda _: 1, batch=lambda *_: batch)
    prepared: Any = SimpleNamespace(
        sampler=sampler,
        trainee=SimpleNamespace(optimizer=None, module=None),
        run=SimpleNamespace(left_out=Path(folder)),
    )
    chosen: Any = SimpleNamespace(settled=SimpleNamespace(micro_batch_size=1))
    group = dist.group.WORLD
    environment: Any = SimpleNamespace(rank=rank, world_size=2, process_group=group)
    own = torch.nan if rank == 1 else 2.0
    left_out = LeftOut(5, "not finite", torch.nan, torch.nan, 0.1, 1, 1.0, own)
    with mock.patch.object(examination, "_guilty", return_value=None):
        return examination.examine(left_out, chosen, prepared, environment, torch.no_grad())


def test_a_fault_that_is_gone_is_told_of_the_rank_that_had_it(tmp_path: Path) -> None:
    first, second = run_ranks(examined, str(tmp_path), world_size=2, timeout=200)
    assert first == second
    assert "now all of it is finite; process 1, batch kept in" in first
    kept = load_file(tmp_path / "step-000005" / "batch.safetensors")
    assert kept["input_ids"].tolist() == [[1, 1, 1, 1]]
