"""symmetric_matmul: both kernels against float64, symmetry to the bit, and finite differences."""

import importlib
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright_kernels import symmetric_matmul, symmetric_matmul_reference, use_backend
from tilewright_kernels._symmetric_matmul_kernels import integer_sqrt
from tilewright_kernels._tf32 import rounded_to_tf32
from tilewright_kernels._triton import INTERPRETED, tl, triton
from tilewright_kernels.testing import (
    FLOATING,
    assert_as_accurate,
    check_against_float64,
    check_compiles,
    check_deterministic,
    check_gradients,
    count_launches,
    floor,
    layouts,
    poisoned_memory,
)

# The package's attribute of this name is the function.
module = importlib.import_module("tilewright_kernels.symmetric_matmul")

# The interpreter multiplies the bits of bfloat16.
DOT_DTYPES = tuple(d for d in FLOATING if not (INTERPRETED and d == torch.bfloat16))
SHAPES = (
    (1, 1),  # the smallest there is
    (5, 7),  # odd in both: pointers
    (2, 3, 33, 20),  # two dimensions of batch, one row past two tiles
    (3, 8, 16),  # less than one tile of descriptors
    (2, 64, 40),  # an even number of rows of tiles; K is no multiple of its step
    (3, 72, 16),  # an odd number, the last tile half empty
    (0, 16, 16),  # no matrix
    (2, 0, 16),  # no rows
    (2, 16, 0),  # nothing to add up
)


def gram(x):
    return symmetric_matmul(x, alpha=1.5)


def gram_reference(x):
    return symmetric_matmul_reference(x, alpha=1.5)


# c is symmetric in the tests, as the operator wants it, because s + sᵀ is.
def with_c(x, s):
    return symmetric_matmul(x, alpha=-0.7, beta=2.1, c=s + s.mT)


def with_c_reference(x, s):
    return symmetric_matmul_reference(x, alpha=-0.7, beta=2.1, c=s + s.mT)


def make(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()
    s = torch.randn(*shape[:-1], shape[-2], generator=generator).to(device, dtype).requires_grad_()
    return x, s


@contextmanager
def tf32():
    former = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = former


def kernel_launched(x, c=None):
    """Which of the two kernels takes these inputs."""
    y = x.new_empty((*x.shape[:-1], x.shape[-2]))
    fits = module._fits_descriptors(x, c, y, "ieee")
    return "descriptors" if fits else "pointers"


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, small_triangle_tiles, device):
    inputs = make(shape, dtype, device)
    check_against_float64(gram, gram_reference, inputs[:1], operator="symmetric_matmul")
    check_against_float64(with_c, with_c_reference, inputs, operator="symmetric_matmul")


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
def test_full_size_tiles(dtype, device):
    # One row of tiles past two: wide tiles and single ones, in both kernels.
    inputs = make((264, 24), dtype, device)
    check_against_float64(with_c, with_c_reference, inputs, operator="symmetric_matmul")


@pytest.mark.smoke
def test_reference_is_the_formula():
    x, s = make((3, 6, 5), torch.float64, torch.device("cpu"))
    c = s + s.mT
    torch.testing.assert_close(
        symmetric_matmul(x, alpha=2.0, beta=0.5, c=c),
        torch.baddbmm(c, x, x.mT, alpha=2.0, beta=0.5),
    )
    torch.testing.assert_close(symmetric_matmul(x), x @ x.mT)


def test_newton_schulz_polynomial(small_triangle_tiles, device):
    x, _ = make((2, 40, 24), torch.float32, device)
    a = (x @ x.mT).detach()
    with use_backend("triton"):
        ours = symmetric_matmul(a, alpha=2.0315, beta=-4.775, c=a)
    torch.testing.assert_close(ours, -4.775 * a + 2.0315 * a @ a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", ["x", "c"])
def test_gradient_of_one_input_only(frozen, device):
    x, s = make((9, 33), torch.float32, device)
    (x if frozen == "x" else s).requires_grad_(False)
    check_against_float64(with_c, with_c_reference, (x, s), operator="symmetric_matmul")


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 72, 32), (1, 128, 32), (2, 41, 19)], ids=str)
def test_symmetric_to_the_bit(shape, dtype, small_triangle_tiles, device):
    # Upper halves, which c has and nobody reads, hold NaN.
    x, s = make(shape, dtype, device)
    c = s.detach().tril() + torch.full_like(s, torch.nan).triu(1)
    with use_backend("triton"), torch.no_grad():
        y = symmetric_matmul(x, alpha=0.3, beta=0.9, c=c)
    assert y.isfinite().all()
    assert torch.equal(y, y.mT)
    lower = s.detach().tril()
    whole = symmetric_matmul_reference(x, alpha=0.3, beta=0.9, c=lower + lower.tril(-1).mT)
    torch.testing.assert_close(y, whole, atol=2 * floor(dtype), rtol=2 * floor(dtype))


@pytest.mark.parametrize("size", [(40, 24), (41, 23)], ids=["descriptors", "pointers"])
def test_layouts(size, small_triangle_tiles, device):
    for name, x in layouts((3, *size), torch.float16, device):
        x.requires_grad_()
        try:
            check_against_float64(gram, gram_reference, [x], operator="symmetric_matmul")
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("size", [(40, 24), (41, 23)], ids=["descriptors", "pointers"])
def test_layouts_of_c(size, small_triangle_tiles, device):
    x, _ = make((3, *size), torch.float16, device)
    for name, s in layouts((3, size[0], size[0]), torch.float16, device):
        c = torch.empty_strided(s.shape, s.stride(), dtype=s.dtype, device=s.device)
        c = c.copy_(s + s.mT) if 0 not in s.stride() else (s[:1] + s[:1].mT).expand(s.shape)
        with use_backend("triton"), torch.no_grad():
            ours = symmetric_matmul(x, beta=1.0, c=c)
        expected = symmetric_matmul_reference(x.detach(), beta=1.0, c=c)
        torch.testing.assert_close(ours, expected, msg=lambda m, name=name: f"{name}: {m}")


def test_tall_matrices_are_read_in_place(small_triangle_tiles, device):
    # Xᵀ·X: M is adjacent in memory instead of K, and descriptors take it.
    x = make((2, 24, 40), torch.float16, device)[0].detach().mT.requires_grad_()
    assert kernel_launched(x) == "descriptors"
    check_against_float64(gram, gram_reference, [x], operator="symmetric_matmul")


def test_batch_dimensions_that_do_not_merge(small_triangle_tiles, device):
    x, s = make((2, 3, 24, 16), torch.float16, device)
    inputs = [t.detach().transpose(0, 1).requires_grad_() for t in (x, s)]
    check_against_float64(with_c, with_c_reference, inputs, operator="symmetric_matmul")
    with use_backend("triton"), count_launches() as launches, torch.no_grad():
        symmetric_matmul(inputs[0])
    assert launches["symmetric_matmul"] == 3


@pytest.mark.parametrize(
    ("shape", "dtype", "kernel"),
    [
        ((2, 40, 24), torch.float16, "descriptors"),
        ((2, 40, 23), torch.float16, "pointers"),  # rows of 46 bytes
        ((2, 41, 24), torch.float16, "pointers"),  # the result's rows, 82 bytes
        ((2, 40, 24), torch.float32, "pointers"),  # no tensor core multiplies it
        ((2, 40, 24), torch.float64, "pointers"),
    ],
    ids=str,
)
def test_descriptors_where_memory_is_aligned(shape, dtype, kernel):
    assert kernel_launched(torch.empty(shape, dtype=dtype)) == kernel


def test_descriptors_want_an_aligned_base():
    x = torch.empty(2 * 40 * 24 + 1, dtype=torch.float16)
    assert kernel_launched(x[:-1].view(2, 40, 24)) == "descriptors"
    assert kernel_launched(x[1:].view(2, 40, 24)) == "pointers"


def test_descriptors_want_something_to_describe():
    # Nothing to add up, in memory that would do otherwise.
    x = torch.empty(2, 8, 16, dtype=torch.float16).mT[..., :0]
    assert kernel_launched(x) == "pointers"


@pytest.mark.parametrize(
    ("batches", "m", "block", "wide"),
    [
        (16, 1536, 128, True),  # 9.5 blocks a multiprocessor, 4.4 wide tiles
        (1, 1536, 128, False),  # 78 blocks: one each beats 36 pairs
        (1, 768, 64, False),  # 21 blocks of 128 would leave most idle
    ],
)
def test_tile_that_is_done_first(batches, m, block, wide):
    tile = module._choose(module.TILES[2], batches, m, 132)
    assert tile[:2] == (block, wide)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3),
    m=st.integers(0, 70),
    k=st.integers(0, 40),
    step=st.sampled_from([1, 8]),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
)
def test_any_shape(batch, m, k, step, transposed, dtype):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    m, k = (size // step * step for size in (m, k))
    x, s = make((batch, m, k), dtype, device)
    if transposed:
        x = x.detach().mT.contiguous().mT.requires_grad_()
    check_against_float64(with_c, with_c_reference, (x, s), operator="symmetric_matmul")


@triton.jit
def _integer_sqrt_kernel(n_ptr, root_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.load(n_ptr + offsets, mask=offsets < size, other=0)
    tl.store(root_ptr + offsets, integer_sqrt(n), mask=offsets < size)


def test_integer_sqrt(device):
    # Around each square, where a rounded root goes wrong.
    roots = torch.cat([torch.arange(0, 3000), torch.arange(43000, 46339)])
    n = torch.cat([roots**2, (roots + 1) ** 2 - 1]).to(torch.int32).to(device)
    found = torch.empty_like(n)
    kernel: Any = _integer_sqrt_kernel
    kernel[(triton.cdiv(len(n), 1024),)](n, found, len(n), BLOCK=1024)
    found = found.long()
    assert (found**2 <= n).all()
    assert ((found + 1) ** 2 > n).all()


@pytest.mark.parametrize("shape", [(3, 5), (2, 17, 3), (1, 4)], ids=str)
def test_gradcheck(shape, small_triangle_tiles):
    # Fast: column by column, the second shape takes minutes in the interpreter.
    x, s = make(shape, torch.float64, torch.device("cpu"))
    check_gradients(gram, [x], operator="symmetric_matmul", fast_mode=True)
    check_gradients(with_c, (x, s), operator="symmetric_matmul", fast_mode=True)


def test_gradient_of_x_given_twice(small_triangle_tiles):
    # a·A + b·A², as in Newton–Schulz: A is x and c.
    _, s = make((1, 5, 5), torch.float64, torch.device("cpu"))
    check_gradients(
        lambda s: symmetric_matmul(s + s.mT, alpha=0.4, beta=-1.2, c=s + s.mT),
        [s],
        operator="symmetric_matmul",
    )


def test_batches_of_output_gradients_and_of_operands(device):
    x, s = make((5, 8), torch.float32, device)
    dys = torch.rand(3, 5, 5, device=device)
    with use_backend("triton"):
        ours = torch.autograd.grad(with_c(x, s), (x, s), dys, is_grads_batched=True)
        many = torch.func.vmap(symmetric_matmul)(dys)
    y = with_c_reference(x, s)
    for g, expected in zip(
        ours, torch.autograd.grad(y, (x, s), dys, is_grads_batched=True), strict=True
    ):
        torch.testing.assert_close(g, expected)
    torch.testing.assert_close(many, dys @ dys.mT)


def test_second_derivative_is_refused(device):
    x, _ = make((3, 5), torch.float32, device)
    with use_backend("triton"), pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(gram(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("shape", [(2, 16, 24), (2, 13, 7)], ids=["descriptors", "pointers"])
def test_compiles(shape, small_triangle_tiles, device):
    inputs = make(shape, torch.float16, device)
    check_compiles(with_c, inputs, operator="symmetric_matmul")


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast(backend, device):
    x, s = make((9, 12), torch.float32, device)
    c = (s + s.mT).detach().half()
    with torch.autocast(device.type, dtype=torch.float16), use_backend(backend):
        y = symmetric_matmul(x, beta=0.5, c=c)
    assert y.dtype == torch.float16
    half = x.detach().half().double()
    torch.testing.assert_close(y.double(), half @ half.mT + 0.5 * c, rtol=1e-3, atol=1e-3)


def test_backward_under_autocast_is_as_exact_as_without(device):
    x, _ = make((9, 12), torch.float32, device)
    dy = torch.rand(9, 9, device=device)
    grads = []
    for enabled in (False, True):
        with use_backend("triton"):
            y = symmetric_matmul(x)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
                grads += torch.autograd.grad(y, x, dy)
    assert torch.equal(*grads)


def test_opcheck(device):
    x, s = make((2, 5, 16), torch.float32, device)
    c = (s + s.mT).detach().requires_grad_()
    forward = torch.ops.tilewright.symmetric_matmul_forward.default
    torch.library.opcheck(forward, (x, None, 1.0, 0.0))
    torch.library.opcheck(forward, (x, c, 0.5, 2.0))


@pytest.mark.parametrize("shape", [(2, 72, 16), (2, 35, 15)], ids=["descriptors", "pointers"])
def test_every_element_is_written_and_bits_repeat(shape, small_triangle_tiles, device):
    x, s = make(shape, torch.float16, device)
    dy = torch.rand_like(s)

    def run():
        y = with_c(x, s)
        return y, *torch.autograd.grad(y, (x, s), dy)

    with use_backend("triton"), poisoned_memory():
        assert all(t.isfinite().all() for t in run())
        check_deterministic(run)


def test_inputs_are_left_alone(device):
    x, s = make((2, 9, 12), torch.float32, device)
    before = x.detach().clone(), s.detach().clone()
    dy = torch.rand_like(s)
    dy_before = dy.clone()
    with use_backend("triton"):
        symmetric_matmul(x, alpha=3.0, beta=2.0, c=s).backward(dy)
    for a, b in zip((x, s, dy), (*before, dy_before), strict=True):
        assert torch.equal(a, b)


def test_c_is_not_read_where_beta_is_zero(device):
    x, s = make((9, 12), torch.float32, device)
    c = torch.full_like(s, torch.nan).requires_grad_()
    with use_backend("triton"):
        y = symmetric_matmul(x, c=c)
    torch.testing.assert_close(y, x @ x.mT)
    assert torch.equal(torch.autograd.grad(y.sum(), c)[0], torch.zeros_like(c))


def test_only_x_is_kept_for_backward(device):
    x, s = make((9, 12), torch.float32, device)
    kept: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks

    def keep(t):
        kept.append(t)
        return t

    with use_backend("triton"), hooks(keep, lambda t: t):
        symmetric_matmul(x, beta=1.0, c=s)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


@pytest.mark.parametrize("x", [1.0, -2.0, torch.inf, -torch.inf, torch.nan, 3e38, 1e-42, 0.0])
def test_rounding_to_tf32_of_special_values(x, device):
    special = torch.tensor([[x]], device=device)
    # All ones: what the hardware writes for NaN. Rounded as a number it would be zero.
    if x != x:
        special = torch.tensor([[0x7FFFFFFF]], dtype=torch.int32, device=device).view(torch.float32)
    torch.testing.assert_close(
        rounded_to_tf32(module._OP, special),
        special,
        equal_nan=True,
        rtol=2**-11,
        atol=0x1000 * 2**-149,
    )


def test_rounding_to_tf32_is_to_nearest(device):
    # Seven bits more than tf32 keeps, in rows with gaps.
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).to(device)[:, 3:37]
    rounded = rounded_to_tf32(module._OP, x)
    mantissa, exponent = torch.frexp(x)
    nearest = torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)
    assert torch.equal(rounded, nearest)


def test_tf32_is_rounded_not_cut(device):
    x, _ = make((2, 24, 40), torch.float32, device)
    with use_backend("triton"), torch.no_grad(), tf32():
        y = symmetric_matmul(x)
        rounded = rounded_to_tf32(module._OP, x).double()
    torch.testing.assert_close(y.double(), rounded @ rounded.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "dtypes"),
    # Wide tiles for every multiprocessor or for few; single ones that fit beside; tails of all
    # kinds. A diagonal of 4096 squares, added up in order, is worse in float32 than torch's, which
    # adds up parts; and in float64, torch is its own oracle.
    [
        ((3, 1536, 512), FLOATING[1:]),
        ((2, 1000, 1000), FLOATING[2:]),
        ((1, 129, 4096), FLOATING[2:]),
        ((5, 640, 72), FLOATING[1:]),
        ((1, 2048, 64), FLOATING[1:]),
    ],
    ids=str,
)
def test_matches_float64_at_real_sizes(shape, dtypes):
    for dtype in dtypes:
        inputs = make(shape, dtype, torch.device("cuda"))
        check_against_float64(with_c, with_c_reference, inputs, operator="symmetric_matmul")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_long_sums(dtype):
    x, s = (t.detach() for t in make((2, 129, 4096), dtype, torch.device("cuda")))
    oracle = with_c_reference(x.double(), s.double())
    bound = 4096 * torch.finfo(dtype).eps * oracle.abs().max()
    assert (with_c(x, s) - oracle).abs().max() <= bound / 64  # √4096: errors of both signs


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 1536, 512), (2, 777, 333)], ids=str)
def test_tf32_is_as_accurate_as_torchs(shape):
    x, s = (t.detach() for t in make(shape, torch.float32, torch.device("cuda")))
    c = s + s.mT
    exact = symmetric_matmul(x, beta=1.0, c=c)
    with tf32():
        fast = symmetric_matmul(x, beta=1.0, c=c)
        torchs = torch.baddbmm(c, x, x.mT)
    assert_as_accurate(fast, torchs, torch.baddbmm(c.double(), x.double(), x.double().mT))
    assert torch.equal(fast, fast.mT)
    assert (exact - fast).abs().max() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("m", [2**15 + 8, 2**15 + 3], ids=["descriptors", "pointers"])
def test_more_than_two_to_the_31_elements(m):
    # Three results of just over 2³⁰ elements: the last one lies past what int32 counts.
    x = torch.randn(1, m, 16, device="cuda", dtype=torch.bfloat16).expand(3, m, 16)
    x = x.contiguous()
    y = symmetric_matmul(x)
    assert y.numel() > 2**31
    assert torch.equal(y[2], y[0])
    rows = torch.tensor([0, 1, m // 2, m - 1], device="cuda")
    torch.testing.assert_close(y[2][rows], x[2][rows] @ x[2].mT)
    torch.testing.assert_close(y[2][:, rows], x[2] @ x[2][rows].mT)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [4096, 4097], ids=["descriptors", "pointers"])
def test_more_than_two_to_the_31_elements_of_x(k):
    x = torch.randn(1, 16, k, device="cuda", dtype=torch.bfloat16).repeat(2**15 + 1, 1, 1)
    assert x.numel() > 2**31
    y = symmetric_matmul(x)
    torch.testing.assert_close(y[-1], x[-1] @ x[-1].mT)
    assert torch.equal(y, y[:1].expand_as(y))


@pytest.mark.multigpu(2)
def test_tensors_on_another_than_the_current_device():
    x, s = make((2, 40, 16), torch.float16, torch.device("cuda:1"))
    assert torch.cuda.current_device() == 0
    check_against_float64(with_c, with_c_reference, (x, s), operator="symmetric_matmul")


def test_bad_input(device):
    x, s = make((2, 5, 16), torch.float32, device)
    with pytest.raises(ValueError, match=r"x has shape \(16,\)"):
        symmetric_matmul(x[0, 0])
    with pytest.raises(TypeError, match=r"x is torch.int64.*to\(torch.bfloat16\)"):
        symmetric_matmul(torch.ones(5, 16, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match=r"beta is 2.0 and there is no c"):
        symmetric_matmul(x, beta=2.0)
    with pytest.raises(ValueError, match=r"c has shape \(5, 5\).*c must be \(2, 5, 5\)"):
        symmetric_matmul(x, beta=2.0, c=s[0])
    with pytest.raises(TypeError, match=r"x is torch.float32 and c torch.float64"):
        symmetric_matmul(x, beta=2.0, c=s.double())
    one: Any = torch.ones((), device=device)
    with pytest.raises(TypeError, match=r"alpha is a tensor"):
        symmetric_matmul(x, alpha=one)
    with pytest.raises(ValueError, match=r"x on .*, c on meta"):
        symmetric_matmul(x, beta=1.0, c=s.to("meta"))
