"""Masters and dtypes of averages: training with them beside float32 training; kernel and torch."""

import copy
from typing import Any

import pytest
import torch

from tilewright_kernels import use_backend
from tilewright_kernels.testing import count_launches
from tilewright_optim import Adam, AdamW
from tilewright_optim._adam_kernel import CHUNK
from tilewright_optim._blockwise import BLOCK, num_blocks
from tilewright_optim._rounding import join_master, split_master
from tilewright_optim.testing import random_parameters, set_random_grads

SHAPES = ((), (3, 5), (CHUNK + 6,), (2, BLOCK), (0,))  # ragged, whole blocks, nothing
STORAGES: list[dict[str, Any]] = [
    {"master": "exact"},
    {"master": "exact", "state_dtype": torch.bfloat16},
    {"master": "exact", "state_dtype": "int8"},
    {"master": "stochastic"},
    {"master": "stochastic", "state_dtype": torch.float32},
    {"state_dtype": torch.bfloat16},
    {"state_dtype": "int8"},
]


def make(device, dtype=torch.bfloat16, shapes=SHAPES, seed=0):
    return random_parameters(device, dtype, shapes, seed)


def run(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        set_random_grads(params, step)
        optimizer.step()


def masters(optimizer, params):
    return [join_master(p.detach(), optimizer.state[p]["master_low"]) for p in params]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_exact_masters_are_float32_training(kind, backend, device):
    # The claim is for any number of steps; the interpreter's step costs a tenth of a second.
    steps = 200 if backend == "torch" or device.type == "cuda" else 12
    low = make(device)
    wide = [torch.nn.Parameter(p.detach().float()) for p in low]
    options = {"lr": 1e-3, "weight_decay": 0.1}
    with use_backend(backend):
        ours, reference = kind(low, master="exact", **options), kind(wide, **options)
        for step in range(steps):
            set_random_grads(low, step)
            for p, q in zip(low, wide, strict=True):
                assert p.grad is not None
                q.grad = p.grad.float()
            ours.step()
            reference.step()
    for master, p, q in zip(masters(ours, low), low, wide, strict=True):
        assert torch.equal(master, q)
        assert torch.equal(p, split_master(q.detach())[0])
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(ours.state[p][name], reference.state[q][name])


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_kernel_is_the_reference(storage, device):
    def after(backend):
        params = make(device)
        with use_backend(backend), count_launches() as launches:
            optimizer = AdamW(params, lr=3e-2, weight_decay=0.1, **storage)
            run(optimizer, params, 2)
        assert launches["adamw"] == (2 if backend == "triton" else 0)
        return [p.detach() for p in params], optimizer.state_dict()["state"]

    (ours, states), (expected, expected_states) = after("triton"), after("torch")
    # A last bit may decide a rounding, in few elements: one bfloat16, or one code, apart then. The
    # interpreter truncates to bfloat16, everywhere.
    few = 0.02 if device.type == "cuda" else 1.0
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-5, atol=2e-3)
        assert (a != b).sum() <= max(1, few * a.numel())
    for a, b in zip(states.values(), expected_states.values(), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            if a[name].dtype in (torch.int8, torch.uint8):
                difference = (a[name].int() - b[name].int()).abs()
                assert (difference <= 2).all(), name
                assert (difference != 0).sum() <= max(1, 0.02 * difference.numel()), name
            elif name != "master_low":
                torch.testing.assert_close(a[name], b[name], rtol=2**-5, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_codes_of_other_dtypes(dtype, device):
    def after(backend):
        params = make(device, dtype)
        with use_backend(backend):
            run(AdamW(params, lr=3e-2, state_dtype="int8"), params, 2)
        return [p.detach() for p in params]

    for a, b in zip(after("triton"), after("torch"), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_bytes_between_steps(storage, device):
    params = make(device, shapes=[(64, BLOCK)])
    with use_backend("torch"):
        optimizer = AdamW(params, **storage)
        run(optimizer, params, 1)
    (state,) = optimizer.state.values()
    held = sum(t.nbytes for name, t in state.items() if name != "step")
    exact = storage.get("master") == "exact"
    averages = {"int8": 2 + 8 / BLOCK, torch.bfloat16: 4, torch.float32: 8}
    expected = averages[storage.get("state_dtype", torch.float32 if exact else torch.bfloat16)]
    assert held / params[0].numel() == expected + 2 * exact


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_resuming_is_exact(storage, backend, device):
    with use_backend(backend):
        whole = make(device)
        run(AdamW(whole, lr=1e-2, **storage), whole, 4)
        params = make(device)
        optimizer = AdamW(params, lr=1e-2, **storage)
        run(optimizer, params, 2)
        resumed = AdamW(params, lr=7.0, **storage)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run(resumed, params, 2, first=2)
    assert all(torch.equal(a, b) for a, b in zip(params, whole, strict=True))


@pytest.mark.parametrize("state_dtype", ["int8", torch.bfloat16], ids=str)
def test_coarse_averages_follow_fine_ones(state_dtype, device):
    # A quadratic bowl of very different curvatures, with noise: near its bottom all must be near.
    generator = torch.Generator().manual_seed(0)
    curvature = torch.logspace(-2, 2, 2 * BLOCK)[torch.randperm(2 * BLOCK, generator=generator)]
    curvature = curvature.to(device)

    def train(**storage):
        noise = torch.Generator().manual_seed(1)
        param = torch.nn.Parameter(torch.ones(2 * BLOCK, device=device))
        optimizer = AdamW([param], lr=2e-2, betas=(0.9, 0.99), weight_decay=0.0, **storage)
        for _ in range(150):
            extra = 0.1 * torch.randn(2 * BLOCK, generator=noise).to(device)
            param.grad = curvature * (param.detach() + extra)
            optimizer.step()
        return (curvature * param.detach().square()).mean().item()

    with use_backend("torch"):
        fine, coarse = train(), train(state_dtype=state_dtype)
    assert coarse < 1.15 * fine


def test_stochastic_rounding_keeps_small_updates(device):
    # Updates of 1e-4 on ones are a fortieth of a bfloat16 step: nearest rounding loses them all.
    def train(master):
        param = torch.nn.Parameter(torch.ones(2048, dtype=torch.bfloat16, device=device))
        with use_backend("torch"):
            optimizer = AdamW([param], lr=1e-4, weight_decay=0.0, master=master)
            for _ in range(50):
                param.grad = torch.ones_like(param)
                optimizer.step()
        return param.detach().double().mean().item()

    assert train("none") == 1
    assert abs(train("stochastic") - 0.995) < 2e-4


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_found_inf_leaves_every_bit(storage, backend, device):
    params = make(device)
    with use_backend(backend):
        optimizer = AdamW(params, capturable=True, **storage)
        run(optimizer, params, 1)
        before = copy.deepcopy((params, list(optimizer.state.values())))
        set_random_grads(params, 1)
        for p in params:
            assert p.grad is not None
            p.grad.fill_(torch.nan)
        optimizer.found_inf = torch.ones((), device=device)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before[0], strict=True))
    for state, kept in zip(optimizer.state.values(), before[1], strict=True):
        assert all(torch.equal(state[name], kept[name]) for name in kept)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nan_gradients_show(backend, device):
    params = make(device, shapes=[(2 * BLOCK,)])
    with use_backend(backend):
        optimizer = AdamW(params, master="exact", state_dtype="int8")
        run(optimizer, params, 1)
        assert params[0].grad is not None
        params[0].grad[7] = torch.nan
        optimizer.step()
        assert params[0][7].isnan()
        optimizer.step()
        # The scale is the block's: averages without a NaN are none for its whole block.
        assert not params[0][:BLOCK].isfinite().any()
        assert params[0][BLOCK:].isfinite().all()


def test_torchs_state_is_taken_over(device):
    params = make(device)
    torchs = torch.optim.AdamW(params)
    run(torchs, params, 2)
    saved = copy.deepcopy(torchs.state_dict())
    for storage in STORAGES:
        optimizer = AdamW(params, **storage)
        optimizer.load_state_dict(saved)
        fresh = AdamW(params, **storage)
        with use_backend("torch"):
            run(fresh, params, 1)
            for p in params:
                ours, expected = optimizer.state[p], fresh.state[p]
                assert {k: v.dtype for k, v in ours.items()} == {
                    k: v.dtype for k, v in expected.items()
                }
            run(optimizer, params, 1)
        assert all(state["step"] == 3 for state in optimizer.state.values())


def test_dtypes_of_states_survive_loading(device):
    # torch.optim casts what it loads to the parameter's dtype, and float32 averages are lost.
    params = make(device)
    optimizer = AdamW(params, state_dtype=torch.float32)
    with use_backend("torch"):
        run(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    loaded = AdamW(params)
    loaded.load_state_dict(saved)
    for index, p in enumerate(params):
        for name in ("exp_avg", "exp_avg_sq"):
            assert loaded.state[p][name].dtype == torch.float32
            assert torch.equal(loaded.state[p][name], saved["state"][index][name])


def test_only_bfloat16_has_masters(device):
    params = make(device, torch.float32)[:2] + make(device)[:2]
    optimizer = AdamW(params, master="exact")
    with use_backend("torch"):
        run(optimizer, params, 1)
    assert ["master_low" in optimizer.state[p] for p in params] == [False, False, True, True]
    half = make(device, torch.float16)
    optimizer = AdamW(half, master="exact")
    set_random_grads(half, 0)
    with pytest.raises(TypeError, match=r"is float16; give bfloat16"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"master": "float32"}, "master is 'float32'"),
        ({"state_dtype": torch.int8}, "state_dtype is torch.int8"),
        ({"state_dtype": "int8", "amsgrad": True}, "a maximum would not stay one"),
    ],
)
def test_bad_storage(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW(make("cpu"), **options)


def test_scales_of_an_odd_size():
    assert [num_blocks(n) for n in (0, 1, BLOCK, BLOCK + 1)] == [0, 1, 1, 2]


def test_steps_that_are_numbers(device):
    params = make(device, torch.float32)
    optimizer = AdamW(params)
    run(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    optimizer.load_state_dict(saved)
    run(optimizer, params, 1)
    assert all(state["step"] == 3 for state in optimizer.state.values())


def test_amsgrad_set_after_some_steps_begins_a_maximum(device):
    def after(backend):
        params = make(device, torch.float32)
        with use_backend(backend):
            optimizer = AdamW(params, lr=1e-2)
            run(optimizer, params, 2)
            optimizer.param_groups[0]["amsgrad"] = True
            run(optimizer, params, 2, first=2)
        return params, [optimizer.state[p]["max_exp_avg_sq"] for p in params]

    for kernel, reference in zip(after("triton"), after("torch"), strict=True):
        for a, b in zip(kernel, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def test_codes_refuse_amsgrad_wherever_it_comes_from(device):
    params, torchs = make(device, torch.float32), make(device, torch.float32)
    optimizer, reference = (
        AdamW(params, state_dtype="int8"),
        torch.optim.AdamW(torchs, amsgrad=True),
    )
    run(reference, torchs, 1)
    with pytest.raises(ValueError, match="amsgrad is set and state_dtype is 'int8'"):
        optimizer.load_state_dict(reference.state_dict())
    assert not optimizer.state
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad is set and state_dtype is 'int8'"):
        run(optimizer, params, 1)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_model_made_float32_has_no_masters_any_more(backend, device):
    params = make(device, torch.bfloat16)
    with use_backend(backend):
        optimizer = AdamW(params, lr=1e-2, master="exact")
        run(optimizer, params, 1)
        for p in params:
            p.grad = None
            p.data = p.data.float()
        wide = make(device, torch.float32)
        for p, q in zip(wide, params, strict=True):
            p.data.copy_(q)
        other = AdamW(wide, lr=1e-2)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run(optimizer, params, 1, first=1)
        run(other, wide, 1, first=1)
    for p, q in zip(params, wide, strict=True):
        assert torch.equal(p, q)
