"""How matmul is launched: which rung, how often, stream-K's parts, into memory that is given."""

import itertools

import pytest
import torch

from tilewright_kernels import matmul, matmul_reference, use_backend
from tilewright_kernels._operator import Operator
from tilewright_kernels.matmul import launch_matmul, launches
from tilewright_kernels.testing import (
    assert_as_accurate,
    check_against_float64,
    count_launches,
    randn,
)

OP = Operator("matmul")
RUNGS = launches.ALGORITHMS

pytestmark = pytest.mark.usefixtures("small_matmul_tiles")


def operands(M, N, K, *, dtype, device):
    a = randn(M, K, dtype=dtype, device=device, seed=1).requires_grad_()
    return a, randn(K, N, dtype=dtype, device=device, seed=2).requires_grad_()


def precise(f, **options):
    """float32 without tf32, as torch multiplies unless told otherwise."""
    return lambda *args: f(*args, precision="ieee", **options)


@pytest.mark.smoke
def test_persistent_takes_what_descriptors_can_describe(device, monkeypatch):
    taken = []
    launch = OP.launch

    def note(self, kernel, *args, **meta):
        taken.append(kernel.__name__)
        launch(kernel, *args, **meta)

    monkeypatch.setattr(Operator, "launch", note)
    a, b = (x.detach() for x in operands(32, 24, 16, dtype=torch.float16, device=device))
    with use_backend("triton"):
        matmul(a, b)
        matmul(a[:, 1:], b[1:], algorithm="persistent")
    assert taken == ["matmul_persistent_kernel", "matmul_pipelined_kernel"]


def test_stages_leave_room_for_the_epilogue():
    stages, tile = launches.stages_for, launches.Tile(128, 256, 64, 8, 3, 8, 2)
    assert [stages(tile, 2, ends) for ends in (2, 4, 6, 8)] == [3, 3, 2, 2]
    assert stages(launches.Tile(128, 128, 32, 8, 3, 8, 1), 4, 8) == 3


@pytest.mark.parametrize(("batch", "launched"), [((7,), 3), ((5, 2), 5), ((2, 5), 4)], ids=str)
def test_more_matrices_than_a_launch_may_have(batch, launched, device, monkeypatch):
    # Rows of 7 elements, which are no descriptors'; batches with gaps, which do not merge.
    monkeypatch.setattr(launches, "MOST_MATRICES", 3)
    wide = [2 * n for n in batch]
    gaps = (slice(None, None, 2),) * len(batch)
    a = randn(*wide, 5, 7, dtype=torch.float32, device=device)[gaps]
    b = randn(*wide, 7, 3, dtype=torch.float32, device=device, seed=1)[gaps]
    residual = randn(*wide, 5, 3, dtype=torch.float32, device=device, seed=2)[gaps]
    with use_backend("triton"), count_launches() as count:
        y = matmul(a, b, residual=residual, precision="ieee")
        assert torch.equal(matmul(a, b, precision="ieee", algorithm="naive") + residual, y)
    torch.testing.assert_close(y, a @ b + residual)
    assert count["matmul"] == 2 * launched


@pytest.mark.parametrize("shape", [(33, 48, 210), (16, 96, 400), (100, 40, 90), (16, 32, 999)])
def test_stream_k_of_many_parts(shape, device, monkeypatch):
    # Four programs on the CPU, 1 to 3 tiles after whole waves, bands that end in short ones.
    monkeypatch.setattr(launches, "LEAST_STEPS", 0)
    a, b = operands(*shape, dtype=torch.float32, device=device)
    bias = randn(shape[1], dtype=torch.float32, device=device, seed=3).requires_grad_()

    def rung(f, **more):
        return lambda a, b, bias: f(a, b, bias=bias, activation="relu", **more)

    check_against_float64(
        rung(matmul, algorithm="stream_k", precision="ieee"), rung(matmul_reference),
        [a, b, bias], operator="matmul",
    )  # fmt: skip


def test_stream_k_of_whole_waves_has_nothing_to_share(device, monkeypatch):
    # One program: whole waves, whatever the number of tiles.
    monkeypatch.setattr(launches, "num_programs", lambda device, per_sm: 1)
    inputs = operands(40, 48, 32, dtype=torch.float16, device=device)
    check_against_float64(
        precise(matmul, algorithm="stream_k"), matmul_reference, inputs, operator="matmul"
    )
    with use_backend("triton"), torch.no_grad(), count_launches() as launched:
        matmul(*inputs, algorithm="stream_k")
    assert launched["matmul"] == 1


def test_stretches_cover_all_steps():
    for shared, steps, programs in itertools.product((1, 60, 72, 131), (1, 2, 24, 256), (132,)):
        stretch = launches.stretch_for(shared, steps, programs)
        assert stretch * programs >= shared * steps
        assert stretch <= steps
        assert steps % stretch == 0 or min(steps, launches.LEAST_STEPS) <= steps % stretch


def test_heads_are_read_in_place(device):
    # [B, T, H, D] as [B, H, T, D]: a batch whose two dimensions have no common stride.
    q = randn(2, 9, 3, 8, dtype=torch.float32, device=device).requires_grad_()
    k = randn(2, 9, 3, 8, dtype=torch.float32, device=device, seed=1).requires_grad_()

    def heads(f, **options):
        return lambda q, k: f(q.transpose(1, 2), k.permute(0, 2, 3, 1), **options)

    for algorithm in RUNGS:
        ours = heads(matmul, precision="ieee", algorithm=algorithm)
        check_against_float64(ours, heads(torch.matmul), (q, k), operator="matmul")
    with use_backend("triton"), count_launches() as launched:
        matmul(q.transpose(1, 2), k.permute(0, 2, 3, 1))
    assert launched["matmul"] == 1


def test_a_batch_with_one_weight_is_one_launch(device):
    a = randn(2, 3, 5, 16, dtype=torch.float32, device=device).requires_grad_()
    b = randn(16, 8, dtype=torch.float32, device=device).requires_grad_()
    with use_backend("triton"), count_launches() as launched:
        matmul(a, b).sum().backward()
    assert launched["matmul"] == 3


@pytest.mark.parametrize("algorithm", RUNGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_accumulates_into_float32(dtype, algorithm, device):
    a, b = (x.detach() for x in operands(40, 32, 24, dtype=dtype, device=device))
    a = a.mT.contiguous().mT  # a gradient's left operand lies so
    out = randn(40, 32, dtype=torch.float32, device=device, seed=3)
    before = out.clone()
    launch_matmul(OP, a, b, out, accumulate=True, algorithm=algorithm, precision="ieee")
    same = before + (a.float() @ b.float())
    assert_as_accurate(out, same, before.double() + a.double() @ b.double())


def test_factor_and_strided_output(device):
    # What backward of an activation asks for: f'(A·B) · dy.
    a, b = (x.detach() for x in operands(20, 32, 16, dtype=torch.float32, device=device))
    dy = randn(20, 32, dtype=torch.float32, device=device, seed=5)
    expected = dy * torch.where(a @ b > 0, 1.0, 0.0)
    for algorithm, layout in itertools.product(RUNGS, (False, True)):
        out = torch.full((32, 20) if layout else (20, 32), torch.nan, device=device)
        out = out.T if layout else out
        launch_matmul(
            OP, a, b, out, activation="relu_grad", factor=dy, algorithm=algorithm, precision="ieee"
        )
        torch.testing.assert_close(out, expected)


@pytest.mark.gpu
def test_more_matrices_than_one_launch_has_programs():
    a = torch.randn(70000, 3, 5, device="cuda", dtype=torch.float16)
    b = torch.randn(70000, 5, 7, device="cuda", dtype=torch.float16)
    with use_backend("triton"):
        torch.testing.assert_close(matmul(a, b), a @ b, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", RUNGS)
def test_accumulates_at_real_sizes(algorithm):
    device = torch.device("cuda")
    a, b = operands(1536, 1032, 4096, dtype=torch.bfloat16, device=device)
    a = a.mT.contiguous().mT
    out = randn(1536, 1032, dtype=torch.float32, device=device, seed=3)
    before = out.double()
    with torch.no_grad():
        launch_matmul(OP, a, b, out, accumulate=True, algorithm=algorithm)
        same = before.float() + torch.mm(a, b, out_dtype=torch.float32)
        assert_as_accurate(out, same, before + a.double() @ b.double())
