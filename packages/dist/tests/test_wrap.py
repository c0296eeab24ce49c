"""The three ways to train on several ranks take the steps of one process."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tilewright_dist import DistributedDataParallel, ShardedOptimizer, wrap
from tilewright_dist.testing import run_ranks

WAYS: list[Any] = ["ddp", "zero1", "fsdp"]


class Stack(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def make_optimizer(module):
    return torch.optim.AdamW(module.parameters(), lr=0.05)


def rows(rank, step):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))


class Nested(Stack):
    """The same parameters in lists within a list and a dictionary, and a list within a block."""

    def __init__(self, seed=0):
        super().__init__(seed)
        first, second = self.blocks
        second.more = nn.ModuleList([nn.Tanh()])
        del self.blocks
        self.parts = nn.ModuleDict({"stages": nn.ModuleList([nn.ModuleList([first, second])])})

    def forward(self, x):
        stages: Any = self.parts["stages"]
        for block in stages[0]:
            x = torch.tanh(block(x))
        return self.head(x)


def train_each_way(rank):
    states = {}
    for case in (*WAYS, "nested"):
        parallel: Any = "fsdp" if case == "nested" else case
        model = Nested(rank) if case == "nested" else Stack(rank)
        module, optimizer = wrap(model, make_optimizer, parallel=parallel)
        for step in range(3):
            module(rows(rank, step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if isinstance(optimizer, ShardedOptimizer):
            optimizer.wait_for_parameters()
        by_place = sorted(module.named_parameters(), key=lambda named: "head" in named[0])
        states[case] = [
            p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for _, p in by_place
        ]
        assert isinstance(next(module.parameters()), DTensor) == (parallel == "fsdp")
    return states


def test_all_ways_take_the_steps_of_one_process():
    ranks = run_ranks(train_each_way, timeout=100)
    model = Stack()
    optimizer = make_optimizer(model)
    for step in range(3):
        model(torch.cat([rows(rank, step) for rank in range(2)])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for states in ranks:
        for case in (*WAYS, "nested"):
            for found, expected in zip(states[case], model.parameters(), strict=True):
                torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


def test_what_is_returned(one_rank_group):
    module, optimizer = wrap(Stack(), make_optimizer)
    assert isinstance(module, DistributedDataParallel)
    assert isinstance(optimizer, torch.optim.AdamW)
    _, optimizer = wrap(Stack(), make_optimizer, parallel="zero1", max_grad_norm=1.0)
    assert isinstance(optimizer, ShardedOptimizer)


def test_refused_choices(one_rank_group):
    parallel: Any = "tensor"
    with pytest.raises(ValueError, match="unknown parallel 'tensor'; valid: 'ddp', 'zero1'"):
        wrap(Stack(), make_optimizer, parallel=parallel)
    with pytest.raises(ValueError, match="max_grad_norm is for parallel='zero1': with 'ddp'"):
        wrap(Stack(), make_optimizer, max_grad_norm=1.0)
