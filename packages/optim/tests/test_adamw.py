"""AdamW as an optimizer: torch.optim.AdamW's behaviour and state, with one launch a group."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from tilewright_kernels import backend_report, use_backend
from tilewright_kernels.testing import FLOATING, count_launches, no_synchronization
from tilewright_optim import AdamW, WarmupCosine
from tilewright_optim._adam_kernel import CHUNK
from tilewright_optim.testing import random_parameters, set_random_grads

pytestmark = pytest.mark.usefixtures("backend")


SHAPES = ((1,), (3, 5), (CHUNK + 6,), (0,))
CLOSE = {  # relative and absolute
    torch.float64: (1e-14, 1e-14),
    torch.float32: (2e-6, 1e-6),
    # Each step may round one unit apart, and the interpreter truncates to bfloat16. Learning rates
    # in these tests are so large that a step changes much more than that.
    torch.float16: (4e-3, 5e-4),
    torch.bfloat16: (3e-2, 1.6e-2),
}


def make(device, dtype=torch.float32, shapes=SHAPES, seed=0):
    return random_parameters(device, dtype, shapes, seed)


def torchs_adamw(params, **options):
    """torch's optimizer with our arithmetic: float32 inside, as its fused kernels have."""
    low = any(
        isinstance(p, torch.Tensor) and p.dtype in (torch.float16, torch.bfloat16) for p in params
    )
    return torch.optim.AdamW(params, fused=low or None, foreach=None if low else False, **options)


def grads_of(params):
    grads = [p.grad for p in params]
    assert all(g is not None for g in grads)
    return grads


def loss_of(params, factor=1.0):
    return torch.stack([(factor * p.square()).sum() for p in params]).sum()


def assert_equal_params(ours, torchs):
    for a, b in zip(ours, torchs, strict=True):
        rtol, atol = CLOSE[a.dtype]
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def assert_equal_states(ours, torchs):
    for a, b in zip(ours.state.values(), torchs.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert a["step"] == b["step"]
        for name in a.keys() - {"step"}:
            assert a[name].dtype == b[name].dtype
            rtol, atol = CLOSE[a[name].dtype]
            if "sq" in name:  # small, and a sum of positive terms
                atol = min(atol, 1e-6)
            torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amsgrad": True},
        {"maximize": True},
        {"weight_decay": 0.0},
        {"betas": (0.5, 0.9), "eps": 1e-4},
        {"capturable": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_follows_torch(dtype, options, device):
    ours, torchs = make(device, dtype), make(device, dtype)
    optimizer = AdamW(ours, lr=1e-2, **options)
    # torch's capturable form computes 1 - β₂ᵗ in float32, which is 5 digits at the first step.
    reference = torchs_adamw(torchs, lr=1e-2, **{**options, "capturable": False})
    for step in range(4):
        set_random_grads(ours, step)
        set_random_grads(torchs, step)
        optimizer.step()
        reference.step()
    assert_equal_params(ours, torchs)
    assert_equal_states(optimizer, reference)
    on_device = device.type if options.get("capturable") else "cpu"
    assert all(state["step"].device.type == on_device for state in optimizer.state.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_follows_torch_in_low_precision(dtype, device):
    ours, torchs = make(device, dtype), make(device, dtype)
    optimizer, reference = AdamW(ours, lr=0.3), torchs_adamw(torchs, lr=0.3)
    for step in range(3):
        set_random_grads(ours, step)
        set_random_grads(torchs, step)
        optimizer.step()
        reference.step()
    assert_equal_params(ours, torchs)
    assert_equal_states(optimizer, reference)


@pytest.mark.smoke
def test_one_launch_for_a_group_of_many_tensors(backend, device):
    params = make(device, shapes=[(i % 7 + 1, 3) for i in range(60)])
    optimizer = AdamW(params)
    for step in range(2):
        set_random_grads(params, step)
        with count_launches() as launches:
            optimizer.step()
        assert launches["adamw"] == (1 if backend == "triton" else 0)


def test_one_launch_for_each_group_and_dtype(backend, device):
    params = make(device) + make(device, torch.bfloat16) + make(device)
    groups = [{"params": params[:-1]}, {"params": params[-1:], "lr": 0.1}]
    optimizer = AdamW(groups)
    for step in range(2):
        set_random_grads(params, step)
        with count_launches() as launches:
            optimizer.step()
        # float32 and bfloat16 in the first group; the second group holds an empty tensor alone.
        assert launches["adamw"] == (2 if backend == "triton" else 0)
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_report_knows_the_operator(backend, device):
    backend_report(reset=True)
    params = make(device)
    set_random_grads(params, 0)
    AdamW(params).step()
    row = backend_report()["adamw"]
    assert (row.triton, row.torch) == ((1, 0) if backend == "triton" else (0, 1))
    assert row.fell_back == 0


def test_groups_have_their_own_options(device):
    ours, torchs = make(device), make(device)

    def groups(params):
        return [
            {"params": params[:1], "weight_decay": 0.0, "lr": 1e-3},
            {"params": params[1:2], "betas": (0.8, 0.9), "amsgrad": True},
            {"params": params[2:], "maximize": True, "eps": 1e-3},
        ]

    optimizer, reference = AdamW(groups(ours), lr=1e-2), torchs_adamw(groups(torchs), lr=1e-2)
    for step in range(3):
        set_random_grads(ours, step)
        set_random_grads(torchs, step)
        optimizer.step()
        reference.step()
    assert_equal_params(ours, torchs)
    assert_equal_states(optimizer, reference)


def test_parameters_without_gradient(device):
    # Steps of one launch differ then, and so do the sets of tensors from step to step.
    ours, torchs = make(device), make(device)
    optimizer, reference = AdamW(ours, lr=1e-2), torchs_adamw(torchs, lr=1e-2)
    for step, skip in enumerate([(0,), (), (1, 2), (0, 1, 2, 3), ()]):
        set_random_grads(ours, step, skip)
        set_random_grads(torchs, step, skip)
        optimizer.step()
        reference.step()
    assert_equal_params(ours, torchs)
    assert [s["step"].item() for s in optimizer.state.values()] == [
        s["step"].item() for s in reference.state.values()
    ]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none, device):
    ours, torchs = make(device), make(device)
    optimizer, reference = AdamW(ours, lr=1e-2), torchs_adamw(torchs, lr=1e-2)
    hold = []
    for step in range(3):
        for params, some in ((ours, optimizer), (torchs, reference)):
            some.zero_grad(set_to_none=set_to_none)
            loss_of(params, step + 1.0).backward()
            hold += grads_of(params)  # keeps addresses from being used again
            some.step()
    assert_equal_params(ours, torchs)


def test_gradients_are_left_alone(device):
    params = make(device)
    set_random_grads(params, 0)
    before = [g.clone() for g in grads_of(params)]
    optimizer = AdamW(params, maximize=True)
    optimizer.grad_scale = torch.tensor(2.0, device=device)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(grads_of(params), before, strict=True))


def test_other_layouts(device):
    def build():
        dense = torch.nn.Parameter(make(device, shapes=[(4, 6)])[0].detach().T)
        sliced = torch.nn.Parameter(make(device, shapes=[(4, 6)])[0].detach()[:, ::2])
        return [dense, sliced]

    ours, torchs = build(), build()
    optimizer, reference = AdamW(ours, lr=1e-2), torchs_adamw(torchs, lr=1e-2)
    for step in range(3):
        set_random_grads(torchs, step)
        for p, g in zip(ours, grads_of(torchs), strict=True):
            p.grad = g.T.contiguous().T  # never laid out as its parameter
        optimizer.step()
        reference.step()
    assert_equal_params(ours, torchs)
    assert_equal_states(optimizer, reference)


@pytest.mark.parametrize("direction", ["torch to ours", "ours to torch"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_state_dict_goes_both_ways_mid_training(dtype, direction, device):
    options = {"lr": 0.3, "amsgrad": True, "weight_decay": 0.1}
    first, second = AdamW, torchs_adamw
    if direction == "torch to ours":
        first, second = second, first
    params = make(device, dtype)
    optimizer = first(params, **options)
    whole = make(device, dtype)
    reference = torchs_adamw(whole, **options)
    for step in range(4):
        if step == 2:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = second(params, lr=123.0)
            optimizer.load_state_dict(torch.load(file, weights_only=True, map_location=device))
        set_random_grads(params, step)
        set_random_grads(whole, step)
        optimizer.step()
        reference.step()
    assert_equal_params(params, whole)
    assert_equal_states(optimizer, reference)
    keys = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"}
    assert all(state.keys() == keys for state in optimizer.state.values())


def test_state_dict_has_torchs_options(device):
    (ours,) = AdamW(make(device), amsgrad=True).state_dict()["param_groups"]
    (torchs,) = torch.optim.AdamW(make(device), amsgrad=True).state_dict()["param_groups"]
    assert ours.pop("cautious") is False
    assert ours == torchs


def test_adams_state_loads_and_decay_stays_decoupled(device):
    params = make(device)
    adam = torch.optim.Adam(params)
    set_random_grads(params, 0)
    adam.step()
    optimizer = AdamW(params)
    optimizer.load_state_dict(adam.state_dict())
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
    assert optimizer.param_groups[0]["weight_decay"] == 0


def test_resuming_is_exact(device):
    def run(params, optimizer, steps):
        for step in steps:
            set_random_grads(params, step)
            optimizer.step()

    whole = make(device)
    run(whole, AdamW(whole), range(4))
    params = make(device)
    optimizer = AdamW(params)
    run(params, optimizer, range(2))
    resumed = AdamW(params, lr=123.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(params, resumed, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(params, whole, strict=True))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_work_on_their_own(clone, device):
    params = make(device)
    optimizer = AdamW(params, lr=1e-2)
    set_random_grads(params, 0)
    optimizer.step()
    twin = clone(optimizer)
    twins = twin.param_groups[0]["params"]
    set_random_grads(params, 1)
    set_random_grads(twins, 1)
    before = [p.detach().clone() for p in params]
    twin.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_capturable_changed_after_some_steps(device):
    ours, torchs = make(device), make(device)
    optimizer, reference = AdamW(ours, lr=1e-2), torchs_adamw(torchs, lr=1e-2)
    for step in range(4):
        optimizer.param_groups[0]["capturable"] = step in (1, 2)
        set_random_grads(ours, step)
        set_random_grads(torchs, step)
        optimizer.step()
        reference.step()
    assert_equal_params(ours, torchs)
    assert all(state["step"].device.type == "cpu" for state in optimizer.state.values())


@pytest.mark.parametrize("place", ["cpu", "device"])
def test_tensor_learning_rate_and_schedule(place, device):
    ours, torchs = make(device), make(device)
    lr = torch.tensor(1e-2, device=device if place == "device" else "cpu")
    optimizer, reference = AdamW(ours, lr=lr), torchs_adamw(torchs, lr=1e-2)
    schedules = [WarmupCosine(o, 2, 4) for o in (optimizer, reference)]
    for step in range(4):
        set_random_grads(ours, step)
        set_random_grads(torchs, step)
        optimizer.step()
        reference.step()
        for schedule in schedules:
            schedule.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert_equal_params(ours, torchs)


def test_closure(device):
    params = make(device)
    optimizer = AdamW(params)
    before = params[1].detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(params)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() > 0
    assert loss.requires_grad
    assert not torch.equal(params[1], before)
    assert optimizer.step() is None


def test_inside_a_compiled_function(device):
    def run(compile_it):
        params = make(device)
        optimizer = AdamW(params, lr=1e-2)

        def train(factor):
            loss_of(params, factor).backward()
            optimizer.step()
            optimizer.zero_grad()

        train = torch.compile(train, backend="eager") if compile_it else train
        for step in range(3):
            train(torch.tensor(1.0 + step, device=device))
        return params

    torch._dynamo.reset()
    for a, b in zip(run(compile_it=True), run(compile_it=False), strict=True):
        assert torch.equal(a, b)


def test_add_param_group(device):
    ours, torchs = make(device), make(device)
    optimizer, reference = AdamW(ours[:2], lr=1e-2), torchs_adamw(torchs[:2], lr=1e-2)
    for step in range(3):
        if step == 1:
            optimizer.add_param_group({"params": ours[2:], "lr": 1e-3})
            reference.add_param_group({"params": torchs[2:], "lr": 1e-3})
        set_random_grads(ours, step)
        set_random_grads(torchs, step)
        optimizer.step()
        reference.step()
    assert_equal_params(ours, torchs)


def test_hooks_and_names(device):
    model = torch.nn.Linear(3, 2, device=device)
    optimizer = AdamW(model.named_parameters())
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("step"))
    model(torch.ones(1, 3, device=device)).sum().backward()
    optimizer.step()
    assert seen == ["step"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
def test_grad_scale_and_found_inf(capturable, device):
    ours, torchs = make(device), make(device)
    optimizer = AdamW(ours, lr=1e-2, capturable=capturable)
    reference: Any = torch.optim.AdamW(torchs, lr=1e-2, fused=True)
    for step, (scale, overflow) in enumerate([(8.0, 0.0), (8.0, 1.0), (4.0, 0.0)]):
        for params, some in ((ours, optimizer), (torchs, reference)):
            set_random_grads(params, step, factor=torch.inf if overflow else scale)
            some.grad_scale = torch.tensor(scale, device=device)
            some.found_inf = torch.tensor(overflow, device=device)
            some.step()
    assert_equal_params(ours, torchs)
    assert_equal_states(optimizer, reference)
    assert all(state["step"] == 2 for state in optimizer.state.values())


@pytest.mark.parametrize("unscale", [False, True], ids=["fused", "unscaled by the caller"])
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
def test_grad_scaler(capturable, unscale, device):
    def run(make_optimizer):
        params = make(device)
        optimizer = make_optimizer(params)
        scaler = torch.amp.GradScaler(device.type, init_scale=256.0, growth_interval=2)
        for step in range(5):
            optimizer.zero_grad()
            factor = torch.inf if step == 2 else 1.0 + step
            scaler.scale(loss_of(params, factor)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert not hasattr(optimizer, "found_inf")
        return params, optimizer, scaler

    ours, optimizer, scaler = run(lambda p: AdamW(p, lr=1e-2, capturable=capturable))
    torchs, reference, torchs_scaler = run(lambda p: torchs_adamw(p, lr=1e-2))
    assert scaler.get_scale() == torchs_scaler.get_scale()
    assert_equal_params(ours, torchs)
    assert_equal_states(optimizer, reference)
    assert all(state["step"] == 4 for state in optimizer.state.values())


@pytest.mark.gpu
def test_cuda_graph(backend):
    # The recipe of torch's documentation: warm up on a side stream, drop the gradients, capture.
    ours, torchs = make("cuda"), make("cuda")
    x = torch.ones((), device="cuda")
    lr = torch.tensor(1e-2, device="cuda")
    optimizer = AdamW(ours, lr=lr, capturable=True)
    reference = torch.optim.AdamW(torchs, lr=1e-2, foreach=False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            loss_of(ours, x).backward()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), count_launches() as launches:
        loss_of(ours, x).backward()
        optimizer.step()
    assert launches["adamw"] == (1 if backend == "triton" else 0)
    static_grads = grads_of(ours)

    def eager(scale):
        reference.zero_grad()
        loss_of(torchs, scale).backward()
        reference.step()

    eager(1.0)
    eager(1.0)
    for replay in range(4):
        x.fill_(1.0 + replay)
        lr.fill_(1e-2 * (1 + replay))
        reference.param_groups[0]["lr"] = 1e-2 * (1 + replay)
        graph.replay()
        eager(1.0 + replay)
        if replay == 1:  # an eager step in between, with gradients elsewhere
            set_random_grads(ours, 0)
            set_random_grads(torchs, 0)
            optimizer.step()
            reference.step()
            for p, g in zip(ours, static_grads, strict=True):
                p.grad = g
    assert_equal_params(ours, torchs)
    assert_equal_states(optimizer, reference)


@pytest.mark.gpu
def test_capture_needs_capturable_a_first_step_and_a_rate_on_the_device():
    x = torch.zeros((), device="cuda")

    def capture(optimizer):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.add_(1)  # torch warns of empty graphs
            optimizer.step()

    params = make("cuda")
    set_random_grads(params, 0)
    with pytest.raises(RuntimeError, match="one step before the capture"):
        capture(AdamW(params, capturable=True))
    optimizer = AdamW(params)
    optimizer.step()
    with pytest.raises(RuntimeError, match="capturable=True"):
        capture(optimizer)
    optimizer = AdamW(params, lr=torch.tensor(1e-3), capturable=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="lr is a tensor on cpu"):
        capture(optimizer)


@pytest.mark.gpu
def test_no_synchronization(backend):
    params = make("cuda")
    optimizers = [
        AdamW(params),
        AdamW(params, lr=torch.tensor(1e-3, device="cuda"), capturable=True),
    ]
    for optimizer in optimizers:
        set_random_grads(params, 0)
        optimizer.step()
    set_random_grads(params, 1)
    optimizers[1].grad_scale = torch.ones((), device="cuda")
    optimizers[1].found_inf = torch.zeros((), device="cuda")
    with no_synchronization():
        for optimizer in optimizers:
            optimizer.step()


def test_tensor_subclasses_are_left_to_torch(backend, device):
    class Sharded(torch.Tensor):
        """Stands for DTensor and its like, which have no address of their own."""

    param = torch.ones(3, device=device).as_subclass(Sharded).requires_grad_()
    param.grad = torch.ones(3, device=device)
    optimizer = AdamW([param])
    if backend == "triton":
        with pytest.raises(ValueError, match=r"adamw: .*a parameter is a Sharded"):
            optimizer.step()
    with use_backend("auto"), count_launches() as launches:
        optimizer.step()
    assert launches["adamw"] == 0
    assert (param < 1).all()


@pytest.mark.gpu
def test_a_group_on_two_devices(backend):
    with use_backend("auto" if backend == "triton" else "torch"):
        ours, torchs = make("cuda") + make("cpu"), make("cuda") + make("cpu")
        optimizer, reference = AdamW(ours, lr=1e-2), torchs_adamw(torchs, lr=1e-2)
        for step in range(2):
            set_random_grads(ours, step)
            set_random_grads(torchs, step)
            optimizer.step()
            reference.step()
        assert_equal_params(ours, torchs)
