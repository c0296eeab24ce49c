"""adamw_reference against torch.optim.AdamW, its definition."""

from typing import Any

import pytest
import torch

from tilewright_optim import adamw_reference

OPTIONS = [
    {},
    {"amsgrad": True},
    {"maximize": True},
    {"weight_decay": 0.0},
    {"betas": (0.0, 0.4), "eps": 1e-3},
]
SHAPES = ((), (5,), (3, 4), (0,))


def make(dtype, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


class Reference:
    """The function with the state that it needs between calls."""

    def __init__(self, params, *, betas=(0.9, 0.999), amsgrad=False, **options):
        self.params = params
        self.averages = [[torch.zeros_like(p) for p in params] for _ in range(2 + amsgrad)]
        self.steps = [torch.tensor(0.0) for _ in params]
        self.options: dict[str, Any] = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 1e-2, **options}
        self.options.update(beta1=betas[0], beta2=betas[1], amsgrad=amsgrad)

    def step(self, grads, **scaling):
        m, v, *maxima = self.averages
        maxima = maxima[0] if maxima else []
        adamw_reference(self.params, grads, m, v, maxima, self.steps, **self.options, **scaling)


def assert_follows_torch(dtype, options, tolerance, *, fused=False, steps=4):
    ours = make(dtype)
    torchs = [torch.nn.Parameter(p.clone()) for p in ours]
    reference = Reference(ours, **options)
    optimizer = torch.optim.AdamW(torchs, lr=1e-2, foreach=False, fused=fused, **options)
    for step in range(steps):
        grads = make(dtype, seed=step + 1)
        for p, g in zip(torchs, grads, strict=True):
            p.grad = g.clone()
        reference.step(grads)
        optimizer.step()
    for i, p in enumerate(torchs):
        torch.testing.assert_close(ours[i], p.detach(), **tolerance)
        state = optimizer.state[p]
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        for name, average in zip(names, reference.averages, strict=False):
            torch.testing.assert_close(average[i], state[name], **tolerance)
        assert reference.steps[i] == state["step"] == steps


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_torchs(dtype, options):
    eps = torch.finfo(dtype).eps
    assert_follows_torch(dtype, options, {"rtol": 8 * eps, "atol": 4 * eps})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_is_torchs_fused_in_low_precision(dtype, options):
    # Both compute in float32 and round once a step: one rounding apart at most, after one step.
    eps = torch.finfo(dtype).eps
    assert_follows_torch(dtype, options, {"rtol": eps, "atol": 1e-6}, fused=True, steps=1)


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2), torch.tensor([1e-2])], ids=str)
@pytest.mark.parametrize("step_dtype", [torch.float32, torch.float64], ids=str)
def test_closed_form_at_step_seven(lr, step_dtype, device):
    lr = lr.to(device) if isinstance(lr, torch.Tensor) else lr
    step = torch.tensor(6.0, dtype=step_dtype, device=device)
    param, grad, m, v = (t.abs().to(device) for t in make(torch.float32, [(7,)] * 4))
    expected = [t.double().clone() for t in (param, m, v)]
    adamw_reference(
        [param], [grad], [m], [v], [], [step],
        lr=lr, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1,
    )  # fmt: skip
    p64, m64, v64 = expected
    m64 += 0.1 * (grad.double() - m64)
    v64 = 0.99 * v64 + 0.01 * grad.double() ** 2
    update = m64 / (1 - 0.9**7) / ((v64 / (1 - 0.99**7)).sqrt() + 1e-8)
    p64 = p64 * (1 - 0.1 * 1e-2) - 1e-2 * update
    torch.testing.assert_close(param.double(), p64, rtol=1e-6, atol=0)
    assert step == 7


def test_grad_scale_divides():
    plain, scaled = Reference(make(torch.float32)), Reference(make(torch.float32))
    grads = make(torch.float32, seed=1)
    plain.step(grads)
    scaled.step([4 * g for g in grads], grad_scale=torch.tensor(4.0))
    for a, b in zip(plain.params, scaled.params, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_found_inf_leaves_everything_alone(dtype):
    skipped, plain = Reference(make(dtype), amsgrad=True), Reference(make(dtype), amsgrad=True)
    grads = make(dtype, seed=1)
    skipped.step([g * torch.inf for g in grads], found_inf=torch.tensor(1.0))
    assert all(step == 0 for step in skipped.steps)
    skipped.step(grads, found_inf=torch.tensor(0.0))
    plain.step(grads)
    for ours, expected in zip(
        (skipped.params, skipped.steps, *skipped.averages),
        (plain.params, plain.steps, *plain.averages),
        strict=True,
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_gradients_are_left_alone():
    reference = Reference(make(torch.float32), maximize=True)
    grads = make(torch.float32, seed=1)
    before = [g.clone() for g in grads]
    reference.step(grads, grad_scale=torch.tensor(2.0))
    for a, b in zip(grads, before, strict=True):
        assert torch.equal(a, b)
