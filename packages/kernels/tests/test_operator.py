"""What every operator is made of, on a small operator of the test's own."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from tilewright_kernels import backend_report
from tilewright_kernels._launch import cdiv
from tilewright_kernels._operator import Operator, as_rows, check_floating, check_same_device
from tilewright_kernels._triton import tl, triton
from tilewright_kernels.testing import count_launches

DOUBLE = Operator("double")


@triton.jit
def _double_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, 2 * tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i < n)


@DOUBLE.function(
    fake=lambda x: torch.empty_like(x),
    setup_context=lambda ctx, inputs, output: None,
    backward=lambda ctx, dy: double(dy),
)
def double(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    DOUBLE.launch(_double_kernel, (cdiv(x.numel(), 64),), x, y, x.numel(), BLOCK=64)
    return y


def test_eager_skips_the_dispatcher_and_compiled_does_not(device):
    x = torch.randn(70, device=device)
    profile = torch.autograd.profiler.profile()
    with profile:
        assert torch.equal(double(x), 2 * x)
    events: Any = profile.function_events
    assert "tilewright::double" not in {event.name for event in events}
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    compiled = torch.compile(double, fullgraph=True, backend=keep)
    assert torch.equal(compiled(x), 2 * x)
    assert "tilewright.double" in graphs[0]


def test_gradient(device):
    x = torch.randn(5, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(double(x), x, torch.ones_like(x))
    assert torch.equal(dx, torch.full_like(x, 2))


def test_no_graph_where_no_gradient_is_needed(device):
    x = torch.randn(5, device=device, requires_grad=True)
    with torch.no_grad():
        assert double(x).grad_fn is None
    assert double(x.detach()).grad_fn is None


def test_fake_tensors_go_through_the_fake(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode, count_launches() as launches:
        y = double(mode.from_tensor(torch.ones(7, device=device)))
    assert y.shape == (7,)
    assert launches["double"] == 0


def test_an_empty_grid_launches_nothing(device):
    with count_launches() as launches:
        assert double(torch.ones(0, device=device)).shape == (0,)
    assert launches["double"] == 0


def test_launches_are_counted_by_operator(device):
    before = backend_report()["double"].launches
    with count_launches() as launches:
        for _ in range(3):
            double(torch.ones(5, device=device))
    assert launches["double"] == 3
    assert backend_report()["double"].launches == before + 3


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (lambda x: x, False),
        (lambda x: x[..., 1:5], False),  # a slice of wider rows
        (lambda x: x.transpose(0, 1), True),  # rows whose starts follow no single stride
        (lambda x: x[:, :1].expand(-1, 3, -1), True),
        (lambda x: x[..., ::2], True),  # elements of a row apart
    ],
)
def test_rows_are_views_where_a_view_exists(make, copies):
    x = make(torch.arange(48.0).view(2, 3, 8))
    rows = as_rows(x, x.shape[-1])
    assert rows.stride(-1) == 1
    assert torch.equal(rows, x.reshape(-1, x.shape[-1]))
    assert (rows.data_ptr() != x.data_ptr()) == copies


def test_rows_of_nothing():
    assert as_rows(torch.empty(2, 0, 4), 4).shape == (0, 4)


def test_checks_name_the_value_and_the_remedy():
    with pytest.raises(TypeError, match=r"x is torch.int32; give float16.*x.to\("):
        check_floating("x", torch.ones(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="a on cpu, b on meta; move them to one"):
        check_same_device(a=torch.ones(1), b=torch.ones(1, device="meta"), c=None)


def test_lazily_negated_tensors_are_negated(device):
    x = torch.randn(3, 8, dtype=torch.cfloat, device=device).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(double(x), 2 * x.clone())


def test_forward_mode_is_refused_instead_of_dropped(device):
    x = torch.randn(3, device=device)
    with forward_ad.dual_level():
        torch.testing.assert_close(double(x), 2 * x)
        with pytest.raises(RuntimeError, match=r"no forward-mode derivative; use_backend\("):
            double(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd])
def test_transforms_of_torch_func_are_refused_with_a_remedy(transform, device):
    with pytest.raises(RuntimeError, match=r"use_backend\("):
        transform(lambda x: double(x).sum())(torch.randn(3, device=device))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_and_tracing_go_through_the_dispatcher(device):
    x = torch.randn(2, 3, device=device)
    torch.testing.assert_close(torch.func.vmap(double)(x), 2 * x)
    assert "tilewright" in make_fx(double)(x).code


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_many_output_gradients_at_once_are_taken_apart(device):
    x = torch.randn(5, device=device, requires_grad=True)
    y = double(x)
    dys = torch.randn(3, 5, device=device)
    with count_launches() as launches:
        (dx,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    assert torch.equal(dx, 2 * dys)
    assert launches["double"] == 3
    jacobian = torch.autograd.functional.jacobian(double, x, vectorize=True)
    assert torch.equal(jacobian, 2 * torch.eye(5, device=device))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_after_a_batch_of_gradients_eager_skips_the_dispatcher_again(device, monkeypatch):
    x = torch.randn(5, device=device, requires_grad=True)
    y = double(x)
    with monkeypatch.context() as patched:
        patched.setattr(DOUBLE, "launch", Mock(side_effect=RuntimeError("no launch")))
        with pytest.raises(RuntimeError, match="no launch"):
            torch.autograd.grad(y, x, torch.ones(3, 5, device=device), is_grads_batched=True)
    profile = torch.autograd.profiler.profile()
    with profile:
        torch.autograd.grad(double(x), x, torch.ones(5, device=device))
    events: Any = profile.function_events
    assert "tilewright::double" not in {event.name for event in events}
