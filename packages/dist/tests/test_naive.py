"""The averages themselves: missing gradients, memory layouts, dtypes, no waiting for the device."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tilewright_dist.naive import NaiveReducer
from tilewright_dist.options import ReducerOptions
from tilewright_dist.testing import run_ranks


def reduce(gradients, parameters=None):
    """Average given gradients (None: missing) of fresh parameters; returns the parameters."""
    if parameters is None:
        parameters = [nn.Parameter(torch.zeros(2)) for _ in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    named = {f"p{index}": parameter for index, parameter in enumerate(parameters)}
    group = dist.group.WORLD
    assert group is not None
    NaiveReducer(named, group, ReducerOptions(find_unused_parameters=True)).finish(group)
    return parameters


def reduce_with_missing(rank):
    mine = torch.full((2,), rank + 1.0)
    everywhere, nowhere, on_rank_0, on_rank_1 = reduce(
        [mine, None, mine.clone() if rank == 0 else None, mine.clone() if rank == 1 else None]
    )
    assert everywhere.grad is mine  # in place: views of it stay valid
    assert nowhere.grad is None
    return everywhere.grad, on_rank_0.grad, on_rank_1.grad


def test_missing_gradients_count_as_zeros_unless_missing_everywhere():
    for gradients in run_ranks(reduce_with_missing):
        assert [g.tolist() for g in gradients] == [[1.5] * 2, [0.5] * 2, [1.0] * 2]


def reduce_layouts(rank):
    values = torch.arange(6.0).view(2, 3) + rank
    transposed = values.t().contiguous().t()  # equal values, column-major
    sparse_in_memory = torch.zeros(2, 6)[:, ::2].copy_(values)
    parameters = [nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    parameters[2] = nn.Parameter(torch.zeros(3, 2).t())
    gradients = [
        transposed if rank == 0 else values.clone(),
        sparse_in_memory if rank == 1 else values.clone(),
        transposed.clone() if rank == 0 else None,
    ]
    return [p.grad for p in reduce(gradients, parameters)]


def test_memory_layout_of_a_rank_does_not_reach_the_others():
    expected = torch.arange(6.0).view(2, 3) + 0.5
    for first, second, third in run_ranks(reduce_layouts):
        assert torch.equal(first, expected)
        assert torch.equal(second, expected)
        assert torch.equal(third, torch.arange(6.0).view(2, 3) / 2)


def reduce_dtypes(rank):
    dtypes = (torch.bfloat16, torch.float16, torch.float64, torch.complex64)
    parameters = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in dtypes]
    gradients = [torch.full((2,), 1.0 + 2 * rank, dtype=dtype) for dtype in dtypes]
    return [p.grad for p in reduce(gradients, parameters)]


# Three: division that is not by a power of two.
@pytest.mark.parametrize("world_size", [2, 3])
def test_average_in_every_dtype(world_size):
    for gradients in run_ranks(reduce_dtypes, world_size=world_size):
        for gradient in gradients:
            assert gradient.tolist() == [world_size, world_size]


def test_gradient_that_is_part_of_a_graph(one_rank_group):
    # As after backward(create_graph=True), which warns.
    gradient = torch.ones(2, requires_grad=True) * 3
    (parameter,) = reduce([gradient])
    assert parameter.grad is gradient
    assert gradient.requires_grad
    assert gradient.tolist() == [3.0, 3.0]


def test_sparse_gradient_is_refused_by_name(one_rank_group):
    parameter = nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match=r"gradient of 'p0' has layout torch\.sparse_coo"):
        reduce([torch.ones(2).to_sparse()], [parameter])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("one_rank_group", ["nccl"], indirect=True)
def test_does_not_wait_for_the_device(one_rank_group):
    parameters = [nn.Parameter(torch.zeros(2, device="cuda")) for _ in range(3)]
    gradients = [torch.ones(2, device="cuda") for _ in parameters]
    reduce(gradients, parameters)  # NCCL connects at the first collective
    torch.cuda.set_sync_debug_mode("error")
    try:
        reduce(gradients, parameters)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [gradient.tolist() for gradient in gradients] == [[1.0] * 2] * 3
