"""Whether tensors are as they were: torch's helpers, and without them, say the same."""

import pytest
import torch
from torch.nn import Parameter

from tilewright_optim import _snapshot
from tilewright_optim._snapshot import lie_at, like
from tilewright_optim._tables import addresses


@pytest.fixture(params=[True, False], ids=["helpers", "plain"], autouse=True)
def _helpers(request, monkeypatch):
    if request.param:
        assert _snapshot._GUARDS is not None
    else:  # another torch, or one built without CUDA
        monkeypatch.setattr(_snapshot, "_POINTERS_EQUAL", None)
        monkeypatch.setattr(_snapshot, "_GUARDS", None)


def make(device):
    return [Parameter(torch.zeros(4, 4, device=device)), torch.zeros(4, 4, device=device)]


def change_data(tensors):
    tensors[1].data = tensors[1].clone()


def use_set(tensors):
    tensors[1].set_(torch.zeros_like(tensors[1]))


def swap(tensors):
    torch.utils.swap_tensors(tensors[1], torch.ones_like(tensors[1]))


def transpose(tensors):
    tensors[0].data = tensors[0].data.t()


def shrink(tensors):
    tensors[0].data = tensors[0].data[:3]


def flatten(tensors):
    tensors[1].data = tensors[1].data.view(16)


def reinterpret(tensors):
    tensors[1].data = tensors[1].data.view(torch.int32)


def resize_memory(tensors):
    tensors[1].untyped_storage().resize_(0)


CHANGES = [change_data, use_set, swap, transpose, shrink, flatten, reinterpret, resize_memory]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_what_is_behind_a_tensor_is_seen(change, device):
    tensors = make(device)
    places, check = addresses(tensors), like(tensors)
    assert lie_at(tensors, places, [0, 1])
    assert check(tensors)
    old = tensors[1].data  # so that what comes is elsewhere
    change(tensors)
    assert not (lie_at(tensors, places, [0, 1]) and check(tensors))
    del old


@torch.no_grad()
def test_values_do_not_matter(device):
    tensors = make(device)
    places, check = addresses(tensors), like(tensors)
    tensors[0].fill_(1)
    assert lie_at(tensors, places, [0, 1])
    assert check(tensors)


OTHERS = {
    "none": lambda t: [t[0], None],
    "parameter": lambda t: [t[0], Parameter(t[1])],
    "number": lambda t: [t[0], 1.0],
    "double": lambda t: [t[0], t[1].double()],
    "meta": lambda t: [t[0], t[1].to("meta")],
    "negative": lambda t: [t[0], torch._neg_view(t[1])],
    "sparse": lambda t: [t[0], t[1].to_sparse()],
    "sizes": lambda t: [t[0], torch.zeros(2, 8, device=t[1].device)],
    "strides": lambda t: [t[0], t[1].t()],
}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_other_tensors_of_other_kinds(name, device):
    tensors = make(device)
    check = like(tensors)
    assert check(make(device))
    assert not check(OTHERS[name](tensors))


@pytest.mark.parametrize("layers", [1, 7, 40])
@torch.no_grad()
def test_many_tensors_of_equal_layers(layers, device):
    shapes = [(4,), (4, 2), (2, 4), (3,), (1,)] * layers
    tensors = [torch.zeros(shape, device=device) for shape in shapes]
    check = like(tensors)
    assert check(tensors)
    for i in range(0, len(tensors), 3):
        others = list(tensors)
        others[i] = torch.zeros(5, device=device)
        assert not check(others)


@torch.no_grad()
def test_a_tensor_given_twice(device):
    tensor = torch.zeros(3, device=device)
    check = like([tensor, tensor])
    assert check([tensor, tensor])
    assert not check([tensor, tensor.double()])


def test_addresses(device):
    tensors = [torch.empty(3, device=device) for _ in range(3)]
    places = addresses(tensors)
    assert lie_at(tensors, places, [0, 1, 2])
    kept = tensors[2].data
    tensors[2].data = torch.empty(3, device=device)
    assert kept.data_ptr() == places[2]
    assert not lie_at(tensors, places, [0, 1, 2])
    assert lie_at(tensors, places, [0, 1])
    with pytest.raises(RuntimeError):
        lie_at([torch.eye(2).to_sparse()], [0], [0])
