"""Modules that differ are refused on every rank; what agrees is filled with rank 0's values."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tilewright_dist import DistributedDataParallel
from tilewright_dist.module_state import broadcast_module_state, verify_module_state
from tilewright_dist.testing import run_ranks


def module_of(**tensors):
    """A module with the given tensors: floating-point leaves as parameters, tuples as buffers."""
    module = nn.Module()
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            module.register_buffer(name, tensor[0])
        else:
            module.register_parameter(name, tensor)
    return module


def parameter(*shape, dtype=torch.float32, device="cpu", requires_grad=True):
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad)


A = "parameter 'a' float32 (2,) on cpu"

# What ranks 0 and 2 hold, what rank 1 holds, what the message says.
MISMATCHES = {
    "shape": (
        lambda: module_of(a=parameter(2)),
        lambda: module_of(a=parameter(3)),
        f"{A} on ranks 0, 2; parameter 'a' float32 (3,) on cpu on rank 1",
    ),
    "dtype": (
        lambda: module_of(a=parameter(2)),
        lambda: module_of(a=parameter(2, dtype=torch.float64)),
        f"{A} on ranks 0, 2; parameter 'a' float64 (2,) on cpu on rank 1",
    ),
    "absent": (
        lambda: module_of(a=parameter(2), b=parameter(2)),
        lambda: module_of(a=parameter(2)),
        "parameter 'b' float32 (2,) on cpu on ranks 0, 2; nothing in its place on rank 1",
    ),
    "order": (
        lambda: module_of(a=parameter(2), b=parameter(2)),
        lambda: module_of(b=parameter(2), a=parameter(2)),
        f"{A} on ranks 0, 2; parameter 'b' float32 (2,) on cpu on rank 1",
    ),
    "frozen": (
        lambda: module_of(a=parameter(2)),
        lambda: module_of(a=parameter(2, requires_grad=False)),
        f"{A} on ranks 0, 2; {A}, frozen on rank 1",
    ),
    "buffer": (
        lambda: module_of(a=parameter(2), c=(torch.zeros(1),)),
        lambda: module_of(a=parameter(2), c=(torch.zeros(1, dtype=torch.int64),)),
        "buffer 'c' float32 (1,) on cpu on ranks 0, 2; buffer 'c' int64 (1,) on cpu on rank 1",
    ),
    "not materialised": (
        lambda: module_of(a=parameter(2)),
        lambda: module_of(a=parameter(2, device="meta")),
        f"{A} on ranks 0, 2; parameter 'a' float32 (2,) on meta on rank 1",
    ),
}


def wrap_mismatches(rank):
    messages = {}
    for case, (usual, other, _) in MISMATCHES.items():
        with pytest.raises(ValueError, match="differs between ranks") as caught:
            DistributedDataParallel((other if rank == 1 else usual)())
        messages[case] = str(caught.value)
    return messages


@pytest.fixture(scope="module")
def mismatch_messages():
    """One group of processes for all cases: messages of each rank by case."""
    return run_ranks(wrap_mismatches, world_size=3)


@pytest.mark.parametrize("case", MISMATCHES)
def test_every_rank_names_the_tensor_and_the_ranks(mismatch_messages, case):
    expected = MISMATCHES[case][2]
    for messages in mismatch_messages:
        assert f"{expected}. " in messages[case]


def varied_module(rank, device):
    """Tensors of every kind that a broadcast could get wrong, filled with rank + 1."""
    fill = rank + 1
    return module_of(
        weight=nn.Parameter(torch.full((3, 2), float(fill), device=device)),
        transposed=nn.Parameter(torch.arange(6.0, device=device).view(3, 2).mul(fill).t()),
        sixteen_bits=nn.Parameter(torch.full((3,), fill / 3, device=device, dtype=torch.bfloat16)),
        scalar=nn.Parameter(torch.full((), float(fill), device=device, dtype=torch.float64)),
        frozen=nn.Parameter(torch.full((2,), float(fill), device=device), requires_grad=False),
        empty=nn.Parameter(torch.zeros(0, 2, device=device)),
        mask=(torch.tensor([rank == 0, True], device=device),),
        eight_bits=(torch.full((2,), float(fill), device=device).to(torch.float8_e4m3fn),),
        phase=(torch.full((2,), complex(fill, -fill), device=device),),
        counter=(torch.full((), fill, dtype=torch.int64),),  # on the CPU also beside CUDA
    )


def broadcast_varied(rank, device_type):
    device = torch.device(f"cuda:{rank}" if device_type == "cuda" else "cpu")
    group = dist.group.WORLD
    assert group is not None
    module = varied_module(rank, device)
    verify_module_state(module, group)
    broadcast_module_state(module, group, device)
    return {name: tensor.cpu() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    ("backend", "device_type"),
    [("gloo", "cpu"), pytest.param("nccl", "cuda", marks=pytest.mark.multigpu(2))],
)
def test_all_ranks_hold_the_values_of_rank_0(backend, device_type):
    expected = varied_module(0, torch.device("cpu")).state_dict()
    for state in run_ranks(broadcast_varied, device_type, backend=backend):
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            assert state[name].dtype == tensor.dtype
            # As float32, since float8 has no comparison.
            torch.testing.assert_close(
                torch.view_as_real(state[name]) if tensor.is_complex() else state[name].float(),
                torch.view_as_real(tensor) if tensor.is_complex() else tensor.float(),
                rtol=0,
                atol=0,
            )


def test_meta_tensors_on_all_ranks_are_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = module_of(a=parameter(2), b=parameter(2, device="meta"))
        with pytest.raises(ValueError, match=r"parameter 'b' .* has no values yet: call to_empty"):
            DistributedDataParallel(module)
    finally:
        dist.destroy_process_group()


def rows_of(rank, step):
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(1000 * step + rank))


def buffers_follow_rank_0(rank):
    """The running mean at forward, which momentum 0 leaves as it is."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=0.0))
    wrapper = DistributedDataParallel(model)
    kept = DistributedDataParallel(model, broadcast_buffers=False)
    mean: Any = model[1].running_mean
    means = {}

    def forward(case, wrapper):
        mean.fill_(rank + 5.0)
        wrapper(rows_of(rank, 0))
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
    (wrapper(rows_of(rank, 2)) + wrapper(rows_of(rank, 3))).sum().backward()
    return means


def test_buffers_are_rank_0s_at_every_forward_in_training():
    for rank, means in enumerate(run_ranks(buffers_follow_rank_0)):
        assert means.pop("training") == [5.0] * 4
        for case, mean in means.items():
            assert mean == [5.0 + rank] * 4, case
