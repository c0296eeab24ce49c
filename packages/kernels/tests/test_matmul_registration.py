"""matmul as an operator of torch's: what autograd keeps and asks for, autocast, compiled."""

import pytest
import torch

from tilewright_kernels import matmul, matmul_reference, use_backend
from tilewright_kernels.matmul import launches
from tilewright_kernels.testing import (
    check_against_float64,
    check_compiles,
    check_deterministic,
    check_gradients,
    poisoned_memory,
    randn,
)

RUNGS = launches.ALGORITHMS

pytestmark = pytest.mark.usefixtures("small_matmul_tiles")


def operands(M, N, K, *, dtype, device):
    a = randn(M, K, dtype=dtype, device=device, seed=1).requires_grad_()
    return a, randn(K, N, dtype=dtype, device=device, seed=2).requires_grad_()


@pytest.mark.parametrize("shapes", [((2, 5, 0), (0, 3)), ((2, 5, 4), (4, 0)), ((2, 0, 4), (4, 3))])
def test_gradients_of_nothing(shapes, device):
    a, b = (randn(*s, dtype=torch.float32, device=device).requires_grad_() for s in shapes)
    bias = randn(shapes[1][1], dtype=torch.float32, device=device).requires_grad_()
    with use_backend("triton"):
        y = matmul(a, b, bias=bias, activation="silu")
        grads = torch.autograd.grad(y.sum(), (a, b, bias))
    expected = matmul_reference(a, b, bias=bias, activation="silu")
    for ours, torchs in zip(
        (y, *grads), (expected, *torch.autograd.grad(expected.sum(), (a, b, bias))), strict=True
    ):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (1, 2, 3)], ids=str)
def test_gradients_of_some_inputs_only(frozen, device):
    a, b = operands(20, 32, 16, dtype=torch.float32, device=device)
    bias = randn(32, dtype=torch.float32, device=device, seed=3).requires_grad_()
    residual = randn(20, 32, dtype=torch.float32, device=device, seed=4).requires_grad_()
    inputs = [a, b, bias, residual]
    for i in frozen:
        inputs[i] = inputs[i].detach()
    check_against_float64(
        lambda a, b, c, r: matmul(a, b, bias=c, residual=r, activation="silu", precision="ieee"),
        lambda a, b, c, r: matmul_reference(a, b, bias=c, residual=r, activation="silu"),
        inputs,
        operator="matmul",
    )


def test_keeps_for_backward_what_its_gradients_need(device):
    a, b = operands(20, 32, 16, dtype=torch.float32, device=device)

    def kept(a, b, **options):
        found: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks
        with use_backend("triton"), hooks(lambda t: found.append(t.data_ptr()) or t, lambda t: t):
            matmul(a, b, **options)
        return set(found)

    assert kept(a, b.detach()) == {b.data_ptr()}
    assert kept(a.detach(), b) == {a.data_ptr()}
    assert kept(a, b.detach(), activation="silu") == {a.data_ptr(), b.data_ptr()}
    assert kept(a.detach(), b.detach(), residual=a @ b) == set()


def test_changes_in_place_matter_where_backward_reads(device):
    a, b = operands(20, 32, 16, dtype=torch.float32, device=device)
    x, w = a * 1, b.detach().clone()
    with use_backend("triton"):
        y, z = matmul(x, w).sum(), matmul(x, w).sum()
        x.mul_(2)
        y.backward()
        w.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.backward()


def test_output_gradient_layouts(device):
    a, b = operands(16, 16, 32, dtype=torch.float32, device=device)
    one, wide = torch.ones((), device=device), torch.rand(16, 19, device=device)
    for dy in (one.expand(16, 16), wide[:, :16].T, wide[:, 3:]):
        with use_backend("triton"):
            ours = torch.autograd.grad(matmul(a, b, precision="ieee"), (a, b), dy)
        for x, y in zip(ours, torch.autograd.grad(a @ b, (a, b), dy), strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast(backend, device):
    a, b = (x.detach() for x in operands(20, 32, 16, dtype=torch.float32, device=device))
    with torch.autocast(device.type, dtype=torch.float16), use_backend(backend):
        y = matmul(a, b.half())
        wide = matmul(a, b, out_dtype=torch.float32)
    half = a.half().double() @ b.half().double()
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), half, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(wide.double(), half, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["persistent", "pipelined"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradcheck(activation, algorithm):
    a, b = operands(4, 3, 5, dtype=torch.float64, device=torch.device("cpu"))
    bias = randn(3, dtype=torch.float64, device="cpu").requires_grad_()
    residual = randn(4, 1, dtype=torch.float64, device="cpu").requires_grad_()
    check_gradients(
        lambda a, b, c, r: matmul(
            a, b, bias=c, residual=r, activation=activation, scale=0.7, algorithm=algorithm
        ),
        (a, b, bias, residual),
        operator="matmul",
    )


def test_gradcheck_of_a_batch():
    a = randn(2, 2, 2, 1, dtype=torch.float64, device="cpu").transpose(0, 1).requires_grad_()
    b = randn(2, 1, 2, dtype=torch.float64, device="cpu").requires_grad_()
    check_gradients(matmul, (a, b), operator="matmul")


def test_batches_of_output_gradients_and_of_operands(device):
    a, b = operands(5, 8, 4, dtype=torch.float32, device=device)
    residual = randn(5, 1, dtype=torch.float32, device=device, seed=3).requires_grad_()
    dys = randn(3, 5, 8, dtype=torch.float32, device=device, seed=4)
    wrt = a, b, residual
    with use_backend("triton"):
        y = matmul(a, b, residual=residual, activation="silu", precision="ieee")
        ours = torch.autograd.grad(y, wrt, dys, is_grads_batched=True)
        many = torch.func.vmap(matmul, in_dims=(0, None))(dys.mT, a.detach())
        with pytest.raises(RuntimeError, match=r"no derivative for torch\.func's transforms"):
            torch.func.grad(lambda a: matmul(a, b).sum())(a)
    y = matmul_reference(a, b, residual=residual, activation="silu")
    for x, expected in zip(
        ours, torch.autograd.grad(y, wrt, dys, is_grads_batched=True), strict=True
    ):
        torch.testing.assert_close(x, expected)
    torch.testing.assert_close(many, dys.mT @ a.detach())


def test_second_derivative_is_refused(device):
    a, b = operands(3, 5, 2, dtype=torch.float32, device=device)
    with use_backend("triton"), pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(matmul(a, b).sum(), a, create_graph=True)


def test_compiles(device):
    a, b = operands(20, 32, 16, dtype=torch.float32, device=device)
    bias = randn(32, dtype=torch.float32, device=device).requires_grad_()
    check_compiles(
        lambda a, b, c: matmul(a, b, bias=c, activation="silu", precision="ieee"), (a, b, bias),
        operator="matmul",
    )  # fmt: skip
    check_compiles(lambda a, b: matmul(a.expand(2, 20, 16), b), (a, b), operator="matmul")


def test_compiles_once_for_all_sizes(device):
    torch._dynamo.reset()
    compiles: list[int] = []

    def backend(graph, inputs):
        compiles.append(1)
        return graph.forward

    f = torch.compile(
        lambda a, b, r: matmul(a, b, residual=r, activation="silu", precision="ieee"),
        fullgraph=True, dynamic=True, backend=backend,
    )  # fmt: skip
    for rows in (5, 8, 13):
        a = randn(2, rows, 16, dtype=torch.float32, device=device)
        b, r = (randn(n, 24, dtype=torch.float32, device=device, seed=1) for n in (16, rows))
        with use_backend("triton"):
            torch.testing.assert_close(f(a, b, r), torch.nn.functional.silu(a @ b) + r)
    assert len(compiles) == 1


def test_opcheck(device):
    a, b = operands(8, 16, 4, dtype=torch.float32, device=device)
    bias = randn(16, dtype=torch.float32, device=device).requires_grad_()
    residual = randn(8, 16, dtype=torch.float32, device=device).requires_grad_()
    options = ("gelu", 0.5, None, "ieee")
    ops = torch.ops.tilewright
    torch.library.opcheck(
        ops.matmul_forward.default, (a, b, bias, residual, *options, torch.float32)
    )
    with torch.no_grad():
        torch.library.opcheck(
            ops.matmul_backward.default, (residual, a, b, bias, *options, [8, 4], None, True)
        )


@pytest.mark.parametrize("algorithm", RUNGS)
@pytest.mark.parametrize("shape", [(33, 17, 20), (40, 32, 24)], ids=str)
def test_every_element_is_written_and_bits_repeat(shape, algorithm, device):
    a, b = operands(*shape, dtype=torch.float32, device=device)
    dy = torch.rand(shape[:2], device=device)

    def run():
        y = matmul(a, b, activation="silu", algorithm=algorithm)
        return y, *torch.autograd.grad(y, (a, b), dy)

    with use_backend("triton"), poisoned_memory():
        assert all(t.isfinite().all() for t in run())
        check_deterministic(run)


def test_inputs_are_left_alone(device):
    a, b = operands(20, 32, 16, dtype=torch.float32, device=device)
    residual = randn(20, 32, dtype=torch.float32, device=device).requires_grad_()
    kept = [x.detach().clone() for x in (a, b, residual)]
    with use_backend("triton"):
        matmul(a, b, residual=residual, activation="gelu").sum().backward()
    for x, before in zip((a, b, residual), kept, strict=True):
        assert torch.equal(x, before)
