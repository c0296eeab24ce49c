"""Adam, and what both optimizers have beyond torch's: cautious decay, clipping, tensor options."""

import copy
import weakref
from collections import defaultdict
from typing import Any

import pytest
import torch

from tilewright_kernels.testing import count_launches, no_synchronization
from tilewright_optim import Adam, AdamW, Muon, _plan, adamw_reference
from tilewright_optim._adam_kernel import CHUNK
from tilewright_optim.testing import random_parameters, set_random_grads

pytestmark = pytest.mark.usefixtures("backend")


SHAPES = ((), (3, 5), (CHUNK + 6,), (0,))


def make(device, dtype=torch.float32, shapes=SHAPES, seed=0):
    return random_parameters(device, dtype, shapes, seed)


def grads_of(params):
    return [p.grad for p in params if p.grad is not None]


def follow(ours, torchs, optimizer, reference, steps=4, factor=1.0):
    for step in range(steps):
        set_random_grads(ours, step, factor=factor)
        set_random_grads(torchs, step, factor=factor)
        optimizer.step()
        reference.step()


def assert_close(ours, torchs, dtype=torch.float32):
    tolerance = {torch.float64: 1e-13, torch.float32: 3e-6}[dtype]
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "amsgrad": True, "maximize": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"weight_decay": 0.1, "capturable": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_follows_torch(dtype, options, device):
    ours, torchs = make(device, dtype), make(device, dtype)
    optimizer = Adam(ours, lr=1e-2, **options)
    options: dict[str, Any] = {**options, "capturable": False}
    reference = torch.optim.Adam(torchs, lr=1e-2, foreach=False, **options)
    follow(ours, torchs, optimizer, reference)
    assert_close(ours, torchs, dtype)
    for a, b in zip(optimizer.state.values(), reference.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert a["step"] == b["step"]
        for name in a.keys() - {"step"}:
            torch.testing.assert_close(a[name], b[name], rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_a_hundred_steps_stay_within_float32_of_float64(kind, backend, device):
    steps = 100 if backend == "torch" or device.type == "cuda" else 20
    ours, wide = make(device), make(device, torch.float64)
    torchs = make(device)
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    theirs = getattr(torch.optim, kind.__name__)
    exact = theirs(wide, foreach=False, **options)
    follow(ours, wide, kind(ours, **options), exact, steps)
    follow(torchs, make(device), theirs(torchs, **options), torch.optim.SGD(make(device)), steps)
    for a, b, c in zip(ours, torchs, wide, strict=True):
        if c.numel():
            error, torchs_error = ((t.double() - c).abs().max() for t in (a, b))
            assert error <= 2 * torchs_error + 1e-6 * c.abs().max()


def test_state_goes_both_ways(device):
    ours, torchs = make(device), make(device)
    first = Adam(ours, lr=1e-2, weight_decay=0.1)
    reference = torch.optim.Adam(torchs, lr=1e-2, weight_decay=0.1)
    follow(ours, torchs, first, reference, 2)
    second, back = torch.optim.Adam(ours), Adam(torchs)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    back.load_state_dict(copy.deepcopy(reference.state_dict()))
    for step in range(2, 4):
        set_random_grads(ours, step)
        set_random_grads(torchs, step)
        second.step()
        back.step()
    assert_close(ours, torchs)
    (group,) = first.state_dict()["param_groups"]
    assert group.pop("cautious") is False
    assert group == reference.state_dict()["param_groups"][0]


def test_its_own_operator(backend, device):
    params = make(device)
    set_random_grads(params, 0)
    with count_launches() as launches:
        Adam(params).step()
    assert launches["adam"] == (1 if backend == "triton" else 0)
    assert launches["adamw"] == 0


def test_cautious_decay(device):
    # p shrinks by decay only where the update has its sign.
    params = [torch.nn.Parameter(torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0], device=device))]
    params[0].grad = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0], device=device)
    AdamW(params, lr=0.1, weight_decay=0.5, cautious=True).step()
    expected = torch.tensor([0.95 - 0.1, -0.95 + 0.1, 1.1, -1.1, -0.1], device=device)
    torch.testing.assert_close(params[0].detach(), expected, rtol=1e-6, atol=1e-6)


def test_cautious_follows_the_reference(device):
    ours, expected = make(device), [p.detach() for p in make(device)]
    m, v = ([torch.zeros_like(p) for p in expected] for _ in range(2))
    steps = [torch.tensor(0.0) for _ in expected]
    optimizer = AdamW(ours, lr=1e-2, weight_decay=0.3, cautious=True)
    for step in range(3):
        set_random_grads(ours, step)
        optimizer.step()
        adamw_reference(
            expected, grads_of(ours), m, v, [], steps,
            lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.3, cautious=True,
        )  # fmt: skip
    assert_close([p.detach() for p in ours], expected)


@pytest.mark.parametrize("place", ["cpu", "device"])
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_tensor_decay(kind, place, device):
    ours, floats = make(device), make(device)
    decay = torch.tensor(0.25, device=device if place == "device" else "cpu")
    optimizer, reference = kind(ours, weight_decay=decay), kind(floats, weight_decay=0.25)
    follow(ours, floats, optimizer, reference, 2)
    decay.fill_(0.5)
    reference.param_groups[0]["weight_decay"] = 0.5
    follow(ours, floats, optimizer, reference, 2)
    assert_close(ours, floats)


@pytest.mark.parametrize("scale", [None, 8.0], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("limit", [0.5, 1e6], ids=["clips", "does not clip"])
def test_clipping_in_the_step(limit, scale, backend, device):
    ours, torchs = make(device), make(device)
    groups = [{"params": ours[:2]}, {"params": ours[2:], "lr": 1e-3}]
    optimizer = AdamW(groups, lr=1e-2, max_grad_norm=limit)
    reference = torch.optim.AdamW(
        [{"params": torchs[:2]}, {"params": torchs[2:], "lr": 1e-3}], lr=1e-2
    )
    if scale is not None:
        optimizer.grad_scale = torch.tensor(scale, device=device)
    for step in range(3):
        set_random_grads(ours, step, factor=scale or 1.0)
        set_random_grads(torchs, step)
        before = [g.clone() for g in grads_of(ours)]
        with count_launches() as launches:
            optimizer.step()
        assert launches["clip_grad_norm_"] == (1 if backend == "triton" else 0)
        assert all(torch.equal(a, b) for a, b in zip(grads_of(ours), before, strict=True))
        norm = torch.nn.utils.clip_grad_norm_(torchs, limit)
        reference.step()
        assert optimizer.grad_norm is not None
        torch.testing.assert_close(optimizer.grad_norm, norm)
    assert_close(ours, torchs)


def test_clipping_without_gradients(device):
    params = make(device)
    optimizer = AdamW(params, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm is None
    assert not optimizer.state


def test_clipping_survives_copies_and_pickles(device):
    optimizer = AdamW(make(device), max_grad_norm=0.5, master="stochastic")
    twin = copy.deepcopy(optimizer)
    assert twin.max_grad_norm == 0.5
    params = twin.param_groups[0]["params"]
    set_random_grads(params, 0)
    twin.step()
    assert twin.grad_norm is not None


def test_a_norm_that_is_not_finite_shows(device):
    params = make(device)
    set_random_grads(params, 0)
    assert params[1].grad is not None
    params[1].grad[0, 0] = torch.nan
    optimizer = AdamW(params, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm.isnan()
    assert params[2].isnan().all()  # as torch.nn.utils.clip_grad_norm_ and a step make it


@pytest.mark.parametrize(
    "what",
    ["state", "states", "plain state", "param", "dtype of a gradient", "dtype of a state"],
)
def test_what_changes_between_steps_is_seen(what, device):
    def run(change):
        params = make(device)
        optimizer = AdamW(params, lr=1e-2)
        for step in range(4):
            set_random_grads(params, step)
            if step == 1 and change and what == "plain state":
                optimizer.state[params[1]] = dict(optimizer.state[params[1]])
            if step == 2 and change:
                alter(params, optimizer)
            optimizer.step()
        return params, optimizer

    def alter(params, optimizer):
        state = optimizer.state[params[1]]
        if what in ("state", "plain state"):
            kept = state["exp_avg"]
            state["exp_avg"] = kept.clone()
            kept.fill_(torch.nan)  # whoever still reads it shows
        elif what == "states":
            states = optimizer.state
            optimizer.state = defaultdict(dict, {p: copy.deepcopy(s) for p, s in states.items()})
            for old in states.values():
                old["exp_avg"].fill_(torch.nan)
        elif what == "param":
            kept = params[1].data
            params[1].data = kept.clone()
            kept.fill_(torch.nan)
        elif what == "dtype of a state":
            state["exp_avg"] = state["exp_avg"].double()
        else:
            params[1].grad_dtype = None
            params[1].grad = params[1].grad.double()

    (ours, optimizer), (expected, _) = run(change=True), run(change=False)
    assert_close(ours, expected)
    if what == "dtype of a state":
        assert optimizer.state[ours[1]]["exp_avg"].dtype == torch.float64


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2,), (3, 2)], ids=str)
def test_objects_are_told_from_equal_ones(shape, device):
    ours = [torch.ones(shape, device=device) for _ in range(3)]
    assert _plan.are_same(list(ours), ours)
    assert not _plan.are_same(ours[:2], ours)
    for i in range(3):
        for other in (ours[i].clone(), torch.ones(7, device=device), None):
            changed: list[Any] = list(ours)
            changed[i] = other
            assert not _plan.are_same(changed, ours)


def test_a_thousand_small_tensors(backend, device):
    count = 1000 if backend == "torch" or device.type == "cuda" else 60
    ours, torchs = (make(device, shapes=[(i % 5 + 1,) for i in range(count)]) for _ in range(2))
    optimizer = AdamW(ours, lr=1e-2)
    with count_launches() as launches:
        follow(ours, torchs, optimizer, torch.optim.AdamW(torchs, lr=1e-2), 3)
    assert launches["adamw"] == (3 if backend == "triton" else 0)
    assert_close(ours, torchs)


@pytest.mark.parametrize("kept", [0, 2**25], ids=["large", "small"])
@pytest.mark.parametrize("by", ["optimizer", "owner"])
def test_gradients_are_let_go(by, kept, monkeypatch, device):
    monkeypatch.setattr(_plan, "KEPT", kept)
    ours, torchs = make(device), make(device)
    optimizer, reference = AdamW(ours, lr=1e-2), torch.optim.AdamW(torchs, lr=1e-2)
    follow(ours, torchs, optimizer, reference)
    alive = [weakref.ref(g) for g in grads_of(ours)]
    if by == "optimizer":
        optimizer.zero_grad()
    else:
        for param in ours:
            param.grad = None
    still = kept > 0 and by == "owner"  # the plan of a small group holds them until it is told
    assert [ref() is not None for ref in alive] == [still] * len(alive)
    follow(ours, torchs, optimizer, reference)
    assert_close(ours, torchs)


@pytest.mark.gpu
@pytest.mark.parametrize("storage", [{}, {"master": "exact", "state_dtype": "int8"}], ids=str)
def test_replays_are_the_eager_bits(storage):
    def run(captured):
        params = make("cuda", torch.bfloat16)
        optimizer = AdamW(
            params, lr=torch.tensor(1e-2, device="cuda"), capturable=True, max_grad_norm=1.0,
            weight_decay=torch.tensor(0.1, device="cuda"), **storage,
        )  # fmt: skip
        optimizer.grad_scale = torch.tensor(2.0, device="cuda")
        optimizer.found_inf = torch.tensor(0.0, device="cuda")
        set_random_grads(params, 0)
        optimizer.step()
        grads = grads_of(params)
        step_again = optimizer.step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            step_again = graph.replay
        for step in range(1, 5):
            generator = torch.Generator().manual_seed(step)
            for g in grads:
                g.copy_(torch.randn(g.shape, generator=generator))
            optimizer.found_inf.fill_(step == 3)
            step_again()
        states = [t for state in optimizer.state.values() for t in state.values()]
        return [p.detach() for p in params] + states

    for a, b in zip(run(captured=True), run(captured=False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_clipping_waits_for_nothing():
    params = make("cuda")
    optimizer = AdamW(params, max_grad_norm=1.0, capturable=True)
    set_random_grads(params, 0)
    optimizer.step()
    set_random_grads(params, 1)
    with no_synchronization():
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Adam, {"cautious": True}, "cautious is for decoupled decay"),
        (AdamW, {"differentiable": True}, "differentiable is True"),
        (AdamW, {"weight_decay": torch.ones(3)}, r"weight_decay is a tensor of shape \(3,\)"),
        (AdamW, {"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
    ],
)
def test_bad_options(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind([torch.nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("kind", [Adam, Muon])
def test_autograd_sees_that_parameters_changed(kind, device):
    param = torch.nn.Parameter(torch.ones(3, 4, device=device))
    loss = param.square().sum()  # keeps the parameter for its backward
    loss.backward(retain_graph=True)
    kind([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
