"""Training over ranks against training in one process, and the wrapper's own rules.

Tests of numbers run on two gloo processes and, where there are two GPUs, on NCCL. Tests that count
collectives run in this process, on a group of one rank.
"""

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from tilewright_dist import DistributedDataParallel
from tilewright_dist.testing import run_ranks

VOCABULARY, WIDTH, TOKENS = 7, 4, 3


class TinyModel(nn.Module):
    """Next-token model with a tied, a frozen and an unused parameter and a buffer; float64."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(WIDTH, 1)
        self.register_buffer("scale", torch.rand(()))
        self.double()

    def forward(self, tokens):
        x = self.frozen(self.embedding(tokens)) * self.scale
        return self.head(torch.tanh(self.hidden(x)))


def batch(step, rows=slice(None)):
    """Rows of the joined batch of 8 of one step."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (8, TOKENS + 1), generator=generator)[rows]
    return tokens[:, :-1], tokens[:, 1:]


def train(model, rows, micro_batches=1, set_to_none=True, steps=3):
    """AdamW steps on given rows of the batches; all but the last micro-batch under no_sync."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(steps):
        inputs, targets = (t.to(device).chunk(micro_batches) for t in batch(step, rows))
        for index in range(micro_batches):
            accumulates = index < micro_batches - 1 and hasattr(model, "no_sync")
            with model.no_sync() if accumulates else contextlib.nullcontext():
                logits = model(inputs[index])
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets[index].flatten())
                (loss / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)


STRATEGIES: list[Any] = ["naive", "per_parameter", "bucketed"]


def train_replicas(rank, device_type, micro_batches, set_to_none):
    """States after training, by strategy."""
    states = {}
    for strategy in STRATEGIES:
        torch.manual_seed(rank)  # unequal on purpose: rank 0's values must win
        model = TinyModel().to(f"cuda:{rank}" if device_type == "cuda" else "cpu")
        rows = slice(4 * rank, 4 * rank + 4)
        wrapper = DistributedDataParallel(model, strategy=strategy, find_unused_parameters=True)
        train(wrapper, rows, micro_batches, set_to_none)
        states[strategy] = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    return states


@pytest.mark.parametrize(("micro_batches", "set_to_none"), [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize(
    ("backend", "device_type"),
    [("gloo", "cpu"), pytest.param("nccl", "cuda", marks=pytest.mark.multigpu(2))],
)
def test_two_ranks_equal_one_process(backend, device_type, micro_batches, set_to_none):
    ranks = run_ranks(train_replicas, device_type, micro_batches, set_to_none, backend=backend)

    torch.manual_seed(0)
    expected = TinyModel()
    unused_at_start = expected.unused.weight.detach().clone()
    train(expected, slice(None))

    state = ranks[0]["naive"]
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-12, atol=1e-12)
        for strategy in STRATEGIES:
            for replicas in ranks:
                assert torch.equal(replicas[strategy][name], state[name]), (strategy, name)
    # Were it given a gradient of zeros, AdamW would decay it.
    assert torch.equal(state["unused.weight"], unused_at_start)


def vector(value):
    """A module y = w · x with w = [value, value]."""
    module = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(module.weight, value)
    return module


def weight_gradients(rank, strategy):
    """d(mean loss)/dw of `vector` on rank r's input [r+1, r+1] is r+1: average 1.5 over two."""
    module = vector(1.0)
    wrapper = DistributedDataParallel(module, strategy=strategy, find_unused_parameters=True)
    inputs = torch.full((1, 2), rank + 1.0, dtype=torch.float64)
    return module, wrapper, inputs


def on_all_strategies(rank, name):
    """What a function of this file returns for each strategy, in turn."""
    return [globals()[name](rank, strategy) for strategy in STRATEGIES]


def gradient_of(module):
    assert module.weight.grad is not None
    return module.weight.grad


def leave_no_sync_by_exception(rank, strategy):
    module, wrapper, inputs = weight_gradients(rank, strategy)

    def fail_after_backward():
        with wrapper.no_sync():
            with wrapper.no_sync():
                pass  # leaving an inner block must not end the outer one
            wrapper(inputs).backward()
            raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        fail_after_backward()
    inside = gradient_of(module).clone()
    module.weight.grad = None
    wrapper(inputs).backward()
    return inside, gradient_of(module)


def test_no_sync_keeps_local_gradients_and_survives_an_exception():
    results = run_ranks(on_all_strategies, "leave_no_sync_by_exception")
    for rank, strategies in enumerate(results):
        for inside, after in strategies:
            assert inside.tolist() == [[rank + 1.0] * 2]
            assert after.tolist() == [[1.5] * 2]


def finish_twice(rank, strategy):
    module, wrapper, inputs = weight_gradients(rank, strategy)
    with wrapper.no_sync():
        wrapper(inputs).backward()
    wrapper.finish_gradient_synchronization()
    averaged = gradient_of(module).clone()
    gradient_of(module).add_(rank)
    wrapper.finish_gradient_synchronization()
    return averaged, gradient_of(module)


def test_finish_averages_what_no_sync_left_and_then_does_nothing():
    for rank, strategies in enumerate(run_ranks(on_all_strategies, "finish_twice")):
        for averaged, after in strategies:
            assert averaged.tolist() == [[1.5] * 2]
            assert after.tolist() == [[1.5 + rank] * 2]


def several_passes(rank, strategy):
    gradients = {}
    for case in ("two forwards", "two backwards", "reentrant checkpoint"):
        module, wrapper, inputs = weight_gradients(rank, strategy)
        if case == "two forwards":
            (wrapper(inputs) + wrapper(2 * inputs)).sum().backward()
        elif case == "two backwards":
            wrapper(inputs).backward()
            wrapper(2 * inputs).backward()
        else:
            # A backward within backward for each segment, which ends with a callback of its own.
            inputs.requires_grad_()
            segments: list[Any] = [
                checkpoint(wrapper, x, use_reentrant=True) for x in (inputs, 2 * inputs)
            ]
            torch.cat(segments).sum().backward()
        gradients[case] = module.weight.grad
    return gradients


def test_several_passes_add_up():
    for strategies in run_ranks(on_all_strategies, "several_passes"):
        for strategy, gradients in zip(STRATEGIES, strategies, strict=True):
            for case, gradient in gradients.items():
                assert gradient.tolist() == [[4.5] * 2], (strategy, case)


def one_rank_without_loss(rank, strategy):
    module, wrapper, inputs = weight_gradients(rank, strategy)
    output = wrapper(inputs)
    if rank == 0:
        output.backward()
    wrapper.finish_gradient_synchronization()
    return module.weight.grad


def test_rank_without_any_gradient_takes_part_through_finish():
    for gradients in run_ranks(on_all_strategies, "one_rank_without_loss"):
        for gradient in gradients:
            assert gradient.tolist() == [[0.5] * 2]


def average_in_subgroup(rank):
    group: Any = dist.new_group([0, 2])
    module = vector(float(rank))
    if rank == 1:
        with pytest.raises(ValueError, match="rank 1 is not in the process group"):
            DistributedDataParallel(module, process_group=group)
        return None
    wrapper = DistributedDataParallel(module, process_group=group)
    wrapper(torch.full((1, 2), rank + 1.0, dtype=torch.float64)).backward()
    return module.weight.detach(), module.weight.grad


def test_only_the_given_group_is_averaged():
    results = run_ranks(average_in_subgroup, world_size=3)
    for weight, gradient in (results[0], results[2]):
        assert weight.tolist() == [[0.0] * 2]
        assert gradient.tolist() == [[2.0] * 2]


@pytest.fixture
def reductions(one_rank_group, monkeypatch):
    """Shapes of the all-reduces that have run."""
    shapes = []
    all_reduce = dist.all_reduce

    def recording(tensor, *args, **kwargs):
        shapes.append(tuple(tensor.shape))
        return all_reduce(tensor, *args, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", recording)
    return shapes


@pytest.mark.smoke
def test_one_rank(one_rank_group):
    torch.manual_seed(0)
    wrapped, plain = TinyModel(), TinyModel()
    plain.load_state_dict(wrapped.state_dict())
    wrapper = DistributedDataParallel(
        wrapped, process_group=one_rank_group, find_unused_parameters=True
    )
    train(wrapper, slice(None))
    train(plain, slice(None))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(wrapped.state_dict()[name], tensor), name


def test_tied_parameters_are_reduced_once_and_frozen_ones_not_at_all(reductions):
    model = TinyModel()
    wrapper = DistributedDataParallel(model, strategy="naive", find_unused_parameters=True)
    wrapper(batch(0)[0]).sum().backward()
    expected = [p.shape for p in model.parameters() if p.requires_grad]
    assert len(expected) == 5
    assert sorted(reductions) == sorted([(5,), *map(tuple, expected)])


class FailingBackward(torch.autograd.Function):
    """The identity, whose backward raises when told."""

    @staticmethod
    def forward(ctx, x, fails):
        ctx.fails = fails
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        if ctx.fails:
            raise KeyError("planted")
        return gradients[0], None


def test_backward_that_raised_does_not_stop_later_synchronization(reductions):
    model = nn.Sequential(vector(1.0), nn.Linear(1, 1, dtype=torch.float64))
    wrapper = DistributedDataParallel(model, strategy="per_parameter")
    inputs = torch.ones(1, 2, dtype=torch.float64)
    for fails in (True, False):
        hidden = FailingBackward.apply(model[0](inputs), fails)
        if fails:
            with pytest.raises(KeyError, match="planted"):
                model[1](hidden).backward()
            assert model[1].weight.grad is not None
            assert len(reductions) == 2  # had started when it raised
        else:
            model[1](hidden).backward()
    assert len(reductions) == 5
    wrapper.finish_gradient_synchronization()
    assert len(reductions) == 5


def test_forward_without_gradients_leaves_nothing_to_synchronize(reductions):
    wrapper = DistributedDataParallel(vector(1.0))
    with torch.no_grad():
        wrapper(torch.ones(1, 2, dtype=torch.float64))
    wrapper.finish_gradient_synchronization()
    assert reductions == []


def test_dropped_wrapper_frees_its_module_and_stops_synchronizing(reductions):
    model = vector(1.0)
    wrapper = DistributedDataParallel(model)
    alive = weakref.ref(wrapper)
    gc.disable()
    try:
        del wrapper
        assert alive() is None
    finally:
        gc.enable()
    model(torch.ones(1, 2, dtype=torch.float64)).backward()
    assert reductions == []


def test_wrapper_does_not_keep_a_destroyed_group_alive():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    alive = weakref.ref(dist.group.WORLD)
    wrapper = DistributedDataParallel(vector(1.0))
    wrapper(torch.ones(1, 2, dtype=torch.float64)).backward()
    dist.destroy_process_group()
    assert alive() is None
    with pytest.raises(RuntimeError, match=r"has been destroyed: use `\.module`"):
        _ = wrapper.process_group


def test_state_dict_has_the_names_of_torchs_class(one_rank_group):
    model = TinyModel()
    ours = DistributedDataParallel(model).state_dict()
    theirs = nn.parallel.DistributedDataParallel(model).state_dict()
    assert list(ours) == list(theirs)


def test_attributes_are_not_forwarded(one_rank_group):
    wrapper = DistributedDataParallel(vector(1.0))
    assert wrapper.module.in_features == 2
    with pytest.raises(AttributeError, match="in_features"):
        _ = wrapper.in_features


def test_unfreezing_after_wrapping_is_refused(one_rank_group):
    model = TinyModel()
    wrapper = DistributedDataParallel(model)
    model.frozen.bias.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"'frozen\.bias' was frozen"):
        wrapper(batch(0)[0])


def test_unknown_strategy_lists_the_valid_ones(one_rank_group):
    strategy: Any = "fast"
    with pytest.raises(
        ValueError, match="unknown strategy 'fast'; valid: 'naive', 'per_parameter', 'bucketed'"
    ):
        DistributedDataParallel(vector(1.0), strategy=strategy)


def test_without_a_process_group_torchrun_is_named():
    with pytest.raises(ValueError, match="start the program with torchrun"):
        DistributedDataParallel(vector(1.0))


def test_module_without_trainable_parameters_is_refused(one_rank_group):
    with pytest.raises(ValueError, match="no parameter of Linear requires gradients"):
        DistributedDataParallel(vector(1.0).requires_grad_(False))
    with pytest.raises(ValueError, match="no parameter of ReLU requires gradients"):
        DistributedDataParallel(nn.ReLU())


def test_what_is_no_module_is_refused(one_rank_group):
    module: Any = torch.ones(2)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not Tensor"):
        DistributedDataParallel(module)


@pytest.mark.gpu
def test_device_that_the_backend_does_not_reach_is_refused():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"on cpu, the process group \(cuda:nccl\)"):
            DistributedDataParallel(vector(1.0))
        mixed = nn.ModuleDict({"a": vector(1.0).cuda(), "b": vector(1.0)})
        with pytest.raises(ValueError, match=r"'b\.weight' is on cpu, 'a\.weight' on cuda:0"):
            DistributedDataParallel(mixed)
    finally:
        dist.destroy_process_group()
