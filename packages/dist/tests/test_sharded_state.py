"""States of a sharded optimizer on disk: whole, in parts, at other numbers of ranks."""

import copy
import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tilewright_dist import DistributedDataParallel, ShardedOptimizer
from tilewright_dist.testing import run_ranks
from tilewright_dist.testing_models import Stack, Wrapped, adamw_groups, device_of, matrices, train

pytestmark = pytest.mark.usefixtures("one_thread")

# Optimizer, its parameters, its options.
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, adamw_groups, {"lr": 0.01, "weight_decay": 0.1}),
    "muon": (torch.optim.Muon, matrices, {"lr": 0.02}),
    "factored": (torch.optim.Adafactor, lambda m: m.parameters(), {"lr": 0.01}),
}


def pieces_of(case):
    """A fresh model, its wrapper and its sharded optimizer."""
    optimizer_cls, parameters, options = CASES[case]
    model = Stack().to(device_of(dist.get_rank()))
    wrapper = DistributedDataParallel(model, bucket_cap_mb=0.01)
    optimizer = ShardedOptimizer(parameters(model), optimizer_cls, ddp=wrapper, **options)
    return model, wrapper, optimizer


def save(rank):
    """Files of this rank and the weights, by case; on rank 0 also whole states."""
    saved = {}
    for case in CASES:
        model, wrapper, optimizer = pieces_of(case)
        train(wrapper, optimizer, rank=0)  # the same rows on every rank and at every world size
        full = optimizer.full_state_dict()
        assert bool(full) == (rank == 0)
        tensors = {k: v.cpu().clone() for k, v in optimizer.state_tensors().items()}
        saved[case] = (
            tensors,
            json.dumps(optimizer.layout()),
            {n: t.cpu().clone() for n, t in model.state_dict().items()},
            full,
        )
    return saved


def resume(rank, files):
    """Whether states are those saved, and weights after another step; by case."""
    results = {}
    for case in CASES:
        model, wrapper, optimizer = pieces_of(case)
        model.load_state_dict(files[0][case][2])
        optimizer.load_state_tensors([(f[case][0], json.loads(f[case][1])) for f in files])
        again = optimizer.full_state_dict()
        if rank == 0:
            assert_equal_states(again, files[0][case][3])
        weights = train(wrapper, optimizer, rank=0, first=3, steps=1)

        model, wrapper, optimizer = pieces_of(case)
        model.load_state_dict(files[0][case][2])
        optimizer.load_state_dict(files[0][case][3])
        from_whole = train(wrapper, optimizer, rank=0, first=3, steps=1)
        assert torch.equal(from_whole, weights), case
        results[case] = weights
    return results


def assert_equal_states(one, other):
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for number, state in one["state"].items():
        assert state.keys() == other["state"][number].keys()
        for key, value in state.items():
            theirs = other["state"][number][key]
            if not isinstance(value, torch.Tensor):
                assert value == theirs
                continue
            assert value.dtype == theirs.dtype
            assert value.shape == theirs.shape
            assert torch.equal(value, theirs), (number, key)


def test_states_saved_at_four_ranks_load_at_any_number():
    files = run_ranks(save, world_size=4, timeout=100)
    continued = {}
    for world_size in (2, 1, 3):
        continued[world_size] = run_ranks(resume, files, world_size=world_size, timeout=100)

    for case in CASES:
        # The unsharded optimizer, from the same whole state.
        optimizer_cls, parameters, options = CASES[case]
        model = Stack()
        model.load_state_dict(files[0][case][2])
        plain = optimizer_cls(parameters(model), **options)
        plain.load_state_dict(files[0][case][3])
        expected = train(Wrapped(model), plain, rank=0, first=3, steps=1)
        for world_size, ranks in continued.items():
            for results in ranks:
                if world_size == 3:
                    # (g + g + g) / 3 rounds.
                    torch.testing.assert_close(results[case], expected, rtol=1e-4, atol=1e-5)
                else:
                    assert torch.equal(results[case], expected), (case, world_size)


@pytest.mark.multigpu(4)
def test_states_saved_at_four_gpus_load_at_two():
    files = run_ranks(save, world_size=4, backend="nccl", timeout=100)
    at_four, at_two = (
        run_ranks(resume, files, world_size=ranks, backend="nccl", timeout=100) for ranks in (4, 2)
    )
    for case in CASES:
        for results in (*at_four, *at_two):
            # All ranks have the same rows: their averages are exact.
            assert torch.equal(results[case], at_four[0][case]), case


@pytest.mark.smoke
def test_one_rank(one_rank_group):
    _, wrapper, optimizer = pieces_of("adamw")
    plain = Stack()
    expected = torch.optim.AdamW(adamw_groups(plain), lr=0.01, weight_decay=0.1)
    assert torch.equal(train(wrapper, optimizer, 0), train(Wrapped(plain), expected, 0))
    assert_equal_states(optimizer.full_state_dict(), expected.state_dict())
    same_again = pieces_of("adamw")[2]
    same_again.load_state_dict(optimizer.state_dict())
    assert_equal_states(same_again.full_state_dict(), expected.state_dict())


@pytest.mark.parametrize("with_wrapper", [True, False])
def test_scalars_stay_scalars(one_rank_group, with_wrapper):
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(2, 1)
            torch.manual_seed(0)
            self.scale = nn.Parameter(torch.tensor(2.0))
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

        def forward(self, input):
            return self.scale * super().forward(input)

    def step(module, optimizer):
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    kind: Any = torch.optim.AdamW
    plain = Scaled()
    expected = kind(plain.parameters(), lr=0.1)
    step(plain, expected)
    state = copy.deepcopy(expected.state_dict())
    step(plain, expected)

    model = Scaled()
    wrapper = DistributedDataParallel(model)
    ddp = wrapper if with_wrapper else None
    step(wrapper, ShardedOptimizer(model.parameters(), kind, ddp=ddp, lr=0.1))
    resumed = ShardedOptimizer(model.parameters(), kind, lr=0.1)
    resumed.load_state_dict(state)
    assert_equal_states(resumed.full_state_dict(), state)
    assert resumed.state_tensors()["2.exp_avg"].shape == ()
    step(model, resumed)
    assert_equal_states(resumed.full_state_dict(), expected.state_dict())
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_a_part_that_nobody_saved_is_named(one_rank_group):
    _, wrapper, optimizer = pieces_of("adamw")
    train(wrapper, optimizer, 0)
    tensors, layout = optimizer.state_tensors(), optimizer.layout()
    first, last = layout["pieces"]["embed.weight"]
    layout["pieces"]["embed.weight"] = [first, last - 100]
    tensors |= {k: v[:-100] for k, v in tensors.items() if k.startswith("embed") and v.dim()}
    with pytest.raises(ValueError, match=f"{last - 100} of {last} elements of state 'exp_avg"):
        optimizer.load_state_tensors([(tensors, layout)])
