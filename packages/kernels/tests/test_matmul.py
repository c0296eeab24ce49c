"""matmul: every rung against float64, over layouts, sizes and batches."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright_kernels import matmul, matmul_reference, use_backend
from tilewright_kernels._operator import Operator
from tilewright_kernels._tf32 import rounded_to_tf32
from tilewright_kernels.matmul import launches
from tilewright_kernels.testing import (
    FLOATING,
    assert_as_accurate,
    check_against_float64,
    randn,
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

pytestmark = pytest.mark.usefixtures("small_matmul_tiles")


def dots(dtype, device):
    """Skip what the interpreter computes wrong: products of bfloat16."""
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("needs a GPU: the interpreter multiplies the bits of bfloat16")


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


@pytest.mark.parametrize(
    ("input", "other"), [((16,), (16, 5)), ((5, 16), (16,)), ((16,), (16,)), ((2, 5, 16), (16,))]
)
def test_vectors(input, other, device):
    a = randn(*input, dtype=torch.float32, device=device).requires_grad_()
    b = randn(*other, dtype=torch.float32, device=device, seed=1).requires_grad_()
    check_against_float64(precise(matmul), torch.matmul, [a, b], operator="matmul")


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


def test_infinities_and_nans_stay_in_their_rows(device):
    a, b = (x.detach() for x in operands(33, 17, 20, dtype=torch.float32, device=device))
    a[5, 3], a[32, 19] = torch.inf, torch.nan
    for algorithm in RUNGS:
        with use_backend("triton"):
            ours = matmul(a, b, algorithm=algorithm, precision="ieee")
        torch.testing.assert_close(ours, a @ b, equal_nan=True)


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
