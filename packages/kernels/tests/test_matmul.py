"""matmul: every rung against float64, over layouts, sizes, batches and epilogues."""

import itertools
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright_kernels import matmul, matmul_reference, use_backend
from tilewright_kernels._operator import Operator
from tilewright_kernels._tf32 import rounded_to_tf32
from tilewright_kernels._triton import INTERPRETED
from tilewright_kernels.matmul import launch_matmul, launches
from tilewright_kernels.testing import (
    FLOATING,
    assert_as_accurate,
    check_against_float64,
    check_compiles,
    check_deterministic,
    check_gradients,
    count_launches,
    poisoned_memory,
)

OP = Operator("matmul")
RUNGS = launches.ALGORITHMS
SHAPES = (
    (1, 1, 1),  # the smallest there is
    (5, 3, 7),  # odd in all, one partial tile
    (33, 48, 40),  # several tiles, K no multiple of a tile, strides that descriptors can describe
    (16, 32, 0),  # nothing to sum
    (0, 8, 16),  # nothing to compute
)
# Whole tiles of every rung, ragged ones, more tiles than multiprocessors, a long shared dimension.
REAL_SHAPES = ((256, 512, 128), (1000, 776, 520), (4096, 1536, 1536), (130, 70, 16384))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16 on the CPU: several of them in matrices that the interpreter is quick with."""
    if INTERPRETED:
        for tiles in launches.TILES.values():
            for size, tile in tiles.items():
                small = tile._replace(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16)
                monkeypatch.setitem(tiles, size, small)
    launches.tile_for.cache_clear()
    yield
    launches.tile_for.cache_clear()


def dots(dtype, device):
    """Skip what the interpreter computes wrong: products of bfloat16."""
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("needs a GPU: the interpreter multiplies the bits of bfloat16")


def randn(*shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def operand(rows, cols, transposed, *, dtype, device, seed):
    """[rows, cols], in memory as it is or as its transpose."""
    if transposed:
        return randn(cols, rows, dtype=dtype, device=device, seed=seed).T.requires_grad_()
    return randn(rows, cols, dtype=dtype, device=device, seed=seed).requires_grad_()


def operands(M, N, K, *, dtype, device, layout="nn"):
    a = operand(M, K, layout[0] == "t", dtype=dtype, device=device, seed=1)
    b = operand(K, N, layout[1] == "t", dtype=dtype, device=device, seed=2)
    return a, b


def precise(f, **options):
    """float32 without tf32, as torch multiplies unless told otherwise."""
    return lambda *args: f(*args, precision="ieee", **options)


@contextmanager
def tf32(switch="allow_tf32", on: Any = True):
    """One of torch's switches turned on. monkeypatch cannot restore them: it wants to delete."""
    former = getattr(torch.backends.cuda.matmul, switch)
    setattr(torch.backends.cuda.matmul, switch, on)
    try:
        yield
    finally:
        setattr(torch.backends.cuda.matmul, switch, former)


@pytest.mark.parametrize("algorithm", [None, *RUNGS])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, algorithm, device):
    dots(dtype, device)
    inputs = operands(*shape, dtype=dtype, device=device)
    check_against_float64(
        precise(matmul, algorithm=algorithm), matmul_reference, inputs, operator="matmul"
    )


@pytest.mark.parametrize("algorithm", RUNGS)
@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layouts(dtype, layout, algorithm, device):
    inputs = operands(40, 24, 32, dtype=dtype, device=device, layout=layout)
    check_against_float64(
        precise(matmul, algorithm=algorithm), matmul_reference, inputs, operator="matmul"
    )


def test_slices_and_gaps(device):
    # Wider rows, rows and columns with gaps, an address that is no multiple of 16 bytes.
    wide = randn(80, 96, dtype=torch.float32, device=device)
    other = randn(32, 24, dtype=torch.float32, device=device, seed=1)
    views = [wide[:20, :32], wide[:20, 1:33], wide[:40:2, :64:2], wide[:32, :20].T, wide[::4, 3:35]]
    for view in (*views, wide[:1, :32].expand(20, 32), wide[:20, :1].expand(20, 32)):
        for algorithm in RUNGS:
            a, b = view.detach().requires_grad_(), other.detach().requires_grad_()
            check_against_float64(
                precise(matmul, algorithm=algorithm), matmul_reference, [a, b], operator="matmul"
            )


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


@pytest.mark.parametrize("algorithm", RUNGS)
@pytest.mark.parametrize(
    ("input", "other"),
    [
        ((3, 20, 16), (3, 16, 24)),
        ((2, 3, 20, 16), (2, 3, 16, 24)),
        ((2, 1, 20, 16), (3, 16, 24)),  # both are broadcast
        ((3, 20, 16), (16, 24)),  # one taller matrix
        ((20, 16), (3, 16, 24)),
        ((2, 2, 2, 5, 8), (2, 1, 2, 8, 8)),  # a batch of three dimensions that no stride describes
        ((0, 5, 8), (0, 8, 8)),
    ],
    ids=str,
)
def test_batches(input, other, algorithm, device):
    a = randn(*input, dtype=torch.float32, device=device).requires_grad_()
    b = randn(*other, dtype=torch.float32, device=device, seed=1).requires_grad_()
    check_against_float64(
        precise(matmul, algorithm=algorithm), matmul_reference, [a, b], operator="matmul"
    )


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


@pytest.mark.parametrize(
    ("input", "other"), [((16,), (16, 5)), ((5, 16), (16,)), ((16,), (16,)), ((2, 5, 16), (16,))]
)
def test_vectors(input, other, device):
    a = randn(*input, dtype=torch.float32, device=device).requires_grad_()
    b = randn(*other, dtype=torch.float32, device=device, seed=1).requires_grad_()
    check_against_float64(precise(matmul), torch.matmul, [a, b], operator="matmul")


@pytest.mark.parametrize("algorithm", RUNGS)
@pytest.mark.parametrize("activation", [None, *launches.ACTIVATIONS])
def test_epilogue(activation, algorithm, device):
    a, b = operands(40, 32, 24, dtype=torch.float32, device=device)
    bias = randn(32, dtype=torch.float32, device=device, seed=3).requires_grad_()
    residual = randn(40, 32, dtype=torch.float32, device=device, seed=4).requires_grad_()

    def with_all(f, **more):
        return lambda a, b, bias, residual: f(
            a, b, bias=bias, activation=activation, residual=residual, scale=0.3, **more
        )

    check_against_float64(
        with_all(matmul, algorithm=algorithm, precision="ieee"), with_all(matmul_reference),
        [a, b, bias, residual], operator="matmul",
    )  # fmt: skip


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


@pytest.mark.parametrize("algorithm", RUNGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_accumulates_into_float32(dtype, algorithm, device):
    a, b = (x.detach() for x in operands(40, 32, 24, dtype=dtype, device=device, layout="tn"))
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


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    size=st.tuples(*(st.integers(0, 50),) * 3),
    pad=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    layout=st.sampled_from(["nn", "nt", "tn", "tt"]),
    algorithm=st.sampled_from([None, *RUNGS]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
)
def test_any_size_and_stride(size, pad, layout, algorithm, dtype):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    M, N, K = size
    a = randn(
        *((K, M + pad[0]) if layout[0] == "t" else (M, K + pad[0])), dtype=dtype, device=device
    )
    b = randn(
        *((N, K + pad[1]) if layout[1] == "t" else (K, N + pad[1])), dtype=dtype, device=device
    )
    a, b = a[:, pad[0] :], b[:, pad[1] :]
    a, b = a.T if layout[0] == "t" else a, b.T if layout[1] == "t" else b
    check_against_float64(
        precise(matmul, algorithm=algorithm), matmul_reference,
        [a.requires_grad_(), b.requires_grad_()], operator="matmul",
    )  # fmt: skip


def test_tf32_rounds_the_operands(device):
    a, b = (x.detach() for x in operands(20, 32, 40, dtype=torch.float32, device=device))
    with use_backend("triton"):
        y = matmul(a, b.T.contiguous().T, precision="tf32")
    rounded = [rounded_to_tf32(OP, x).double() for x in (a, b)]
    torch.testing.assert_close(y.double(), rounded[0] @ rounded[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("switch", "on"), [("allow_tf32", True), ("fp32_precision", "tf32")])
def test_follows_either_switch_of_tf32(switch, on):
    # torch refuses to read the older one where the newer says otherwise.
    assert launches._precision(torch.float32, None) == "ieee"
    with tf32(switch, on):
        assert launches._precision(torch.float32, None) == "tf32"
        assert launches._precision(torch.float32, "ieee") == "ieee"
        assert launches._precision(torch.float16, None) == "ieee"


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


def test_infinities_and_nans_stay_in_their_rows(device):
    a, b = (x.detach() for x in operands(33, 17, 20, dtype=torch.float32, device=device))
    a[5, 3], a[32, 19] = torch.inf, torch.nan
    for algorithm in RUNGS:
        with use_backend("triton"):
            ours = matmul(a, b, algorithm=algorithm, precision="ieee")
        torch.testing.assert_close(ours, a @ b, equal_nan=True)


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


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", RUNGS)
@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_matches_float64_at_real_sizes(shape, dtype, layout, algorithm):
    a, b = operands(*shape, dtype=dtype, device=torch.device("cuda"), layout=layout)
    with torch.no_grad(), use_backend("triton"):
        ours = matmul(a, b, algorithm=algorithm, precision="ieee")
        assert_as_accurate(ours, a @ b, a.double() @ b.double())


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("algorithm", RUNGS)
def test_tf32_is_as_accurate_as_torchs(algorithm, layout):
    a, b = operands(512, 384, 640, dtype=torch.float32, device=torch.device("cuda"), layout=layout)
    with torch.no_grad(), use_backend("triton"):
        exact = matmul(a, b, algorithm=algorithm)
        with tf32():
            rounded, torchs = matmul(a, b, algorithm=algorithm), a @ b
        assert_as_accurate(rounded, torchs, a.double() @ b.double())
    assert (exact - rounded).abs().max() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", RUNGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_epilogue_at_real_sizes(activation, dtype, algorithm):
    device = torch.device("cuda")
    a, b = operands(1000, 1544, 520, dtype=dtype, device=device)
    bias = randn(1544, dtype=dtype, device=device, seed=3).requires_grad_()
    residual = randn(1000, 1544, dtype=dtype, device=device, seed=4).requires_grad_()

    def with_all(f, **more):
        return lambda a, b, bias, residual: f(
            a, b, bias=bias, activation=activation, residual=residual, scale=0.3, **more
        )

    check_against_float64(
        with_all(matmul, algorithm=algorithm, precision="ieee"), with_all(matmul_reference),
        [a, b, bias, residual], operator="matmul",
    )  # fmt: skip


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
    a, b = operands(1536, 1032, 4096, dtype=torch.bfloat16, device=device, layout="tn")
    out = randn(1536, 1032, dtype=torch.float32, device=device, seed=3)
    before = out.double()
    with torch.no_grad():
        launch_matmul(OP, a, b, out, accumulate=True, algorithm=algorithm)
        same = before.float() + torch.mm(a, b, out_dtype=torch.float32)
        assert_as_accurate(out, same, before + a.double() @ b.double())


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", RUNGS)
def test_more_than_two_to_the_31_elements(algorithm):
    # Offsets that int32 cannot hold, in A and in the result: 4 GiB each.
    rows, width = 2**15 + 8, 2**16
    a = torch.randn(8, width, device="cuda", dtype=torch.bfloat16).repeat(rows // 8, 1)
    b = torch.randn(width, 16, device="cuda", dtype=torch.bfloat16)
    with use_backend("triton"):
        y = matmul(a, b, algorithm=algorithm)
        torch.testing.assert_close(y[-8:], y[:8])
        torch.testing.assert_close(y[:8], a[:8] @ b, rtol=2e-2, atol=2.0)
        del y
        y = matmul(a[:, :16], b[:16].T.repeat(1, width // 16), algorithm=algorithm)
    torch.testing.assert_close(y[-8:], y[:8])
    assert y[-1].abs().max() > 0


@pytest.mark.multigpu(2)
def test_tensors_on_another_than_the_current_device():
    inputs = operands(64, 32, 48, dtype=torch.float16, device=torch.device("cuda:1"))
    assert torch.cuda.current_device() == 0
    for algorithm in RUNGS:
        check_against_float64(
            precise(matmul, algorithm=algorithm), matmul_reference, inputs, operator="matmul"
        )


def test_bad_input(device):
    a, b = (x.detach() for x in operands(4, 6, 5, dtype=torch.float32, device=device))
    with pytest.raises(ValueError, match=r"\(4, 5\) and other \(4, 5\).*last dimension"):
        matmul(a, a)
    with pytest.raises(ValueError, match=r"need a dimension"):
        matmul(a, torch.ones((), device=device))
    with pytest.raises(ValueError, match="do not broadcast"):
        matmul(a.expand(2, 4, 5), b.expand(3, 5, 6))
    with pytest.raises(TypeError, match=r"torch.float32 and other torch.float16"):
        matmul(a, b.half())
    with pytest.raises(TypeError, match=r"input is torch.int64"):
        matmul(a.long(), b.long())
    for dtype in (torch.int8, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=rf"out_dtype is {dtype}; give float16"):
            matmul(a, b, out_dtype=dtype)
    with pytest.raises(ValueError, match=r"bias has shape \(4,\)"):
        matmul(a, b, bias=a[:, 0])
    with pytest.raises(ValueError, match=r"residual has shape \(3, 6\)"):
        matmul(a, b, residual=b[:3])
    anything: Any = matmul  # to a type checker, what follows is wrong
    with pytest.raises(TypeError, match=r"scale is a tensor; give a Python number"):
        anything(a, b, scale=torch.ones((), device=device))
    with pytest.raises(ValueError, match=r"activation is 'tanh'; choose from relu"):
        anything(a, b, activation="tanh")
    with pytest.raises(ValueError, match=r"algorithm is 'fast'; choose from naive"):
        anything(a, b, algorithm="fast")
    with pytest.raises(ValueError, match=r"precision is 'fp8'"):
        anything(a, b, precision="fp8")
    with pytest.raises(ValueError, match=r"input on .*, other on meta"):
        matmul(a, b.to("meta"))
