"""ZeRO-1 against the unsharded optimizer, bit for bit; states on disk are in test_sharded_state."""

import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tilewright_dist import DistributedDataParallel, ShardedOptimizer, bucketed
from tilewright_dist.shards import Shard
from tilewright_dist.testing import run_ranks
from tilewright_dist.testing_models import (
    Stack,
    Wrapped,
    adamw_groups,
    device_of,
    matrices,
    rows_of,
    train,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Half(Stack):
    """The same in bfloat16."""

    def __init__(self):
        super().__init__()
        self.bfloat16()

    def forward(self, x):
        return super().forward(x.bfloat16()).float()


# Optimizer, its parameters, its options.
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, adamw_groups, {"lr": 0.01, "weight_decay": 0.1}),
    "generator": (torch.optim.Adam, lambda m: (p for p in m.parameters()), {"lr": 0.01}),
    "named": (torch.optim.SGD, lambda m: m.named_parameters(), {"lr": 0.1, "momentum": 0.9}),
    "fused": (torch.optim.AdamW, lambda m: m.parameters(), {"lr": 0.01, "fused": True}),
    "muon": (torch.optim.Muon, matrices, {"lr": 0.02}),
    "factored": (torch.optim.Adafactor, lambda m: m.parameters(), {"lr": 0.01}),
}


def compare_all(rank):
    """By case: whether each sharded form gives the bits of the unsharded one."""
    equal = {}
    for case, (optimizer_cls, parameters, options) in CASES.items():
        results = {}
        for form in ("whole", "with ddp", "at once", "alone"):
            model = Stack().to(device_of(rank))
            wrapper = DistributedDataParallel(model, bucket_cap_mb=0.01, first_bucket_mb=0.001)
            given = parameters(model)
            if form == "whole":
                optimizer = optimizer_cls(given, **options)
            else:
                optimizer = ShardedOptimizer(
                    given,
                    optimizer_cls,
                    ddp=None if form == "alone" else wrapper,
                    overlap_gather=form == "with ddp",
                    **options,
                )
            results[form] = train(wrapper, optimizer, rank)
        for form, weights in results.items():
            equal[case, form] = torch.equal(weights, results["whole"]), weights[:1].item()
    return equal


@pytest.mark.parametrize(
    ("backend", "world_size"),
    [
        ("gloo", 2),
        ("gloo", 3),
        ("gloo", 4),
        pytest.param("nccl", 2, marks=pytest.mark.multigpu(2)),
        pytest.param("nccl", 4, marks=pytest.mark.multigpu(4)),
    ],
)
def test_equals_the_unsharded_optimizer(backend, world_size):
    for equal in run_ranks(compare_all, world_size=world_size, backend=backend, timeout=100):
        if world_size == 2:
            assert all(same for same, _ in equal.values()), equal
        else:
            # A reduce-scatter of gloo adds three numbers in another order than its all-reduce, so
            # only what steps from the same averages has the same bits.
            assert all(same for (_, form), (same, _) in equal.items() if form == "alone"), equal
            for (case, _), (_, first) in equal.items():
                assert first == pytest.approx(equal[case, "whole"][1], abs=1e-3), case


def variants(rank):
    """Weights by variant of the wrapper or the model."""
    weights = {"start": torch.cat([p.detach().reshape(-1) for p in Stack().parameters()])}

    def run(case, model, ddp_options=None, sharded=True, **options):
        wrapper = DistributedDataParallel(model, bucket_cap_mb=0.01, **(ddp_options or {}))
        if sharded:
            optimizer: Any = ShardedOptimizer(
                model.parameters(), torch.optim.AdamW, ddp=wrapper, lr=0.01, **options
            )
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        weights[case] = train(wrapper, optimizer, rank)

    run("whole", Stack(), sharded=False)
    run("static graph", Stack(), {"static_graph": True})
    run("unused found", Stack(), {"find_unused_parameters": True})
    compiled = Stack()
    for block in compiled.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    run("compiled blocks", compiled)
    run("whole, narrow", Stack(), {"reduce_dtype": torch.bfloat16}, sharded=False)
    run("narrow", Stack(), {"reduce_dtype": torch.bfloat16})
    run("narrow matrix", Stack(), {"reduce_dtype": torch.bfloat16}, partition="matrix")
    run("whole, half", Half(), sharded=False)
    run("half", Half())
    return weights


def test_variants_of_the_wrapper():
    for weights in run_ranks(variants, timeout=100):
        for case in ("static graph", "unused found", "compiled blocks"):
            assert torch.equal(weights[case], weights["whole"]), case
        assert torch.equal(weights["half"], weights["whole, half"])
        # Here averages are used before they would be rounded for their way back.
        assert torch.equal(weights["narrow"], weights["narrow matrix"])
        # Of an element whose gradient is near zero AdamW makes a movement of either sign.
        difference = weights["narrow"] - weights["whole, narrow"]
        movement = weights["whole, narrow"] - weights["start"]
        assert difference.norm() < 5e-3 * movement.norm()
        assert difference.abs().max() < 0.1 * movement.abs().max()


def clipped(rank):
    found = {}
    for case in ("whole", "divided in the step", "divided before"):
        model = Stack()
        wrapper = DistributedDataParallel(model)
        options = {"lr": 0.1, "fused": case == "divided in the step"}
        if case == "whole":
            optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
            norms = []

            def clip(optimizer, *_, norms=norms):
                norms.append(nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.05))

            optimizer.register_step_pre_hook(clip)
        else:
            optimizer = ShardedOptimizer(
                model.parameters(), torch.optim.SGD, ddp=wrapper, max_grad_norm=0.05, **options
            )
        weights = train(wrapper, optimizer, rank)
        norm = norms[-1] if case == "whole" else optimizer.grad_norm
        found[case] = weights, norm
    return found


def test_clipping_by_the_norm_of_all_shards():
    for found in run_ranks(clipped):
        weights, norm = found.pop("whole")
        assert norm > 0.05
        for other, other_norm in found.values():
            torch.testing.assert_close(other_norm, norm, rtol=1e-4, atol=0)
            torch.testing.assert_close(other, weights, rtol=1e-4, atol=1e-5)


def accumulated(rank):
    """Weights of a whole and a sharded optimizer: no_sync, a closure, gradients that are None."""
    found = []
    for sharded in (False, True):
        model = Stack()
        wrapper = DistributedDataParallel(model, find_unused_parameters=True)
        kind: Any = torch.optim.AdamW
        if sharded:
            optimizer: Any = ShardedOptimizer(model.parameters(), kind, ddp=wrapper, lr=0.01)
        else:
            optimizer = kind(model.parameters(), lr=0.01)
        for set_to_none in (True, False):
            with wrapper.no_sync():
                wrapper(rows_of(rank, 0)).square().mean().backward()
            wrapper(rows_of(rank, 1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.zero_grad()

        def closure(optimizer=optimizer, wrapper=wrapper):
            optimizer.zero_grad()
            loss = wrapper(rows_of(rank, 2)).square().mean()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
        optimizer.zero_grad()
        # A step whose last gradients are still each rank's own.
        with wrapper.no_sync():
            model.blocks[0](model.embed(rows_of(rank, 3))).sum().backward()
        wrapper.finish_gradient_synchronization()
        optimizer.step()
        found.append(weights_of(model, optimizer))
    return found


def test_accumulation_closures_and_missing_gradients():
    for whole, sharded in run_ranks(accumulated):
        assert torch.equal(whole, sharded)


def grown(rank):
    found = []
    for sharded in (False, True):
        model = Stack()
        wrapper = DistributedDataParallel(model)
        kind: Any = torch.optim.Adam
        if sharded:
            optimizer: Any = ShardedOptimizer(model.blocks.parameters(), kind, ddp=wrapper, lr=0.01)
        else:
            optimizer = kind(model.blocks.parameters(), lr=0.01)
        train(wrapper, optimizer, rank, steps=1)
        optimizer.add_param_group({"params": [model.embed.weight], "lr": 0.1})
        found.append(train(wrapper, optimizer, rank, first=1, steps=2))
    return found


def test_added_group():
    for whole, sharded in run_ranks(grown):
        assert torch.equal(whole, sharded)


def scale_losses(rank):
    """Messages of a GradScaler's step, by whether the inner optimizer divides."""
    messages = []
    for fused in (False, True):
        model = nn.Linear(4, 4)
        wrapper = DistributedDataParallel(model)
        kind: Any = torch.optim.AdamW
        optimizer = ShardedOptimizer(model.parameters(), kind, ddp=wrapper, fused=fused)
        scaler = torch.amp.GradScaler("cpu")
        # Only rank 1 sees the infinity.
        scaler.scale(wrapper(torch.full((1, 4), torch.inf if rank else 1.0)).sum()).backward()
        with pytest.raises(RuntimeError, match="a GradScaler decides by") as refused:
            scaler.step(optimizer)
        messages.append(str(refused.value))
    return messages


def test_gradient_scalers_are_refused_on_several_ranks():
    for messages in run_ranks(scale_losses, timeout=60):
        assert all("train in bfloat16 without loss scaling" in m for m in messages)


def sharded_adamw():
    """A fresh model, its wrapper and its sharded optimizer."""
    model = Stack()
    wrapper = DistributedDataParallel(model, bucket_cap_mb=0.01)
    optimizer_cls, parameters, options = CASES["adamw"]
    return (
        model,
        wrapper,
        ShardedOptimizer(parameters(model), optimizer_cls, ddp=wrapper, **options),
    )


def test_partition_is_chosen_group_by_group(one_rank_group):
    model = nn.Linear(4, 4)
    groups = [
        {"params": [model.weight], "kind": "muon"},
        {"params": [model.bias], "kind": "adamw"},
    ]
    optimizer = ShardedOptimizer(groups, torch.optim.SGD, lr=0.1)
    shapes = [tuple(p.shape) for group in optimizer.inner.param_groups for p in group["params"]]
    assert shapes == [(4, 4), (4,)]
    flat = ShardedOptimizer([model.weight], torch.optim.SGD, lr=0.1)
    assert flat.inner.param_groups[0]["params"][0].shape == (16,)
    whole = ShardedOptimizer([model.weight], torch.optim.Adafactor)
    assert whole.inner.param_groups[0]["params"][0].shape == (4, 4)


def test_buckets_without_gradients_are_freed_before_they_are_divided(one_rank_group, monkeypatch):
    model = Stack()
    wrapper = DistributedDataParallel(model)
    reducer: Any = wrapper.reducer
    former = [weakref.ref(bucket.memory) for bucket in reducer.buckets]
    allocate = bucketed.allocate
    alive = []

    def recording(*args):
        alive.extend(reference() is not None for reference in former)
        return allocate(*args)

    monkeypatch.setattr(bucketed, "allocate", recording)
    kind: Any = torch.optim.AdamW
    ShardedOptimizer(model.parameters(), kind, ddp=wrapper)
    assert alive
    assert not any(alive)


def test_what_the_whole_module_waits_for_is_gathered_first(one_rank_group, monkeypatch):
    model = Stack()
    # A head of its own, which the forward pass reads last.
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    wrapper = DistributedDataParallel(model, bucket_cap_mb=0.01)
    kind: Any = torch.optim.AdamW
    optimizer = ShardedOptimizer(model.parameters(), kind, ddp=wrapper, lr=0.01)
    gathered: list[set[str]] = []
    gather = Shard.gather

    def recording(shard, *peers):
        gathered.append(set(shard.names()))
        return gather(shard, *peers)

    monkeypatch.setattr(Shard, "gather", recording)
    train(wrapper, optimizer, 0, steps=2)
    half = len(gathered) // 2
    outside = [any(not name.startswith("blocks.") for name in names) for names in gathered[half:]]
    assert "head.weight" in set().union(*gathered)
    assert False in outside
    assert outside == sorted(outside, reverse=True)


def test_an_optimizer_is_taken_over(one_rank_group):
    model, plain = Stack(), Stack()
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    wrapper = DistributedDataParallel(model)
    given = torch.optim.AdamW(adamw_groups(model), **options)
    optimizer = ShardedOptimizer.from_optimizer(given, ddp=wrapper)
    assert optimizer.inner is given
    expected = torch.optim.AdamW(adamw_groups(plain), **options)
    assert torch.equal(train(wrapper, optimizer, 0), train(Wrapped(plain), expected, 0))
    with pytest.raises(ValueError, match="shard it before its first step"):
        ShardedOptimizer.from_optimizer(expected)


def test_adding_to_scattered_gradients_is_refused(one_rank_group):
    _, wrapper, _optimizer = sharded_adamw()
    wrapper(rows_of(0, 0)).sum().backward()
    with pytest.raises(RuntimeError, match="all but the last backward of a step under no_sync"):
        wrapper(rows_of(0, 0)).sum().backward()


def test_adding_to_some_scattered_gradients_is_refused(one_rank_group):
    model, wrapper, _optimizer = sharded_adamw()
    wrapper(rows_of(0, 0)).sum().backward()
    # The first gradient to arrive is fresh, those of the blocks are not.
    model.head.weight.grad = None
    with pytest.raises(RuntimeError, match="all but the last backward of a step under no_sync"):
        wrapper(rows_of(0, 0)).sum().backward()


def test_what_does_not_fit_is_refused(one_rank_group):
    model = Stack()
    wrapper = DistributedDataParallel(model)
    partition: Any = "rows"
    kind: Any = torch.optim.AdamW
    with pytest.raises(ValueError, match="unknown partition 'rows'; valid: 'auto'"):
        ShardedOptimizer(model.parameters(), kind, partition=partition)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) is not of the wrapped module"):
        ShardedOptimizer([nn.Parameter(torch.zeros(2, 2))], kind, ddp=wrapper)
    with pytest.raises(ValueError, match="there are no parameters"):
        ShardedOptimizer([], kind, ddp=wrapper)
    naive = DistributedDataParallel(nn.Linear(2, 2), strategy="naive")
    with pytest.raises(ValueError, match="strategy 'naive' has no buckets"):
        ShardedOptimizer(naive.parameters(), kind, ddp=naive)
    copies = DistributedDataParallel(nn.Linear(2, 2), gradient_as_bucket_view=False)
    with pytest.raises(ValueError, match="wrap the module with gradient_as_bucket_view=True"):
        ShardedOptimizer(copies.parameters(), kind, ddp=copies)
    ShardedOptimizer(model.parameters(), kind, ddp=wrapper)
    with pytest.raises(RuntimeError, match="attached to this module already"):
        ShardedOptimizer(model.parameters(), kind, ddp=wrapper)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_does_not_wait_for_the_device():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = Stack().cuda()
        wrapper = DistributedDataParallel(model)
        optimizer = ShardedOptimizer(
            model.parameters(), torch.optim.AdamW, ddp=wrapper, max_grad_norm=1.0, fused=True
        )
        rows = rows_of(0, 0).cuda()
        losses, weights = [], []
        for mode in ("default", "default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            loss = wrapper(rows).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            optimizer.wait_for_parameters()
            weights.append(model.embed.weight.detach().clone())
        torch.cuda.set_sync_debug_mode("default")
        assert losses[2] < losses[1] < losses[0]
        assert not torch.equal(weights[2], weights[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
