"""What is kept between steps, against what users do to tensors between them; torch's is the oracle.

Each change comes at the third step, when a kept plan would be taken: kernels that still went by it
would read freed memory, past an end, or elements in another order.
"""

import io
import weakref

import pytest
import torch

from tilewright_optim import Adam, AdamW, Muon, MuonW
from tilewright_optim._plan import States
from tilewright_optim.testing import random_parameters, set_random_grads

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = ((3,), (4, 4), (5,))


def make(device, dtype=torch.float32, shapes=SHAPES):
    return random_parameters(device, dtype, shapes)


def train(kind, device, change=None, steps=4, **options):
    """Parameters after some steps, with gradients in the same tensors from the second on."""
    params = make(device)
    optimizer = kind(params, lr=1e-2, **options)
    for step in range(steps):
        fresh = make(device)
        set_random_grads(fresh, step)
        for p, f in zip(params, fresh, strict=True):
            assert f.grad is not None
            if p.grad is None:
                p.grad = f.grad
            else:
                p.grad.copy_(f.grad)
        if step == 2 and change is not None:
            change(params, optimizer)
        optimizer.step()
    return [p.detach() for p in params]


def average(params, optimizer, i=1):
    return optimizer.state[params[i]]["exp_avg"]


def move_one_state(params, optimizer):
    kept = average(params, optimizer).data
    average(params, optimizer).data = kept.clone()
    kept.fill_(torch.nan)  # whoever still reads it shows


def swap_a_state(params, optimizer):
    torch.utils.swap_tensors(average(params, optimizer), torch.zeros_like(params[1].detach()))


def set_a_state(params, optimizer):
    average(params, optimizer).set_(torch.zeros_like(params[1].detach()))


def transpose_a_state(params, optimizer):
    average(params, optimizer).t_()


def fill_steps(params, optimizer):
    for state in optimizer.state.values():
        state["step"].data.fill_(100)


def fill_steps_by_numpy(params, optimizer):
    for state in optimizer.state.values():
        state["step"].numpy().fill(100)


def move_a_step(params, optimizer):
    step = optimizer.state[params[1]]["step"]
    step.data = torch.full_like(step, 100.0)


def integer_steps(params, optimizer):
    for state in optimizer.state.values():
        state["step"] = torch.tensor(50)


def transpose_a_parameter(params, optimizer):
    params[1].data = params[1].data.t()


def transpose_a_gradient(params, optimizer):
    params[1].grad.t_()


def negative_gradient(params, optimizer):
    params[1].grad = torch._neg_view(torch.ones_like(params[1]).detach())


CHANGES = [
    move_one_state, swap_a_state, set_a_state, transpose_a_state, fill_steps, fill_steps_by_numpy,
    move_a_step, integer_steps, transpose_a_parameter, transpose_a_gradient, negative_gradient,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_between_steps_are_followed(change, device):
    ours = train(AdamW, device, change)
    torchs = train(torch.optim.AdamW, device, change, foreach=False)  # foreach wants float steps
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-6)


def keep_the_state(average):
    return lambda: average


def keep_weakly(average):
    return weakref.ref(average)


def keep_an_alias(average):
    alias = average.detach()
    return alias.untyped_storage


def keep_the_memory(average):
    memory = average.untyped_storage()
    return lambda: memory


def move(kept):
    old = kept().data
    kept().data = torch.ones_like(old)
    old.fill_(torch.nan)


def enlarge(kept):
    place = kept().data_ptr()
    kept().resize_(2**20)
    assert kept().data_ptr() != place


@pytest.mark.parametrize(
    ("keep", "change"),
    [
        (keep_the_state, move), (keep_weakly, move),
        (keep_an_alias, enlarge), (keep_the_memory, enlarge),
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
@pytest.mark.parametrize("read_at", [1, 4])
def test_states_that_were_read_long_ago_may_still_move(keep, change, read_at, device):
    def trained(kind):
        params = make(device)
        optimizer = kind(params, lr=1e-2)
        kept = None
        for step in range(read_at + 4):
            set_random_grads(params, step)
            optimizer.step()
            if step == read_at:
                kept = keep(average(params, optimizer))
            if step == read_at + 2:
                change(kept)
        return [p.detach() for p in params]

    for a, b in zip(trained(AdamW), trained(torch.optim.AdamW), strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-6)


def looks(optimizer, params, steps, monkeypatch):
    """At which of these steps every state was looked at."""
    found = []
    fit = States._fit
    for step in range(steps):
        with monkeypatch.context() as patch:
            patch.setattr(States, "_fit", lambda self: found.append(step) or fit(self))  # noqa: B023
            set_random_grads(params, step)
            optimizer.step()
    return found


@pytest.mark.parametrize("capturable", [False, True])
def test_states_that_nobody_else_has_are_not_looked_at(capturable, device, monkeypatch):
    params = make(device)
    optimizer = AdamW(params, capturable=capturable)
    assert looks(optimizer, params, 5, monkeypatch) == [1]
    AdamW(make(device))  # others' states are none of its concern
    torch.save(optimizer.state_dict(), io.BytesIO())
    # A look because of the reading, then one with the proof that nothing of it is left.
    assert looks(optimizer, params, 5, monkeypatch) == [0, 1]
    kept = average(params, optimizer)
    assert looks(optimizer, params, 10, monkeypatch) == list(range(10))
    del kept
    # Proofs take longer than looks: the third is due 16 steps after the second.
    assert looks(optimizer, params, 5, monkeypatch) == [0, 1, 2]
    kept = average(params, optimizer)
    assert looks(optimizer, params, 20, monkeypatch) == list(range(20))
    del kept


def test_a_walk_over_all_objects_is_seen(device):
    params = make(device)
    optimizer = AdamW(params, lr=1e-2)
    for step in range(3):
        set_random_grads(params, step)
        optimizer.step()
    for state in dict.values(optimizer.state):
        for key in ("exp_avg", "exp_avg_sq"):
            tensor = dict.__getitem__(state, key)
            tensor.data = torch.full_like(tensor, 7.0)
    set_random_grads(params, 3)
    optimizer.step()
    assert (average(params, optimizer) > 5).all()


def shrink_a_parameter(params, optimizer):
    params[2].data = params[2].data[:3]


def lengthen_a_parameter(params, optimizer):
    params[2].data = torch.zeros(7, device=params[2].device)
    params[2].grad = torch.ones(7, device=params[2].device)


def shorten_a_state(params, optimizer):
    optimizer.state[params[2]]["exp_avg"] = torch.zeros(3, device=params[2].device)


def shorten_a_gradient(params, optimizer):
    params[2].grad.data = torch.ones(3, device=params[2].device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shrink_a_parameter, r"grad has shape \(5,\).* parameter of shape \(3,\)"),
        (lengthen_a_parameter, r"exp_avg has shape \(5,\).* parameter of shape \(7,\)"),
        (shorten_a_state, r"exp_avg has shape \(3,\).* parameter of shape \(5,\)"),
        (shorten_a_gradient, r"grad has shape \(3,\).* parameter of shape \(5,\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message, device):
    with pytest.raises(RuntimeError, match=message):
        train(AdamW, device, change)


@pytest.mark.parametrize(
    ("storage", "key", "dtype"),
    [
        ({"amsgrad": True}, "max_exp_avg_sq", torch.float64),
        ({"master": "exact"}, "master_low", torch.int32),
        ({"state_dtype": "int8"}, "exp_avg_scale", torch.float64),
    ],
    ids=["maximum", "low", "scale"],
)
def test_dtypes_that_kernels_take_for_granted_are_checked(storage, key, dtype, device):
    params = make(device, torch.bfloat16)
    optimizer = AdamW(params, **storage)
    set_random_grads(params, 0)
    optimizer.step()
    state = optimizer.state[params[1]]
    state[key] = state[key].to(dtype)
    with pytest.raises(RuntimeError, match=f"{key} is {dtype}"):
        optimizer.step()


@pytest.mark.parametrize("key", ["momentum_buffer", "master_low"])
def test_muon_refuses_states_of_other_sizes(key, device):
    params = make(device, torch.bfloat16, [(4, 6)])
    optimizer = Muon(params, master="exact")
    set_random_grads(params, 0)
    kept = torch.zeros(2, 2, device=device)
    optimizer.state[params[0]] = {
        "momentum_buffer": torch.zeros(4, 6, device=device),
        "master_low": torch.zeros(4, 6, device=device, dtype=torch.int16),
        key: kept,
    }
    with pytest.raises(RuntimeError, match=rf"{key} has shape \(2, 2\).* of shape \(4, 6\)"):
        optimizer.step()


def test_muon_reads_negative_gradients(device):
    def after(gradient):
        params = make(device, shapes=[(4, 6)])
        params[0].grad = gradient
        Muon(params, lr=0.1).step()
        return params[0].detach()

    gradient = make(device, shapes=[(4, 6)])[0].detach()
    assert torch.equal(after(torch._neg_view(gradient)), after(-gradient))


@pytest.mark.parametrize("kind", [Adam, AdamW, Muon])
def test_steps_in_inference_mode(kind, device):
    def after(mode):
        params = make(device, shapes=[(4, 6)])
        optimizer = kind(params, lr=1e-2)
        for step in range(4):
            with torch.inference_mode(mode and step < 3):
                set_random_grads(params, step)
                optimizer.step()
        return params[0].detach()

    assert torch.equal(after(True), after(False))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64], ids=str)
def test_capturable_counts_of_other_dtypes(dtype, device):
    def change(params, optimizer):
        for p in params:
            optimizer.state[p]["step"] = torch.tensor(50, dtype=dtype, device=device)

    ours = train(AdamW, device, change, capturable=True)
    torchs = train(torch.optim.AdamW, device, change, foreach=False)  # foreach wants float steps
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("options", [{"master": "stochastic"}, {"state_dtype": "int8"}], ids=str)
def test_numbers_to_round_by_follow_a_parameter_that_leaves(options, device):
    def parameters(loads: bool):
        params = make(device, torch.bfloat16, [(300,)] * 4)
        optimizer = AdamW([{"params": params[:2]}, {"params": params[2:]}], lr=1e-2, **options)
        for step in range(5):
            set_random_grads(params, step)
            if step == 3:
                gone = optimizer.param_groups[0]["params"].pop(0)
                if loads:
                    del optimizer.state[gone]
                    optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
        return params

    for a, b in zip(parameters(False), parameters(True), strict=True):
        assert torch.equal(a, b)


def mixed(device):
    matrix, vector = make(device, shapes=[(6, 8), (5,)])
    groups = [{"params": [matrix], "kind": "muon"}, {"params": [vector], "kind": "adamw"}]
    return [matrix, vector], MuonW(groups, lr=1e-2)


def test_muonw_takes_up_other_states(device):
    params, optimizer = mixed(device)
    set_random_grads(params, 0)
    optimizer.step()
    old = optimizer.state
    optimizer.state = type(old)(dict)
    optimizer.step()
    assert set(optimizer.state) == set(params)
    assert [old[params[1]]["step"], optimizer.state[params[1]]["step"]] == [1, 1]


def test_muonw_takes_up_other_groups(device):
    params, optimizer = mixed(device)
    set_random_grads(params, 0)
    optimizer.step()
    optimizer.param_groups = [{**group, "lr": 0.0} for group in optimizer.param_groups]
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
