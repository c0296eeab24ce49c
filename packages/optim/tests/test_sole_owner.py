"""What is counted as a way to a tensor or its memory, beside the containers that are known."""

import io
import weakref

import pytest
import torch
from torch.utils.dlpack import to_dlpack

from tilewright_optim import _sole_owner
from tilewright_optim._sole_owner import held_by
from tilewright_optim._states import pack_steps

WAYS = {
    "reference": lambda t: t,
    "container": lambda t: {"exp_avg": t},
    "weak reference": weakref.ref,
    "view": lambda t: t.view(-1),
    "alias": torch.Tensor.detach,
    "data": lambda t: t.data,
    "memory": lambda t: t.untyped_storage(),
    "weak reference to memory": lambda t: weakref.ref(t.untyped_storage()),
    "graph": lambda t: t * torch.ones(4, 4, device=t.device, requires_grad=True),
    "dlpack": to_dlpack,
}


def make(device):
    return [torch.zeros(4, 4, device=device) for _ in range(3)]


@pytest.mark.parametrize("name", WAYS)
def test_ways_are_found_until_they_are_gone(name, device):
    tensors = make(device)
    assert held_by(1, tensors)
    way = WAYS[name](tensors[1])
    assert not held_by(1, tensors)
    del way
    assert held_by(1, tensors)


def test_arrays(device):
    if device.type != "cpu":
        pytest.skip("arrays share memory with tensors on the CPU alone")
    tensors = make(device)
    array = tensors[1].numpy()
    assert not held_by(1, tensors)
    del array
    assert held_by(1, tensors)


def test_containers_are_counted(device):
    tensors = make(device)
    other = dict(enumerate(tensors))
    assert held_by(2, tensors)
    assert not held_by(1, tensors)
    del other


def test_memory_in_common(device):
    tensors = list(torch.zeros(3, 4, device=device).unbind())
    assert not held_by(1, tensors)
    assert held_by(1, tensors, with_memory=False)


def test_saving_leaves_no_way(device):
    tensors = make(device)
    torch.save(tensors, io.BytesIO())
    assert held_by(1, tensors)


def test_step_counts(device):
    states = [{"step": torch.zeros((), device=device), "exp_avg": t} for t in make(device)]
    pack_steps(states)
    steps = [state["step"] for state in states]
    assert held_by(2, steps, with_memory=False)


@pytest.mark.parametrize("helper", ["_ADDRESS", "_USES", "_TENSOR_USES"])
def test_nothing_is_known_without_the_counts(helper, monkeypatch, device):
    monkeypatch.setattr(_sole_owner, helper, None)
    assert not held_by(1, make(device))
