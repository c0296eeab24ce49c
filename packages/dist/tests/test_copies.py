"""Averages by copies between ranks: their values, their order of addition, uneven pieces.

On CPUs the memory that ranks read from each other is a file that all of them have mapped.
"""

import copy
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from tilewright_dist import (
    DistributedDataParallel,
    ShardedOptimizer,
    bucketed,
    copies,
    data_parallel,
    stream_operations,
)
from tilewright_dist.channel import Channel
from tilewright_dist.layout import BucketLayout, Slot, round_up
from tilewright_dist.peers import GPUPeers, PeerBuffer
from tilewright_dist.stream_operations import Copies, Piece
from tilewright_dist.testing import run_ranks
from tilewright_dist.testing_models import Stack, adamw_groups, device_of, rows_of, train

pytestmark = pytest.mark.usefixtures("one_thread")

LANDING = 2**14  # bytes: pieces of some thousands of elements go in turns


class HostPeers:
    """Processes of one host; a barrier of the group stands for one of streams."""

    def __init__(self, group, folder):
        self.rank, self.world_size = group.rank(), group.size()
        self._folder, self._number = Path(folder), 0

    def allocate(self, sizes, dtypes):
        # In one piece of memory behind another, as on GPUs.
        self._number += 1
        starts = [0]
        for size, dtype in zip(sizes, dtypes, strict=True):
            starts.append(round_up(starts[-1] + size * dtype.itemsize, 512))
        files = [
            torch.from_file(
                str(self._folder / f"{self._number}-{rank}"),
                shared=True,
                size=max(1, starts[-1]),
                dtype=torch.uint8,
            )
            for rank in range(self.world_size)
        ]
        dist.barrier()
        return [
            PeerBuffer(
                [file[start : start + size * dtype.itemsize].view(dtype) for file in files],
                self.rank,
            )
            for start, size, dtype in zip(starts, sizes, dtypes, strict=False)
        ]

    def copies(self, pieces):
        return Copies(pieces[::-1])  # any order is right

    def barrier(self):
        dist.barrier()


BOUNDS = {
    "even": lambda ranks: [256 * 40 * r for r in range(ranks + 1)],
    "uneven": lambda ranks: [0, *([256 * 9] * (ranks - 1)), 256 * 30],
    "empty": lambda ranks: [0] * (ranks + 1),
}


def values_of(rank, size):
    return torch.randn(size, generator=torch.Generator().manual_seed(rank))


def run(exchange):
    for _ in exchange:
        pass


SIZES = (5, 0, 700, 20_000, 64)
"""Of tensors that are averaged where they are: one needs several turns, some share one."""


def make_small():
    copies.LANDING_BYTES = LANDING


def layout_of(bounds):
    """Two tensors with a gap between them, cut by the bounds."""
    half = bounds[-1] // 2
    slots = (Slot("first", 0, max(0, half - 100)), Slot("second", half, bounds[-1]))
    return BucketLayout(dtype=torch.float32, partition="flat", slots=slots, bounds=tuple(bounds))


def exchange_all_ways(rank, folder):
    """Results by form of the bounds and exchange."""
    make_small()
    peers = HostPeers(dist.group.WORLD, folder)
    found: dict[tuple[str, Any], torch.Tensor] = {}
    (landing,) = peers.allocate([copies.landing_bytes(peers)], [torch.uint8])
    for form, make_bounds in BOUNDS.items():
        bounds = make_bounds(peers.world_size)
        (buffer,) = peers.allocate([bounds[-1]], [torch.float32])
        buffer.memory.copy_(values_of(rank, bounds[-1]))
        run(copies.Gathering(buffer, bounds, peers).run())
        found[form, "all_gather"] = buffer.memory.clone()
        layout = layout_of(bounds)
        for dtype in (None, torch.bfloat16, torch.float64):
            values = values_of(rank, bounds[-1])
            parts = [values[slot.start : slot.stop] for slot in layout.slots]
            run(copies.Scattering(layout, landing, peers, dtype).run(parts))
            found[form, dtype] = values
    for dtype in (None, torch.float64, torch.bfloat16):
        averaging = copies.Averaging(SIZES, torch.float32, landing, peers, dtype)
        for _ in range(2):  # what landed before is not in the way
            tensors = list(values_of(rank, sum(SIZES)).split(SIZES))
            run(averaging.run(tensors))
        found["average", dtype] = torch.cat(tensors)
    return found


@pytest.fixture(scope="module", params=[2, 3])
def exchanged(request):
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(exchange_all_ways, folder, world_size=request.param)


@pytest.mark.parametrize("form", BOUNDS)
def test_pieces(exchanged, form):
    ranks = len(exchanged)
    bounds = BOUNDS[form](ranks)
    inputs = torch.stack([values_of(rank, bounds[-1]) for rank in range(ranks)])
    # The bits of one process that adds in the order of ranks: where a number lies is no matter.
    averages = {
        None: inputs.mean(0),
        torch.bfloat16: inputs.bfloat16().float().mean(0),
        torch.float64: inputs.double().mean(0).float(),
    }
    gathered = torch.cat([inputs[r, bounds[r] : bounds[r + 1]] for r in range(ranks)])
    for rank, found in enumerate(exchanged):
        assert torch.equal(found[form, "all_gather"], gathered)
        for dtype, average in averages.items():
            expected = inputs[rank].clone()
            for segment in layout_of(bounds).segments(rank):
                part = slice(segment.offset, segment.offset + segment.stop - segment.start)
                expected[part] = average[part]
            assert torch.equal(found[form, dtype], expected)


def test_averages_where_values_are(exchanged):
    inputs = torch.stack([values_of(rank, sum(SIZES)) for rank in range(len(exchanged))])
    rounded = inputs.bfloat16().float().mean(0).bfloat16().float()
    for found in exchanged:
        assert torch.equal(found["average", None], inputs.mean(0))
        assert torch.equal(found["average", torch.float64], inputs.double().mean(0).float())
        assert torch.equal(found["average", torch.bfloat16], rounded)


def pretend(folder):
    """Let processes on a CPU take copies."""
    make_small()
    numbers = iter(range(100))

    def peers_of(group, _):
        place = Path(folder) / str(next(numbers))
        place.mkdir(exist_ok=True)
        return HostPeers(group, place)

    vars(bucketed)["GPUPeers"] = peers_of
    vars(data_parallel)["can_copy"] = lambda *_: ""


def train_by(rank, transports, folder, backend):
    """Weights after DistributedDataParallel and ShardedOptimizer, by transport and case."""
    if backend == "gloo":
        pretend(folder)
    found = {}
    for transport in transports:
        for case, dtype in (("plain", None), ("narrow", torch.bfloat16), ("wide", torch.float64)):
            for form in ("replicated", "flat", "matrix"):
                model = Stack().to(device_of(rank))
                wrapper = DistributedDataParallel(
                    model, bucket_cap_mb=2e-3, reduce_dtype=dtype, transport=transport
                )
                optimizer: Any = torch.optim.AdamW(adamw_groups(model), lr=0.01)
                if form != "replicated":
                    optimizer = ShardedOptimizer.from_optimizer(
                        optimizer, ddp=wrapper, partition=form
                    )
                found[transport, case, form] = train(wrapper, optimizer, rank)
    return found


@pytest.mark.parametrize(
    ("backend", "world_size"),
    [
        ("gloo", 2),
        pytest.param("nccl", 2, marks=pytest.mark.multigpu(2)),
        pytest.param("nccl", 4, marks=pytest.mark.multigpu(4)),
    ],
)
def test_training_by_copies_equals_training_by_collectives(backend, world_size):
    transports = ("copy", "collective")
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(
            train_by, transports, folder, backend, world_size=world_size, backend=backend
        )
    for found in ranks:
        for (transport, *case), weights in found.items():
            expected = ranks[0]["collective", *case]
            if transport == "copy" and world_size == 2:
                assert torch.equal(weights, expected), case
            elif transport == "copy":
                torch.testing.assert_close(
                    weights,
                    expected,
                    rtol=1e-5,
                    atol=1e-5,
                    msg=lambda text, case=case: f"{case}: {text}",
                )


def test_sharded_and_plain_training_are_equal_at_any_number_of_ranks():
    # Ranks are added up in their order, whoever adds: collectives promise that for two only.
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(train_by, ("copy",), folder, "gloo", world_size=3, timeout=90)
    for found in ranks:
        for case in ("plain", "wide"):
            for form in ("flat", "matrix"):
                replicated = found["copy", case, "replicated"]
                assert torch.equal(found["copy", case, form], replicated), (case, form)


SMALL_MB: dict[str, Any] = {"bucket_cap_mb": 2e-3}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": SMALL_MB,
    "static graph": SMALL_MB | {"static_graph": True},
    "unused found": SMALL_MB | {"find_unused_parameters": True},
    "no views": SMALL_MB | {"gradient_as_bucket_view": False},
    "a bucket each": {"bucket_cap_mb": 1e-6, "first_bucket_mb": 1e-6},
    "hook": SMALL_MB,
}


def accumulate_by(rank, transport, folder, backend):
    """Gradients by options after two backwards under no_sync and one outside; twice, then twice
    with parameters that rank 1 lacks, where they are looked for."""
    if backend == "gloo":
        pretend(folder)
    found = {}
    for case, options in OPTIONS.items():
        model: Any = Stack().to(device_of(rank))
        wrapper = DistributedDataParallel(model, transport=transport, **options)
        if case == "hook":
            wrapper.register_comm_hook(None, default_hooks.allreduce_hook)

        def backward(micro, wrapper=wrapper):
            wrapper(rows_of(rank, micro).to(device_of(rank))).square().mean().backward()

        for number in range(4 if case == "unused found" else 2):
            wrapper.zero_grad(set_to_none=number != 1)
            if number > 1 and rank == 1:
                # The loss of this rank is that of the first block alone.
                model.blocks[0](rows_of(rank, 0).to(device_of(rank))).sum().backward()
                wrapper.finish_gradient_synchronization()
                continue
            if number < 2 and case != "static graph":
                with wrapper.no_sync():
                    backward(0)
                    backward(1)
            backward(2)
        parts = [p.grad for p in model.parameters() if p.grad is not None]
        found[case] = torch.cat([part.reshape(-1).cpu() for part in parts])
    return found


@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=pytest.mark.multigpu(2))])
def test_options_mean_the_same_with_copies(backend):
    with tempfile.TemporaryDirectory() as folder:
        expected, found = (
            run_ranks(accumulate_by, transport, folder, backend, backend=backend, timeout=90)
            for transport in ("collective", "copy")
        )
    for case in OPTIONS:
        assert torch.equal(expected[0][case], expected[1][case]), case
        for rank in found:
            assert torch.equal(rank[case], expected[0][case]), case


def test_copies_need_gpus_of_one_host_and_buckets():
    for message in run_ranks(refuse):
        assert "as the ranks are not on GPUs: use transport='auto' or 'collective'" in message


def refuse(rank):
    with pytest.raises(ValueError, match="strategy 'naive' has no buckets"):
        DistributedDataParallel(nn.Linear(2, 1), strategy="naive", transport="copy")
    with pytest.raises(ValueError, match="not possible") as not_here:
        DistributedDataParallel(nn.Linear(2, 1), transport="copy")
    return str(not_here.value)


def scatter_twice(rank, folder):
    pretend(folder)
    model = Stack()
    wrapper = DistributedDataParallel(model, transport="copy")
    kind: Any = torch.optim.AdamW
    optimizer = ShardedOptimizer(model.parameters(), kind, ddp=wrapper, lr=0.01)

    def backward(micro):
        wrapper(rows_of(rank, micro)).square().mean().backward()

    backward(0)
    with pytest.raises(RuntimeError, match="added to one that is averaged and scattered"):
        backward(1)
    # By the module: the optimizer does not hear of it.
    model.zero_grad()
    with wrapper.no_sync():
        backward(0)
    backward(1)
    optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    optimizer.wait_for_parameters()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_gradients_are_scattered_once():
    with tempfile.TemporaryDirectory() as folder:
        one, other = run_ranks(scatter_twice, folder)
    assert torch.equal(one, other)
    assert not torch.equal(one, torch.cat([p.detach().reshape(-1) for p in Stack().parameters()]))


class Summed(nn.Module):
    """Two parameters to which autograd hands views of one gradient."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.zeros(32, 32))
        self.other = nn.Parameter(torch.zeros(1024, 1))

    def forward(self, x):
        return ((self.one.view(-1) + self.other.view(-1)) * x).sum()


def share_storage(rank, folder):
    """Weights by form, and gradients that accumulated, where two gradients are one."""
    pretend(folder)
    found = {}
    kind: Any = torch.optim.SGD
    for cap in (1e-6, 25.0):
        for transport in ("collective", "copy"):
            for form in ("replicated", "flat", "matrix"):
                model = Summed()
                wrapper = DistributedDataParallel(
                    model, transport=transport, bucket_cap_mb=cap, first_bucket_mb=cap
                )
                optimizer: Any = kind(model.parameters(), lr=1.0)
                if form != "replicated":
                    optimizer = ShardedOptimizer(
                        model.parameters(), kind, ddp=wrapper, partition=form, lr=1.0
                    )
                x = torch.full((1024,), float(rank + 1))
                for times in (1, 2):
                    with wrapper.no_sync():
                        for _ in range(times - 1):
                            wrapper(x).backward()
                    wrapper(x).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                if form != "replicated":
                    optimizer.wait_for_parameters()
                found[cap, transport, form] = [p.detach().clone() for p in model.parameters()]
    return found


def test_gradients_that_share_storage_are_averaged_once():
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(share_storage, folder)
    for found in ranks:
        for case, weights in found.items():
            for weight in weights:
                # The mean of 1 and 2, in one backward and then in two.
                assert torch.equal(weight, torch.full_like(weight, -4.5)), case


def default_transports(rank, folder):
    """How many ranks share memory, by choice; at first while no rank but the last one fails."""
    pretend(folder)
    with_peers = vars(bucketed)["GPUPeers"]

    class Failing(HostPeers):
        def allocate(self, sizes, dtypes):
            if self.rank == self.world_size - 1:
                raise RuntimeError("no memory left")
            return []

    found: dict[str, Any] = {}
    makers = {"": with_peers, " failing": lambda group, _: Failing(group, folder)}
    for name, make in makers.items():
        vars(bucketed)["GPUPeers"] = make
        for transport in ("default", "auto", "copy"):
            options: dict[str, Any] = {} if transport == "default" else {"transport": transport}
            try:
                wrapper = DistributedDataParallel(Stack(), **options)
            except RuntimeError as error:
                found[transport + name] = str(error)
                continue
            reducer: Any = wrapper.reducer
            found[transport + name] = reducer.shared_bytes > 0
            wrapper(rows_of(rank, 0)).square().mean().backward()
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_who_copies(world_size):
    with tempfile.TemporaryDirectory() as folder:
        for found in run_ranks(default_transports, folder, world_size=world_size):
            refused = found.pop("copy failing")
            assert f"(rank {world_size - 1}: no memory left): use transport='coll" in refused
            assert found == {
                "default": False,
                "auto": world_size == 2,  # what has been verified
                "copy": True,
                "default failing": False,
                "auto failing": False,
            }


def test_no_copies_in_a_captured_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    peers = GPUPeers.__new__(GPUPeers)
    monkeypatch.setattr(stream_operations, "_batched_copies", lambda: pytest.fail)
    with pytest.raises(RuntimeError, match=r"CUDA graph.*use transport='collective'"):
        peers.barrier()
    # Before the driver is asked, whose refusal would end the capture.
    with pytest.raises(RuntimeError, match=r"CUDA graph.*use transport='collective'"):
        peers.copies([Piece(0, 0, 1, torch.zeros(1), 0)]).send([torch.zeros(1)])


def test_a_copy_of_the_wrapper_would_not_average(one_rank_group):
    model = Stack()
    wrapper = DistributedDataParallel(model)
    optimizer = ShardedOptimizer(model.parameters(), torch.optim.SGD, ddp=wrapper, lr=1.0)  # pyrefly: ignore
    with pytest.raises(TypeError, match=r"copy or save `\.module`, then wrap the copy"):
        copy.deepcopy(wrapper)
    with pytest.raises(TypeError, match="load them into a new one"):
        copy.deepcopy(optimizer)
    copy.deepcopy(wrapper.module)


@pytest.mark.gpu
def test_memory_that_is_sent_lives_until_it_is():
    tensor = torch.ones(1000, device="cuda")
    gone = weakref.ref(tensor)
    handle = Channel(tensor.device).start(iter([None]), [tensor])  # pyrefly: ignore
    del tensor
    assert gone() is not None
    handle.wait()
    assert gone() is None
