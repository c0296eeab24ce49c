"""Muon as an optimizer: torch.optim.Muon's definition and state, batched over matrices."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from tilewright_kernels import use_backend
from tilewright_kernels.testing import count_launches, no_synchronization
from tilewright_optim import Muon, muon_reference
from tilewright_optim._muon_matrices import Matrix, batches_of, matrices_of
from tilewright_optim._rounding import join_master
from tilewright_optim.testing import random_parameters, set_random_grads

pytestmark = pytest.mark.usefixtures("backend")


# Wide, tall (one batch with it), square, a single row and column, odd, twice the first.
SHAPES = ((24, 40), (40, 24), (32, 32), (1, 7), (7, 1), (33, 19), (24, 40))
TORCHS = ("nesterov", "adjust_lr_fn", "weight_decay", "momentum", "eps", "ns_steps")


def make(device, dtype=torch.float32, shapes=SHAPES, seed=0):
    return random_parameters(device, dtype, shapes, seed)


def grad_of(param) -> torch.Tensor:
    assert param.grad is not None
    return param.grad


def errors(params, oracle):
    return [
        (p.double().cpu() - o.double().cpu()).abs().max().item()
        for p, o in zip(params, oracle, strict=True)
    ]


def run(make_optimizer, params, steps, **grads):
    optimizer = make_optimizer(params)
    for step in range(steps):
        set_random_grads(params, step, **grads)
        optimizer.step()
    return optimizer


def reference(params, steps, **options):
    """The parameters after some steps of the definition in float64, from the same gradients."""
    wide = [p.detach().cpu().double().requires_grad_() for p in params]
    narrow = [torch.empty_like(p, device="cpu").detach() for p in params]
    optimizer = Muon(wide, **options)
    with use_backend("torch"):
        for step in range(steps):
            set_random_grads(narrow, step)
            for w, n in zip(wide, narrow, strict=True):
                w.grad = grad_of(n).double()
            optimizer.step()
    return wide


OPTIONS: tuple[dict[str, Any], ...] = (
    {"nesterov": False},
    {"adjust_lr_fn": "match_rms_adamw"},
    {"weight_decay": 0.0, "momentum": 0.6},
    {"ns_steps": 3, "eps": 1e-3},
    {"momentum": 0.0},
)
CASES: list[Any] = [(SHAPES, torch.float32, {}), (SHAPES[:3], torch.float64, {})]
CASES += [(SHAPES[:2], torch.float32, options) for options in OPTIONS]


@pytest.mark.parametrize(("shapes", "dtype", "options"), CASES, ids=str)
def test_error_over_steps_is_at_most_twice_torchs(shapes, dtype, options, device):
    ours, torchs = make(device, dtype, shapes), make(device, dtype, shapes)
    oracle = reference(ours, 3, lr=0.05, **options)
    run(lambda params: Muon(params, lr=0.05, **options), ours, 3)
    run(lambda params: torch.optim.Muon(params, lr=0.05, **options), torchs, 3)
    for mine, other, p in zip(errors(ours, oracle), errors(torchs, oracle), ours, strict=True):
        assert mine <= 2 * other + 1e-3, p.shape


def test_hundred_steps(backend, device):
    # Newton–Schulz forgets the size of rounding errors but not their direction: over 100 steps
    # they add up like a random walk, torch's in bfloat16 faster.
    shapes = [(12, 20)]
    ours, torchs = make(device, shapes=shapes), make(device, shapes=shapes)
    oracle = reference(ours, 100, lr=0.02)
    run(lambda params: Muon(params, lr=0.02), ours, 100)
    run(lambda params: torch.optim.Muon(params, lr=0.02), torchs, 100)
    for mine, other in zip(errors(ours, oracle), errors(torchs, oracle), strict=True):
        assert mine <= (2 * other if backend == "triton" else 1e-3)


def test_low_precision_parameters_are_rounded_once(device):
    for dtype in (torch.float16, torch.bfloat16):
        ours, torchs = make(device, dtype), make(device, dtype)
        oracle = reference(ours, 2, lr=0.05)
        run(lambda params: Muon(params, lr=0.05), ours, 2)
        run(lambda params: torch.optim.Muon(params, lr=0.05), torchs, 2)
        ulp = torch.finfo(dtype).eps * 4  # of the largest values, and the interpreter truncates
        for mine, other in zip(errors(ours, oracle), errors(torchs, oracle), strict=True):
            assert mine <= 2 * other + 2 * ulp


def test_momentum_without_nesterov_is_not_normalized(device):
    # What torch.optim.Muon does to bfloat16 buffers.
    params = make(device, torch.bfloat16, shapes=[(8, 12)])
    optimizer = run(lambda p: Muon(p, nesterov=False), params, 1, factor=5.0)
    grad = grad_of(params[0])
    torch.testing.assert_close(
        optimizer.state[params[0]]["momentum_buffer"], 0.05 * grad, rtol=2e-2, atol=1e-2
    )


def test_experts_are_a_batch_of_matrices(device):
    (stacked,) = make(device, shapes=[(3, 16, 24)])
    single = [torch.nn.Parameter(w.detach().clone()) for w in stacked]
    stacked.grad = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(5)).to(device)
    for p, g in zip(single, stacked.grad, strict=True):
        p.grad = g.clone()
    Muon([stacked], lr=0.1).step()
    Muon(single, lr=0.1).step()
    torch.testing.assert_close(stacked.detach(), torch.stack([p.detach() for p in single]))


def test_split_sizes_make_matrices_of_their_own(device):
    rows = (16, 8, 8)
    (stacked,) = make(device, shapes=[(32, 24)])
    parts = [torch.nn.Parameter(w.detach().clone()) for w in stacked.split(rows)]
    stacked.grad = torch.randn(32, 24, generator=torch.Generator().manual_seed(5)).to(device)
    for p, g in zip(parts, stacked.grad.split(rows), strict=True):
        p.grad = g.clone()
    optimizer = Muon([stacked], lr=0.1, split_sizes=rows)
    optimizer.step()
    # adjust_lr_fn sees the parts' shapes too.
    Muon(parts, lr=0.1).step()
    torch.testing.assert_close(stacked.detach(), torch.cat([p.detach() for p in parts]))
    assert list(optimizer.state[stacked]) == ["momentum_buffer"]


def test_batches_are_launched_together(backend, device):
    params = make(device)
    set_random_grads(params, 0)
    optimizer = Muon(params)
    with count_launches() as launches, no_synchronization():
        optimizer.step()
    # Shapes up to transposition: three with wide and tall matrices, two of one kind.
    expected = {"triton": 2 * (2 + 1 + 2 + 1), "torch": 0}
    assert launches["muon"] == expected[backend]
    assert launches["newton_schulz"] == (4 if backend == "triton" else 0)


def test_big_batches_are_cut(monkeypatch, device):
    ours, together = make(device), make(device)
    run(lambda p: Muon(p, lr=0.1), together, 2)
    monkeypatch.setattr("tilewright_optim._muon_step.MOST_ELEMENTS", 1000)
    run(lambda p: Muon(p, lr=0.1), ours, 2)
    for a, b in zip(ours, together, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-3)


def test_gradients_that_are_missing_on_some_steps(device):
    params = make(device)
    before = [p.detach().clone() for p in params]
    optimizer = Muon(params, lr=0.1)
    set_random_grads(params, 0, skip=(0, 3))
    optimizer.step()
    changed = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    assert changed == [i not in (0, 3) for i in range(len(params))]
    assert params[0] not in optimizer.state
    set_random_grads(params, 1)
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))
    set_random_grads(params, 2, skip=range(len(params)))
    optimizer.step()


def test_empty_parameters(device):
    params = make(device, shapes=[(0, 5), (4, 0), (2, 0, 3), (6, 8)])
    run(Muon, params, 2)
    run(Muon, make(device, shapes=[(0, 5)]), 2)


def test_non_contiguous_parameters_and_gradients(device):
    plain = make(device, shapes=[(24, 40), (24, 40)])
    odd = [
        torch.nn.Parameter(plain[0].detach().mT.contiguous().mT),
        torch.nn.Parameter(torch.cat([plain[1].detach()] * 2, 1)[:, :40]),
    ]
    a, b = Muon(plain, lr=0.1), Muon(odd, lr=0.1)
    for step in range(2):
        set_random_grads(plain, step)
        odd[0].grad = grad_of(plain[0]).clone()
        odd[1].grad = grad_of(plain[1]).mT.contiguous().mT
        a.step()
        b.step()
    for p, q in zip(plain, odd, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)


def test_gradients_of_zero_only_decay(device):
    params = make(device, shapes=[(24, 40)])
    before = params[0].detach().clone()
    params[0].grad = torch.zeros_like(params[0])
    Muon(params, lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(params[0].detach(), 0.95 * before)


def test_grad_scale_divides(device):
    a, b = make(device), make(device)
    one, two = Muon(a, lr=0.1), Muon(b, lr=0.1)
    for step in range(2):
        # A scale that changes, which Newton–Schulz alone would not notice.
        two.grad_scale = torch.tensor(4.0 * 8.0**step, device=device)
        set_random_grads(a, step)
        set_random_grads(b, step, factor=float(two.grad_scale))
        one.step()
        two.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_found_inf_leaves_everything_untouched(device):
    params = make(device)
    optimizer = run(lambda p: Muon(p, lr=0.1), params, 1)
    buffers = [optimizer.state[p]["momentum_buffer"] for p in params]
    before = [t.detach().clone() for t in (*params, *buffers)]
    for p in params:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    for t, b in zip((*params, *buffers), before, strict=True):
        assert torch.equal(t, b)
    optimizer.found_inf.zero_()
    set_random_grads(params, 1)
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=False))


def test_nan_stays_in_its_matrix(device):
    params = make(device)
    set_random_grads(params, 0)
    grad_of(params[1])[3, 4] = torch.nan  # in one batch with two others
    Muon(params, lr=0.1).step()
    assert [bool(p.isnan().all()) for p in params] == [i == 1 for i in range(len(params))]
    assert all(p.isfinite().all() for i, p in enumerate(params) if i != 1)


def test_grad_scaler(device):
    if device.type == "cpu":
        pytest.skip("needs a CUDA device: the CPU's scaler scales nothing here")
    a, b = make(device), make(device)
    one, two = Muon(a, lr=0.1), Muon(b, lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=64.0)
    for p, q in zip(a, b, strict=True):
        p.square().sum().backward()
        scaler.scale(q.square().sum()).backward()
    one.step()
    scaler.step(two)
    scaler.update()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_exact_masters_are_float32_training(device):
    shapes = [(24, 40), (40, 24)]
    halves = make(device, torch.bfloat16, shapes)
    wide = [torch.nn.Parameter(p.detach().float()) for p in halves]
    exact = Muon(halves, lr=1e-3, master="exact")
    plain = Muon(wide, lr=1e-3)
    for step in range(6):
        set_random_grads(halves, step)
        for w, h in zip(wide, halves, strict=True):
            w.grad = grad_of(h).float()
        # The buffers have the gradients' dtypes; made equal here, the rest must be too.
        exact.step() if step else _float_buffers(exact, halves)
        plain.step()
        for w, h in zip(wide, halves, strict=True):
            assert torch.equal(join_master(h.detach(), exact.state[h]["master_low"]), w.detach())


def _float_buffers(optimizer, params):
    optimizer.step()
    for p in params:
        state = optimizer.state[p]
        state["momentum_buffer"] = (0.05 * grad_of(p).float()).to(torch.float32)


@pytest.mark.parametrize(
    ("dtype", "master", "expected"),
    [(torch.float32, "none", 12), (torch.bfloat16, "none", 6), (torch.bfloat16, "exact", 8)],
    ids=str,
)
def test_bytes_a_parameter(dtype, master, expected, device):
    params = make(device, dtype, [(16, 24)])
    optimizer = run(lambda p: Muon(p, master=master), params, 1)
    kept = [params[0], grad_of(params[0]), *optimizer.state[params[0]].values()]
    assert sum(t.nbytes for t in kept) == expected * params[0].numel()


def test_subclasses_are_left_to_torch(backend, device):
    class Sharded(torch.Tensor):
        pass

    param = torch.nn.Parameter(torch.ones(4, 4, device=device).as_subclass(Sharded))
    param.grad = torch.ones_like(param)
    optimizer = Muon([param])
    if backend == "triton":
        with pytest.raises(ValueError, match="Sharded"):
            optimizer.step()
    else:
        optimizer.step()


def test_cautious_decay(device):
    options = {"lr": 0.1, "weight_decay": 0.5}
    ours = make(device, shapes=[(8, 12)])
    ours[0].grad = torch.randn(8, 12, generator=torch.Generator().manual_seed(3)).to(device)
    plain = make(device, shapes=[(8, 12)])
    plain[0].grad = ours[0].grad.clone()
    before = ours[0].detach().clone()
    Muon(ours, cautious=True, **options).step()
    Muon(plain, lr=0.1, weight_decay=0.0).step()
    update = before - plain[0].detach()
    expected = torch.where(update * before >= 0, 0.95, 1.0) * before - update
    torch.testing.assert_close(ours[0].detach(), expected, rtol=1e-4, atol=1e-5)


def test_learning_rate_as_a_tensor(device):
    a, b = make(device), make(device)
    one = Muon(a, lr=0.1)
    two = Muon(b, lr=torch.tensor(0.3, device=device))
    two.param_groups[0]["lr"].fill_(0.1)
    set_random_grads(a, 0)
    set_random_grads(b, 0)
    one.step()
    with no_synchronization():
        two.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_groups_with_different_settings(device):
    a, b = make(device), make(device)
    options: list[dict[str, Any]] = [
        {"lr": 0.1, "nesterov": False},
        {"lr": 0.02, "weight_decay": 0.0, "ns_steps": 2},
    ]
    together = Muon([{"params": a[:3], **options[0]}, {"params": a[3:], **options[1]}])
    apart = [Muon(b[:3], **options[0]), Muon(b[3:], **options[1])]
    for step in range(2):
        for params in (a, b):
            set_random_grads(params, step)
        together.step()
        for optimizer in apart:
            optimizer.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_mixed_dtypes_in_a_group(device):
    params = make(device, shapes=[(8, 12)]) + make(device, torch.float16, shapes=[(8, 12)])
    alone = make(device, shapes=[(8, 12)])
    run(lambda p: Muon(p, lr=0.1), params, 2)
    run(lambda p: Muon(p, lr=0.1), alone, 2)
    torch.testing.assert_close(params[0], alone[0])


def test_add_param_group(device):
    first, second = make(device, shapes=[(8, 12)]), make(device, shapes=[(12, 8)], seed=1)
    optimizer = run(lambda p: Muon(p, lr=0.1), first, 1)
    optimizer.add_param_group({"params": second, "lr": 0.3})
    before = second[0].detach().clone()
    set_random_grads(first + second, 2)
    optimizer.step()
    assert not torch.equal(second[0], before)
    with pytest.raises(ValueError, match="takes matrices"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, device=device))]})
    assert len(optimizer.param_groups) == 2


def test_state_dict_goes_to_torch_and_back(device):
    ours, torchs = make(device), make(device)
    optimizer = run(lambda p: Muon(p, lr=0.1), ours, 2)
    theirs = torch.optim.Muon(torchs, lr=0.1)
    state = optimizer.state_dict()
    assert all(list(s) == ["momentum_buffer"] for s in state["state"].values())
    theirs.load_state_dict(copy.deepcopy(state))
    for p, q in zip(ours, torchs, strict=True):
        assert torch.equal(
            optimizer.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"]
        )
    set_random_grads(torchs, 2)
    theirs.step()
    again = Muon(make(device), lr=0.7)
    again.load_state_dict(theirs.state_dict())
    assert again.param_groups[0]["lr"] == 0.1
    assert again.param_groups[0]["form"] == "auto"


def test_states_keep_their_dtypes(device):
    params = make(device, torch.bfloat16, shapes=[(8, 12)])
    optimizer = run(lambda p: Muon(p, master="exact"), params, 1)
    state = optimizer.state[params[0]]
    state["momentum_buffer"] = state["momentum_buffer"].float() * 1.001
    again = Muon(make(device, torch.bfloat16, shapes=[(8, 12)]), master="exact")
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (loaded,) = again.state.values()
    for name, value in state.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_resumes_bit_for_bit(how, device):
    params = make(device)
    optimizer = run(lambda p: Muon(p, lr=0.1), params, 2)
    if how == "deepcopy":
        copies, twin = copy.deepcopy((params, optimizer))
    elif how == "pickle":
        stored = io.BytesIO(pickle.dumps((params, optimizer)))
        copies, twin = pickle.load(stored)
    else:
        copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
        twin = Muon(copies, lr=0.1)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for some, one in ((params, optimizer), (copies, twin)):
        for step in (2, 3):
            set_random_grads(some, step)
            one.step()
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(p, q)


def test_state_tensors(device):
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(2))).to(device)
    optimizer = Muon(model.named_parameters(), lr=0.1)
    set_random_grads(list(model.parameters()), 0)
    optimizer.step()
    tensors = optimizer.state_tensors()
    assert sorted(tensors) == ["0.weight.momentum_buffer", "1.weight.momentum_buffer"]
    twin = copy.deepcopy(model)
    again = Muon(twin.named_parameters(), lr=0.1)
    again.load_state_tensors({name: t.clone() for name, t in tensors.items()})
    for some, one in ((model, optimizer), (twin, again)):
        set_random_grads(list(some.parameters()), 1)
        one.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_closure_and_hooks(device):
    params = make(device, shapes=[(8, 12)])
    optimizer = Muon(params, lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    assert calls == ["pre", "post"] * 2


def test_captured_graph_replays_the_eager_step(backend, device):
    if device.type == "cpu":
        pytest.skip("needs a CUDA device")
    if backend == "torch":
        pytest.skip("needs kernels: the definition in plain torch allocates as it goes")
    captured, eager = make(device), make(device)
    one, two = Muon(captured, lr=torch.tensor(0.1, device=device)), Muon(eager, lr=0.1)
    for params in (captured, eager):
        set_random_grads(params, 0)
    one.step()
    two.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one.step()
    for step in (1, 2):
        new = make(device)
        set_random_grads(new, step)
        for p, q, n in zip(captured, eager, new, strict=True):
            grad_of(p).copy_(grad_of(n))
            q.grad = n.grad
        graph.replay()
        two.step()
    for p, q in zip(captured, eager, strict=True):
        assert torch.equal(p, q)


def test_bits_repeat(device):
    a, b = make(device), make(device)
    for params in (a, b):
        run(lambda p: Muon(p, lr=0.1), params, 2)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_reference_is_the_formula():
    p, g, m = (torch.randn(3, 5, dtype=torch.float64) for _ in range(3))
    expected_m = 0.9 * m + 0.1 * g
    u, _, v = torch.linalg.svd(0.9 * expected_m + 0.1 * g, full_matrices=False)
    expected = p * (1 - 0.2 * 0.3) - 0.2 * (u @ v)
    muon_reference(
        [p], [g], [m], lr=0.2, weight_decay=0.3, momentum=0.9, nesterov=True,
        ns_coefficients=(1.5, -0.5, 0.0), ns_steps=60,
    )  # fmt: skip
    torch.testing.assert_close(m, expected_m)
    torch.testing.assert_close(p, expected)


def test_matrices_of_parameters():
    assert list(matrices_of(4, (6, 5), None)) == [Matrix(4, 0, 6, 5)]
    assert list(matrices_of(0, (2, 6, 5), (4, 2))) == [
        Matrix(0, 0, 4, 5), Matrix(0, 20, 2, 5), Matrix(0, 30, 4, 5), Matrix(0, 50, 2, 5),
    ]  # fmt: skip
    assert list(matrices_of(0, (6, 5), (0, 6))) == [Matrix(0, 0, 6, 5)]
    assert list(matrices_of(0, (0, 5), None)) == []


def test_batches_of_matrices():
    matrices = [Matrix(i, 0, *shape) for i, shape in enumerate([(4, 6), (6, 4), (4, 4), (4, 6)])]
    both, square = batches_of(matrices, 1000)
    assert (both.n, both.m) == (4, 6)
    assert [m.parameter for m in both.wide + both.tall] == [0, 3, 1]
    assert [m.parameter for m in square.wide] == [2]
    # At most two of a shape, and about equal.
    assert [len(b.wide + b.tall) for b in batches_of(matrices, 50)] == [1, 2, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": torch.ones(2)}, "one of one element"),
        ({"momentum": 1.5}, "from 0 to 1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"adjust_lr_fn": "best"}, "match_rms_adamw"),
        ({"ns_coefficients": "best"}, "quintic"),
        ({"ns_steps": 100}, "from 0 to 99"),
        ({"form": "best"}, "gram"),
        ({"master": "stochastic"}, "exact"),
        ({"split_sizes": (3, 6)}, "add up to 9"),
        ({"split_sizes": (3.0, 5.0)}, "numbers of rows"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Muon([torch.nn.Parameter(torch.ones(8, 4))], **options)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4, 5)], ids=str)
def test_other_dimensions_are_refused(shape):
    with pytest.raises(ValueError, match="MuonW gives all else to AdamW"):
        Muon([torch.nn.Parameter(torch.ones(shape))])


def test_sparse_and_complex_are_refused(device):
    embedding = torch.nn.Embedding(5, 3, sparse=True).to(device)
    embedding(torch.tensor([1], device=device)).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        Muon(embedding.parameters()).step()
    with pytest.raises(TypeError, match="complex64"):
        Muon([torch.nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))])
