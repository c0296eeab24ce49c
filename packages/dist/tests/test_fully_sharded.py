"""An optimizer under fully_shard: states leave whole, come back on other ranks, in both modes."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tilewright_dist import (
    FullyShardedOptimizer,
    ShardedOptimizer,
    gather_state_dict,
    load_whole_state_dict,
    wrap,
)
from tilewright_dist.testing import run_ranks

# Three rows among two ranks are two and one, among four three single ones and none.
SIZES = (5, 3)


class Stack(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([nn.Linear(4, SIZES[0]), nn.Linear(SIZES[0], SIZES[1])])

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def make_optimizer(module):
    return torch.optim.AdamW(module.parameters(), lr=0.05)


def steps(module, optimizer, numbers, rank, world_size):
    for step in numbers:
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
        module(x[rank::world_size]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def alone(numbers):
    module = Stack()
    optimizer = make_optimizer(module)
    steps(module, optimizer, numbers, 0, 1)
    return module, optimizer


def saved_by_all(rank, world_size):
    """After two steps: weights and states, whole on rank 0."""
    module, optimizer = wrap(Stack(), make_optimizer, parallel="fsdp")
    assert isinstance(optimizer, FullyShardedOptimizer)
    steps(module, optimizer, range(2), rank, world_size)
    weights = dict(gather_state_dict(module))
    assert all((tensor is None) == (rank != 0) for tensor in weights.values())
    return weights, optimizer.full_state_dict()


def gone_on(rank, world_size, parallel, weights, states):
    module = Stack(seed=7)
    wrapped, optimizer = wrap(module, make_optimizer, parallel=parallel)
    if parallel == "fsdp":
        load_whole_state_dict(module, weights)
    else:
        module.load_state_dict(weights)
    optimizer.load_state_dict(states)
    steps(wrapped, optimizer, range(2, 4), rank, world_size)
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.wait_for_parameters()
    return dict(gather_state_dict(module))


@pytest.mark.parametrize("world_size", [2, 4])
def test_states_leave_whole(world_size):
    (weights, states), *others = run_ranks(saved_by_all, world_size, world_size=world_size)
    module, optimizer = alone(range(2))
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)
    expected = optimizer.state_dict()
    assert states["param_groups"] == expected["param_groups"]
    assert states["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        for key, value in state.items():
            found = states["state"][number][key]
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)
    assert all(held == {} for _, held in others)


@pytest.mark.parametrize(
    ("world_size", "parallel"), [(1, "fsdp"), (2, "ddp"), (2, "zero1"), (4, "fsdp")]
)
def test_states_come_back_in_any_mode(world_size, parallel):
    module, optimizer = alone(range(2))
    state = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    steps(module, optimizer, range(2, 4), 0, 1)
    whole, *_ = run_ranks(gone_on, world_size, parallel, *state, world_size=world_size)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def local_rows(module):
    parameters: Any = module.parameters()
    return torch.cat([p.to_local().flatten().clone() for p in parameters])


def norms_and_skips(rank):
    module, made = wrap(Stack(), make_optimizer, parallel="fsdp")
    optimizer: Any = made
    x = torch.full((2, 4), float(rank + 1))
    module(x).sum().backward()
    grads: Any = [p.grad for p in module.parameters()]
    norm = optimizer.over_ranks(torch.nn.utils.get_total_norm(optimizer.local_gradients()))
    whole: Any = torch.nn.utils.get_total_norm(grads)
    before = local_rows(module)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    kept = torch.equal(local_rows(module), before)
    optimizer.found_inf = None
    optimizer.step()
    moved = not torch.equal(local_rows(module), before)
    with pytest.raises(RuntimeError, match="a GradScaler decides by the gradients of one rank"):
        _ = optimizer._step_supports_amp_scaling
    return norm, whole.full_tensor(), kept, moved


def test_the_norm_is_of_all_ranks_and_steps_can_be_left_out():
    for norm, whole, kept, moved in run_ranks(norms_and_skips):
        torch.testing.assert_close(norm, whole)
        assert kept
        assert moved


def refused(rank):
    """What a user could get wrong, in words."""
    module, made = wrap(Stack(), make_optimizer, parallel="fsdp")
    optimizer: Any = made
    errors = []
    for call in (
        lambda: FullyShardedOptimizer(make_optimizer(Stack()), module),
        lambda: load_whole_state_dict(module, {}),
        lambda: load_whole_state_dict(
            module, {name: torch.zeros(1) for name in module.state_dict()}
        ),
        lambda: optimizer.load_state_dict(
            optimizer.state_dict() | {"state": {0: {"scale": torch.zeros(99)}}}
        ),
        lambda: wrap(Stack(), make_optimizer, block_options={}),
        lambda: wrap(Stack(), make_optimizer, device=torch.device("cuda", 1)),
    ):
        try:
            call()
        except ValueError as error:
            errors.append(str(error))
    return errors


def test_errors_name_the_remedy():
    (errors,) = run_ranks(refused, world_size=1)
    assert "is not divided into rows" in errors[0]
    assert "'blocks.0.bias' is not in both" in errors[1]
    assert "'blocks.0.weight' is (1,), not (5, 4)" in errors[2]
    assert "state 'scale' has shape (99,)" in errors[3]
    assert "use parallel='zero1'" in errors[3]
    assert "block_options are for parallel='fsdp', not 'ddp'" in errors[4]
    assert "with 'ddp' call module.to(cuda:1)" in errors[5]
