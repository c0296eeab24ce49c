"""matmul's epilogues, values and gradients: bias, activation, residual, scale, out_dtype."""

import pytest
import torch

from tilewright_kernels import matmul, matmul_reference, use_backend
from tilewright_kernels.matmul import launches
from tilewright_kernels.testing import check_against_float64, randn

RUNGS = launches.ALGORITHMS

pytestmark = pytest.mark.usefixtures("small_matmul_tiles")


def operands(M, N, K, *, dtype, device):
    a = randn(M, K, dtype=dtype, device=device, seed=1).requires_grad_()
    return a, randn(K, N, dtype=dtype, device=device, seed=2).requires_grad_()


def check_epilogue(sizes, activation, algorithm, dtype, device):
    (m, n, _), options = sizes, {"dtype": dtype, "device": device}
    a, b = operands(*sizes, **options)
    bias = randn(n, **options, seed=3).requires_grad_()
    residual = randn(m, n, **options, seed=4).requires_grad_()

    def with_all(f, **more):
        return lambda a, b, bias, residual: f(
            a, b, bias=bias, activation=activation, residual=residual, scale=0.3, **more
        )

    check_against_float64(
        with_all(matmul, algorithm=algorithm, precision="ieee"), with_all(matmul_reference),
        [a, b, bias, residual], operator="matmul",
    )  # fmt: skip


@pytest.mark.parametrize("algorithm", RUNGS)
@pytest.mark.parametrize("activation", [None, *launches.ACTIVATIONS])
def test_epilogue(activation, algorithm, device):
    check_epilogue((40, 32, 24), activation, algorithm, torch.float32, device)


@pytest.mark.parametrize("shape", [(32,), (1, 1), (20, 1), (3, 1, 32)], ids=str)
def test_residual_broadcasts(shape, device):
    a = randn(3, 20, 16, dtype=torch.float32, device=device).requires_grad_()
    b = randn(16, 32, dtype=torch.float32, device=device, seed=1).requires_grad_()
    residual = randn(*shape, dtype=torch.float32, device=device, seed=2).requires_grad_()
    check_against_float64(
        lambda a, b, r: matmul(a, b, residual=r, precision="ieee"),
        lambda a, b, r: a @ b + r,
        [a, b, residual],
        operator="matmul",
    )


def test_half_operands_with_wide_bias_residual_and_result(device):
    a, b = operands(20, 32, 16, dtype=torch.float16, device=device)
    bias = randn(32, dtype=torch.float32, device=device, seed=3).requires_grad_()
    residual = randn(20, 32, dtype=torch.float32, device=device, seed=4).requires_grad_()

    def with_all(f):
        return lambda a, b, bias, r: f(a, b, bias=bias, residual=r, out_dtype=torch.float32)

    inputs = [a, b, bias, residual]
    check_against_float64(with_all(matmul), with_all(matmul_reference), inputs, operator="matmul")


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_result_narrower_than_its_operands(activation, device):
    # Backward rounds dz to the operands' dtype, not to the result's.
    a, b = operands(20, 32, 16, dtype=torch.float32, device=device)
    bias = randn(32, dtype=torch.float32, device=device, seed=3).requires_grad_()
    grads = []
    for f in (lambda *x, **o: matmul(*x, precision="ieee", **o), matmul_reference):
        with use_backend("triton"):
            y = f(a, b, bias=bias, activation=activation, out_dtype=torch.float16)
        dy = randn(20, 32, dtype=torch.float16, device=device, seed=4)
        grads.append(torch.autograd.grad(y, (a, b, bias), dy))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", RUNGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_epilogue_at_real_sizes(activation, dtype, algorithm):
    check_epilogue((1000, 1544, 520), activation, algorithm, dtype, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", RUNGS)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_wide_residual_at_real_sizes(out_dtype, algorithm):
    # A tile of it in shared memory is twice as large as one of the operands' dtype; backward of
    # the activation has a factor of out_dtype instead.
    device = torch.device("cuda")
    a, b = operands(1000, 1544, 520, dtype=torch.bfloat16, device=device)
    residual = randn(1000, 1544, dtype=torch.float32, device=device, seed=4).requires_grad_()

    def with_all(f, **more):
        return lambda a, b, residual: f(
            a, b, activation="gelu", residual=residual, out_dtype=out_dtype, **more
        )

    check_against_float64(
        with_all(matmul, algorithm=algorithm), with_all(matmul_reference), [a, b, residual],
        operator="matmul",
    )  # fmt: skip
