"""The strategies beside each other on several ranks: equal bits, early starts, hooks, failures.

One group of processes runs all cases of a world size, since starting one costs more than they do.
"""

import contextlib
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.utils.checkpoint import checkpoint

from tilewright_dist import DistributedDataParallel, NonFiniteGradientError
from tilewright_dist.testing import run_ranks

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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As many as a rank has: sums added up in another order would differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def device_of(rank):
    """The GPU of this rank's number under NCCL."""
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", rank) if on_gpu else torch.device("cpu")


def rows_of(rank, step, width=WIDTH):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(ROWS, width, generator=generator).to(device_of(rank))


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


def mishaps(rank):
    """Messages of errors, by case."""
    messages = {}
    partly: Any = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    strategies: list[Any] = ["naive", "per_parameter", "bucketed"]
    for strategy in strategies:
        wrapper = DistributedDataParallel(partly, strategy=strategy)
        with pytest.raises(RuntimeError, match="no gradient arrived") as unused:
            partly["used"](torch.ones(1, 2)).sum().backward()
        messages[strategy] = str(unused.value)
        del wrapper
        partly.zero_grad()
    with pytest.raises(ValueError, match="laid out in buckets differs between ranks") as differs:
        DistributedDataParallel(nn.Linear(2, 1), bucket_cap_mb=1.0 + rank)
    return messages, str(differs.value)


def test_unused_parameters_and_options_that_differ_are_named():
    for rank, (messages, differs) in enumerate(run_ranks(mishaps)):
        for message in messages.values():
            assert message.startswith(
                f"rank {rank}: no gradient arrived for 'unused.weight', 'unused.bias'."
            )
        assert "bucket_cap_mb=2.0" in differs
        assert differs.endswith("on ranks 1. Pass the same on every rank")


def lack_at_first(rank):
    """Backward passes in which rank 0 lacks a gradient, then one in which nobody does."""
    model: Any = nn.ModuleDict({"used": nn.Linear(2, 2), "late": nn.Linear(2, 2)})
    wrapper = DistributedDataParallel(model)

    def backward(names):
        model.zero_grad()
        rows = torch.full((1, 2), rank + 1.0)
        torch.stack([model[name](rows).sum() for name in names]).sum().backward()

    for inspected in (False, True):
        context = wrapper.detect_nonfinite_gradients() if inspected else contextlib.nullcontext()
        with context:
            if rank == 0:
                with pytest.raises(RuntimeError, match=r"no gradient arrived for 'late\.weight'"):
                    backward(["used"])
            else:
                backward(["late", "used"])
    backward(["used", "late"])
    return [p.grad for p in model.parameters()]


def test_a_rank_that_lacks_gradients_at_first_leaves_nobody_waiting():
    for gradients in run_ranks(lack_at_first, timeout=60):
        assert [g.unique().tolist() for g in gradients] == [[1.5], [1.0]] * 2


class _Branches(nn.Module):
    """The first branch on all ranks, the second on rank 1, the third on none."""

    def __init__(self, branches, own):
        super().__init__()
        self.branches, self.own = branches, own

    def forward(self, x):
        taken = self.branches[0](x)
        return taken + self.branches[1](x) if self.own in (1, None) else taken


def test_branch_that_some_or_no_rank_takes():
    for found, static, never in run_ranks(take_branches):
        assert found[0].tolist() == [[1.5] * 2]
        assert found[1].tolist() == [[1.0] * 2]
        assert found[2] is None
        assert static[0].tolist() == static[1].tolist() == [[1.5] * 2]
        assert never[0].tolist() == never[1].tolist() == [[1.5] * 2]
        assert never[2] is None


def take_branches(rank):
    found = []
    searching = _Branches(nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in range(3)), own=rank)
    static = _Branches(nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in range(2)), own=None)
    never = _Branches(nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in range(3)), own=None)
    cases: Any = (
        (searching, {"find_unused_parameters": True}),
        (static, {"static_graph": True}),
        (never, {"static_graph": True, "find_unused_parameters": True}),
    )
    for model, options in cases:
        wrapper = DistributedDataParallel(model, **options, bucket_cap_mb=TINY_MB)
        for _ in range(3):
            wrapper.zero_grad()
            wrapper(torch.full((1, 2), rank + 1.0)).sum().backward()
        found.append([b.weight.grad for b in model.branches])
    return found


def odd_parameters(rank):
    """Average of mixed dtypes and memory orders, a scalar and an empty tensor."""
    module: Any = nn.Module()
    module.image = nn.Parameter(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
    module.transposed = nn.Parameter(torch.zeros(3, 2).t())
    module.sixteen_bits = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
    module.scalar = nn.Parameter(torch.zeros((), dtype=torch.float64))
    module.empty = nn.Parameter(torch.zeros(0, 2))
    module.complex = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    wrapper = DistributedDataParallel(module, bucket_cap_mb=TINY_MB)
    for _ in range(2):
        wrapper.zero_grad()
        loss = (module.complex.real * (rank + 1)).sum()
        for parameter in module.parameters():
            if not parameter.is_complex():
                factors = torch.arange(parameter.numel()).view(parameter.shape) + rank
                loss = loss + (parameter * factors).sum().float()
        loss.backward()
    assert gradient_of(module.image).is_contiguous(memory_format=torch.channels_last)
    assert all(p.grad.stride() == p.stride() for p in module.parameters())
    return {name: p.grad for name, p in module.named_parameters()}


def test_dtypes_and_memory_orders():
    for gradients in run_ranks(odd_parameters):
        for name, gradient in gradients.items():
            expected = torch.arange(gradient.numel()).view(gradient.shape) + 0.5
            if name == "complex":
                expected = torch.full((3,), 1.5, dtype=torch.complex64)
            assert torch.equal(gradient, expected.to(gradient.dtype)), name


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


def buffers_follow_rank_0(rank):
    """The running mean at forward, which momentum 0 leaves as it is."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=0.0))
    wrapper = DistributedDataParallel(model)
    kept = DistributedDataParallel(model, broadcast_buffers=False)
    mean: Any = model[1].running_mean
    means = {}

    def forward(case, wrapper):
        mean.fill_(rank + 5.0)
        wrapper(rows_of(rank, 0, 4))
        means[case] = mean.tolist()

    table = torch.full((1,), rank + 5.0)
    model.register_buffer("table", table, persistent=False)
    forward("training", wrapper)
    means["not persistent"] = table.tolist() * 4
    forward("switched off", kept)
    with wrapper.no_sync():
        forward("no_sync", wrapper)
    with torch.no_grad():
        forward("no_grad", wrapper)
    wrapper.eval()
    forward("evaluation", wrapper)
    wrapper.train()
    # Two passes before one backward: a broadcast is no change of what the first one saved.
    (wrapper(rows_of(rank, 2, 4)) + wrapper(rows_of(rank, 3, 4))).sum().backward()
    return means


def test_buffers_are_rank_0s_at_every_forward_in_training():
    for rank, means in enumerate(run_ranks(buffers_follow_rank_0)):
        assert means.pop("training") == [5.0] * 4
        for case, mean in means.items():
            assert mean == [5.0 + rank] * 4, case


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


@pytest.fixture
def one_rank_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_reentrant_checkpoints_without_static_graph_are_refused(one_rank_group):
    wrapper = DistributedDataParallel(Stack(reentrant=True))
    with pytest.raises(RuntimeError, match="under reentrant checkpointing pass static_graph=True"):
        wrapper(rows_of(0, 0)).sum().backward()


def test_complex_gradients_travel_whole_or_are_refused(one_rank_group):
    model = nn.Linear(2, 1, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"'weight' is torch\.complex64, whose imaginary part"):
        DistributedDataParallel(model, reduce_dtype=torch.bfloat16)
    DistributedDataParallel(model)


def test_static_graph_needs_tensors_in_the_output(one_rank_group):
    class Hiding(nn.Sequential):
        def forward(self, input) -> Any:
            return iter([super().forward(input)])

    wrapper = DistributedDataParallel(Hiding(nn.Linear(2, 2)), static_graph=True)
    with pytest.raises(TypeError, match="no tensor found in the list_iterator that the module"):
        wrapper(torch.ones(1, 2))
    with torch.no_grad():
        assert next(wrapper(torch.ones(1, 2))).shape == (1, 2)


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


def test_sparse_gradients_are_refused_by_name(one_rank_group):
    wrapper = DistributedDataParallel(nn.Embedding(3, 2, sparse=True))
    with pytest.raises(TypeError, match=r"gradient of 'weight' has layout torch\.sparse_coo"):
        wrapper(torch.tensor([1])).sum().backward()


def test_hooks_need_buckets_and_are_registered_once(one_rank_group):
    naive = DistributedDataParallel(nn.Linear(2, 1), strategy="naive")
    with pytest.raises(RuntimeError, match="strategy 'naive' has no buckets"):
        naive.register_comm_hook(None, default_hooks.allreduce_hook)
    wrapper = DistributedDataParallel(nn.Linear(2, 1))
    wrapper.register_comm_hook(None, default_hooks.allreduce_hook)
    with pytest.raises(RuntimeError, match="registered already"):
        wrapper.register_comm_hook(None, default_hooks.allreduce_hook)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bucket_cap_mb": 0}, "bucket_cap_mb must be positive, not 0"),
        ({"first_bucket_mb": -1.0}, "first_bucket_mb must be positive"),
        ({"reduce_dtype": torch.int32}, "floating-point dtype, not torch.int32"),
    ],
)
def test_options_out_of_range(one_rank_group, options, message):
    with pytest.raises(ValueError, match=message):
        DistributedDataParallel(nn.Linear(2, 1), **options)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("strategy", ["per_parameter", "bucketed"])
@pytest.mark.parametrize("reduce_dtype", [None, torch.bfloat16])
def test_a_step_does_not_wait_for_the_device(strategy, reduce_dtype):
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = Stack().cuda()
        wrapper = DistributedDataParallel(model, strategy=strategy, reduce_dtype=reduce_dtype)
        rows = rows_of(0, 0)
        for mode in ("default", "default", "error"):  # buckets are rebuilt after the first
            torch.cuda.set_sync_debug_mode(mode)
            wrapper(rows).square().mean().backward()
            model.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
