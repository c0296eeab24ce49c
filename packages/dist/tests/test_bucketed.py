"""The strategies beside each other on several ranks: equal bits, early starts, hooks, accumulation.

One group of processes runs all cases of a world size, since starting one costs more than they do.
"""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.utils.checkpoint import checkpoint

from tilewright_dist import DistributedDataParallel
from tilewright_dist.testing import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, BLOCKS, ROWS = 16, 3, 4
TINY_MB = 1e-6  # below every tensor: one bucket each
SMALL_MB = 2e-3  # two matrices of WIDTH x WIDTH in float32


def gradient_of(parameter):
    assert parameter.grad is not None
    return parameter.grad


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Stack(nn.Module):
    """Blocks, and a head that is tied to the input's weight: first registered, last complete."""

    def __init__(self, seed=0, reentrant=False):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embed.weight
        self.reentrant = reentrant

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True) if self.reentrant else block(x)
        return self.head(x)


def device_of(rank):
    """The GPU of this rank's number under NCCL."""
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", rank) if on_gpu else torch.device("cpu")


def rows_of(rank, step):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(ROWS, WIDTH, generator=generator).to(device_of(rank))


def train(wrapper, rank, steps=3, lr=0.1):
    """SGD with momentum; the weights afterwards, in one tensor."""
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=lr, momentum=0.9)
    for step in range(steps):
        wrapper(rows_of(rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().reshape(-1).cpu() for p in wrapper.module.parameters()])


# Every row has to give the bits of the first one.
EQUAL: dict[str, dict[str, Any]] = {
    "naive": {"strategy": "naive"},
    "per_parameter": {"strategy": "per_parameter"},
    "bucketed": {},
    "a bucket each": {"bucket_cap_mb": TINY_MB},
    "several buckets": {"bucket_cap_mb": SMALL_MB, "first_bucket_mb": TINY_MB},
    "copies": {"gradient_as_bucket_view": False, "bucket_cap_mb": SMALL_MB},
    "static graph": {"static_graph": True, "bucket_cap_mb": SMALL_MB},
    "unused found": {"find_unused_parameters": True, "bucket_cap_mb": SMALL_MB},
    "static per_parameter": {"static_graph": True, "strategy": "per_parameter"},
}

# Additions in float64, in bfloat16's precision on the wire, with torch's hooks.
REDUCE_DTYPES: dict[str, dict[str, Any]] = {
    "wide": {"reduce_dtype": torch.float64},
    "narrow": {"reduce_dtype": torch.bfloat16},
    "narrow naive": {"reduce_dtype": torch.bfloat16, "strategy": "naive"},
    "narrow per_parameter": {"reduce_dtype": torch.bfloat16, "strategy": "per_parameter"},
}


def train_all_ways(rank):
    weights = {}
    for case, options in {**EQUAL, **REDUCE_DTYPES}.items():
        model = Stack(rank).to(device_of(rank))
        weights[case] = train(DistributedDataParallel(model, **options), rank)
    reentrant = DistributedDataParallel(
        Stack(rank, reentrant=True).to(device_of(rank)),
        static_graph=True,
        bucket_cap_mb=SMALL_MB,
    )
    weights["reentrant"] = train(reentrant, rank)
    hooks: dict[str, tuple[Any, Any]] = {
        "allreduce_hook": (None, default_hooks.allreduce_hook),
        "bf16_compress_hook": (None, default_hooks.bf16_compress_hook),
        "fp16_compress_wrapper": (
            None,
            default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook),
        ),
        "powerSGD_hook": (
            powerSGD_hook.PowerSGDState(
                process_group=None, matrix_approximation_rank=WIDTH, start_powerSGD_iter=2
            ),
            powerSGD_hook.powerSGD_hook,
        ),
    }
    for case, (state, hook) in hooks.items():
        # One bucket for PowerSGD, whose callbacks wait in gloo's two threads for one another.
        cap = 1.0 if state is not None else SMALL_MB
        model = Stack(rank).to(device_of(rank))
        wrapper = DistributedDataParallel(model, bucket_cap_mb=cap)
        wrapper.register_comm_hook(state, hook)
        weights[case] = train(wrapper, rank)
    return weights


def train_alone(world_size, dtype):
    """One process on the joined batch."""
    model = Stack().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        rows = torch.cat([rows_of(rank, step) for rank in range(world_size)])
        model(rows.to(dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


GROUPS = [
    ("gloo", 2),
    ("gloo", 3),
    ("gloo", 4),
    pytest.param(("nccl", 2), marks=pytest.mark.multigpu(2)),
    pytest.param(("nccl", 4), marks=pytest.mark.multigpu(4)),
]


@pytest.fixture(scope="module", params=GROUPS, ids=lambda group: f"{group[0]}-{group[1]}")
def weights(request):
    """Weights by case, of each rank, and those of one process in float64."""
    backend, world_size = request.param
    ranks = run_ranks(train_all_ways, world_size=world_size, backend=backend, timeout=90)
    return ranks, train_alone(world_size, torch.float64)


@pytest.mark.parametrize("case", [*EQUAL, *REDUCE_DTYPES, "reentrant"])
def test_replicas_stay_equal(weights, case):
    ranks, _ = weights
    assert all(torch.equal(rank[case], ranks[0][case]) for rank in ranks)


@pytest.mark.parametrize("case", [*EQUAL, "reentrant"])
def test_equals_naive(weights, case):
    ranks, _ = weights
    if len(ranks) == 2:
        # Two terms have one sum, whatever the order.
        assert torch.equal(ranks[0][case], ranks[0]["naive"])
    else:
        # gloo adds in an order that depends on where in its buffer a number lies.
        torch.testing.assert_close(ranks[0][case], ranks[0]["naive"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "tolerance"),
    [
        ("naive", 2e-6),
        ("bucketed", 2e-6),
        ("wide", 2e-6),
        # 8 bits of mantissa: 2⁻⁹ of a gradient, times the learning rates of three steps.
        ("narrow", 2e-3),
        ("narrow naive", 2e-3),
        ("narrow per_parameter", 2e-3),
        ("allreduce_hook", 2e-6),
        ("bf16_compress_hook", 2e-3),
        ("fp16_compress_wrapper", 2e-3),
        # Full rank: nothing is lost but rounding.
        ("powerSGD_hook", 1e-4),
    ],
)
def test_equals_one_process_on_the_joined_batch(weights, case, tolerance):
    ranks, alone = weights
    error = (ranks[0][case].double() - alone).abs().max().item()
    assert error < tolerance


def two_equal_batches(rank):
    return train(DistributedDataParallel(Stack(), bucket_cap_mb=SMALL_MB), rank=0)


def test_two_ranks_with_one_batch_give_the_bits_of_one_process():
    # (g + g) / 2 is exact, so nothing may differ from a process alone.
    plain = Stack()
    expected = train(_Unwrapped(plain), rank=0)
    for found in run_ranks(two_equal_batches):
        assert torch.equal(found, expected)


class _Unwrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def observe_starts(rank):
    """What happens in one backward, in order: "hook" and "start"."""
    seen = {}
    for case in ("per_parameter", "bucketed", "first backward", "compiled"):
        model = Stack()
        if case == "compiled":
            for block in model.blocks:
                block.compile(fullgraph=True, backend="aot_eager")
        events: list[str] = []
        all_reduce = dist.all_reduce

        def recording(*args, events=events, all_reduce=all_reduce, **kwargs):
            events.append("start")
            return all_reduce(*args, **kwargs)

        strategy: Any = "per_parameter" if case == "per_parameter" else "bucketed"
        wrapper = DistributedDataParallel(
            model, strategy=strategy, bucket_cap_mb=SMALL_MB, first_bucket_mb=TINY_MB
        )
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda _, events=events: events.append("hook")
            )
        dist.all_reduce = recording
        try:
            for _ in range(1 if case == "first backward" else 2):
                events.clear()
                wrapper(rows_of(rank, 0)).square().mean().backward()
                wrapper.zero_grad()
        finally:
            dist.all_reduce = all_reduce
        seen[case] = list(events)
    return seen


def test_collectives_start_while_backward_goes_on():
    for seen in run_ranks(observe_starts, timeout=60):
        for case, events in seen.items():
            last_hook = len(events) - 1 - events[::-1].index("hook")
            early = events[:last_hook].count("start")
            # All but the last bucket, or the last parameter, had started by then.
            assert early >= events.count("start") - 2 > 0, (case, events)


def flat_gradient(module):
    return torch.cat([gradient_of(p).reshape(-1) for p in module.parameters()])


def accumulate(rank):
    """Gradients after two backwards under no_sync and one outside, and where they lie."""
    wrapper = DistributedDataParallel(Stack(), bucket_cap_mb=SMALL_MB)
    gradients = []
    for set_to_none in (True, False, True):
        with wrapper.no_sync():
            for micro in range(2):
                wrapper(rows_of(rank, micro)).square().mean().backward()
        wrapper(rows_of(rank, 2)).square().mean().backward()
        addresses = [gradient_of(p).data_ptr() for p in wrapper.parameters()]
        gradients.append(flat_gradient(wrapper))
        wrapper.zero_grad(set_to_none=set_to_none)
    wrapper(rows_of(rank, 2)).square().mean().backward()
    assert addresses == [gradient_of(p).data_ptr() for p in wrapper.parameters()]
    return gradients


def test_accumulation_adds_in_the_buckets():
    model = Stack()
    for rank in range(2):
        for micro in range(3):
            (model(rows_of(rank, micro)).square().mean() / 2).backward()
    expected = flat_gradient(model)
    for gradients in run_ranks(accumulate):
        for gradient in gradients:
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_reentrant_checkpoints_without_static_graph_are_refused(one_rank_group):
    wrapper = DistributedDataParallel(Stack(reentrant=True))
    with pytest.raises(RuntimeError, match="under reentrant checkpointing pass static_graph=True"):
        wrapper(rows_of(0, 0)).sum().backward()


@pytest.mark.parametrize("passes_before", [0, 1])
@pytest.mark.parametrize(
    "options",
    [{}, {"static_graph": True}, {"static_graph": True, "strategy": "per_parameter"}],
    ids=["bucketed", "static bucketed", "static per_parameter"],
)
def test_backward_that_raised_leaves_the_reducer_usable(one_rank_group, options, passes_before):
    model = Stack()
    wrapper = DistributedDataParallel(model, bucket_cap_mb=SMALL_MB, **options)
    for _ in range(passes_before):
        wrapper(rows_of(0, 0)).sum().backward()
    first: Any = model.blocks[0]
    handle = first.norm.weight.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        wrapper(rows_of(0, 0)).sum().backward()
    handle.remove()
    wrapper.zero_grad()
    for _ in range(2):
        wrapper.zero_grad()
        wrapper(rows_of(0, 0)).sum().backward()
    found = [gradient_of(p).clone() for p in model.parameters()]
    plain = Stack()
    plain(rows_of(0, 0)).sum().backward()
    for gradient, parameter in zip(found, plain.parameters(), strict=True):
        assert torch.equal(gradient, gradient_of(parameter))


def test_gradients_that_are_part_of_a_graph_keep_it(one_rank_group):
    model = nn.Linear(2, 1, bias=False)
    wrapper = DistributedDataParallel(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # create_graph warns of reference cycles
        wrapper(torch.ones(1, 2)).square().sum().backward(create_graph=True)
    assert gradient_of(model.weight).requires_grad
    model.weight.grad = None


def test_hooks_need_buckets_and_are_registered_once(one_rank_group):
    naive = DistributedDataParallel(nn.Linear(2, 1), strategy="naive")
    with pytest.raises(RuntimeError, match="strategy 'naive' has no buckets"):
        naive.register_comm_hook(None, default_hooks.allreduce_hook)
    wrapper = DistributedDataParallel(nn.Linear(2, 1))
    wrapper.register_comm_hook(None, default_hooks.allreduce_hook)
    with pytest.raises(RuntimeError, match="registered already"):
        wrapper.register_comm_hook(None, default_hooks.allreduce_hook)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("strategy", ["per_parameter", "bucketed"])
@pytest.mark.parametrize("reduce_dtype", [None, torch.bfloat16])
def test_a_step_does_not_wait_for_the_device(strategy, reduce_dtype):
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, plain = Stack().cuda(), Stack().cuda()
        wrapper = DistributedDataParallel(model, strategy=strategy, reduce_dtype=reduce_dtype)
        rows = rows_of(0, 0).cuda()
        for mode in ("default", "default", "error"):  # buckets are rebuilt after the first
            model.zero_grad()
            torch.cuda.set_sync_debug_mode(mode)
            wrapper(rows).square().mean().backward()
        torch.cuda.set_sync_debug_mode("default")
        plain(rows).square().mean().backward()
        expected = flat_gradient(plain)
        # Of bfloat16 two roundings, 2⁻⁹ each.
        tolerance = 1e-5 if reduce_dtype is None else 2**-8
        torch.testing.assert_close(flat_gradient(model), expected, rtol=tolerance, atol=1e-6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
