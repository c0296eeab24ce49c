"""relu, gelu, silu, relu_squared: kernels against float64, torch's functions, finite differences.

One pair of kernels serves all: what depends on the function is tested for each, what depends on
shapes, strides and launches for gelu.
"""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright_kernels import (
    GELU,
    ReLU,
    ReLUSquared,
    SiLU,
    backend_report,
    gelu,
    gelu_reference,
    relu,
    relu_reference,
    relu_squared,
    relu_squared_reference,
    silu,
    silu_reference,
    use_backend,
)
from tilewright_kernels._elementwise import BLOCK, ROW_BLOCK
from tilewright_kernels.activations import _GELU
from tilewright_kernels.testing import (
    FLOATING,
    ROW_SHAPES,
    check_against_float64,
    check_compiles,
    check_deterministic,
    check_gradients,
    layouts,
    no_synchronization,
    poisoned_memory,
)

FUNCTIONS = {
    "relu": (relu, relu_reference, F.relu),
    "gelu": (gelu, gelu_reference, F.gelu),
    "gelu_tanh": (
        partial(gelu, approximate="tanh"),
        partial(gelu_reference, approximate="tanh"),
        partial(F.gelu, approximate="tanh"),
    ),
    "silu": (silu, silu_reference, F.silu),
    "relu_squared": (relu_squared, relu_squared_reference, lambda x: F.relu(x).square()),
}
functions = pytest.mark.parametrize("name", FUNCTIONS)


def make(shape, dtype, device, seed=0):
    """Numbers of both signs, large enough that every function bends."""
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_()


def check(x, name="gelu"):
    function, reference, _ = FUNCTIONS[name]
    operator = name.removesuffix("_tanh")
    check_against_float64(function, reference, [x], operator=operator)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
@functions
def test_matches_float64(name, shape, dtype, device):
    check(make(shape, dtype, device), name)


# Two whole tiles and a little more, flat and in rows: tiles with a mask and tiles without.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_tiles(dtype, device):
    check(make((2 * BLOCK + 3,), dtype, device))
    rows = make((3, 2 * ROW_BLOCK + 3), dtype, device).detach()[:, 1:]
    check(rows.requires_grad_())


@pytest.mark.parametrize("shape", [(), (12,), (2, 0), (2, 1, 3, 4)], ids=str)
def test_any_number_of_dimensions(shape, device):
    check(make(shape, torch.float32, device))


@pytest.mark.smoke
@functions
def test_reference_is_torchs(name, device):
    function, _, torchs = FUNCTIONS[name]
    x = make((6, 40), torch.float64, device)
    torch.testing.assert_close(function(x), torchs(x))


def test_layouts(device):
    for name, x in layouts((6, 10), torch.float32, device):
        try:
            check(x.requires_grad_())
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_rows_are_read_in_place(device, monkeypatch):
    """No copy before a launch: the kernels get pointers into the caller's own memory."""
    launched = []
    monkeypatch.setattr(_GELU, "launch", lambda kernel, grid, *args, **meta: launched.append(args))
    wide = torch.randn(2, 3, 11, device=device, requires_grad=True)
    with use_backend("triton"):
        for x in (wide, wide[..., 3:]):
            y = gelu(x)
            torch.autograd.grad(y, wide, y.detach())
            forward, backward = launched
            assert forward[0].untyped_storage().data_ptr() == wide.untyped_storage().data_ptr()
            assert backward[1].untyped_storage().data_ptr() == wide.untyped_storage().data_ptr()
            launched.clear()


def test_output_gradient_layouts(device):
    # What sum(), transposes and slices hand back: expanded, transposed and strided gradients.
    x = make((8, 8), torch.float32, device)
    one, wide = torch.ones((), device=device), torch.rand(8, 19, device=device)
    for dy in (one.expand(8, 8), torch.rand(8, 8, device=device).T, wide[:, 3:11]):
        with use_backend("triton"):
            (ours,) = torch.autograd.grad(gelu(x), x, dy)
        (expected,) = torch.autograd.grad(gelu_reference(x), x, dy)
        torch.testing.assert_close(ours, expected)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 300),
    pad=st.integers(0, 5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
)
def test_any_shape_and_row_stride(rows, width, pad, dtype):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check(make((rows, width + pad), dtype, device).detach()[:, pad:].requires_grad_())


@functions
def test_extreme_values(name, device):
    # Where exponentials overflow and vanish, and what float64 makes of ±∞ and NaN.
    function, _, torchs = FUNCTIONS[name]
    x = torch.tensor([0.0, -0.0, 1e4, -1e4, 1e-30, torch.inf, -torch.inf, torch.nan])
    x = x.to(device).requires_grad_()
    with use_backend("triton"):
        ours = function(x)
        (gradient,) = torch.autograd.grad(ours.sum(), x)
    expected = torchs(x.double()).float()
    torch.testing.assert_close(ours, expected, equal_nan=True)
    # 1e-30 squared is 0 in float32, and 2·√0 is the slope that comes of it.
    (slope,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(gradient, slope, equal_nan=True)


def test_relu_squared_beyond_float16(device):
    # 300² is infinite and (2⁻¹³)² is 0 in float16; the slope is 2x all the same, and 0 · 2x is 0.
    x = torch.tensor([300, 1, 2**-13, -300], dtype=torch.float16, device=device).requires_grad_()
    with use_backend("triton"):
        y = relu_squared(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
        (nothing,) = torch.autograd.grad(y, x, torch.zeros_like(y))
    assert dx.tolist() == [600, 2, 2**-12, 0]
    assert nothing.tolist() == [0, 0, 0, 0]


def test_tail_keeps_its_digits(device):
    # gelu falls to -1e-17 before float32 ends; 1 + erf has no digit left at -6.
    x = torch.linspace(-9, -3, 61).to(device)
    with use_backend("triton"):
        ours = gelu(x).double()
    oracle = x.double() * 0.5 * torch.special.erfc(-x.double() / 2**0.5)
    assert ((ours - oracle) / oracle).abs().max() < 1e-3


@functions
def test_gradcheck(name):
    function, operator = FUNCTIONS[name][0], name.removesuffix("_tanh")
    for shape in ((3, 5), (6, 1)):
        x = make(shape, torch.float64, torch.device("cpu"))
        check_gradients(function, [x], operator=operator)


def test_second_derivative_is_refused(device):
    x = make((3, 5), torch.float32, device)
    with use_backend("triton"), pytest.raises(RuntimeError, match="gelu is differentiable once"):
        torch.autograd.grad(gelu(x).sum(), x, create_graph=True)


@functions
def test_compiles(name, device):
    function, operator = FUNCTIONS[name][0], name.removesuffix("_tanh")
    check_compiles(function, [make((5, 16), torch.float32, device)], operator=operator)


@functions
def test_opcheck(name, device):
    x = make((5, 16), torch.float32, device)
    forward = getattr(torch.ops.tilewright, f"{name}_forward").default
    backward = getattr(torch.ops.tilewright, f"{name}_backward").default
    torch.library.opcheck(forward, (x,))
    with torch.no_grad():
        torch.library.opcheck(backward, (torch.rand_like(x), torch.rand_like(x)))


def test_backend_of_one_function(device):
    # One factory makes them all; each is an operator of its own, gelu with both its forms.
    x = make((5, 16), torch.float32, device)
    with use_backend("triton", gelu="torch"):
        backend_report(reset=True)
        for function, _, _ in FUNCTIONS.values():
            function(x)
        report = backend_report()
    assert (report["gelu"].torch, report["gelu"].launches) == (2, 0)
    for name in ("relu", "silu", "relu_squared"):
        assert (report[name].triton, report[name].launches) == (1, 1)


@pytest.mark.parametrize(("name", "kept"), [("relu", 0), ("relu_squared", 0), ("silu", 1)])
def test_memory_between_two_projections(name, kept, device):
    # relu keeps its output, which the next projection keeps anyway, and lets go of its input.
    x = torch.randn(7, 8, device=device)
    weight = torch.randn(8, 8, device=device, requires_grad=True)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    with use_backend("triton"), hooks(lambda t: saved.append(t) or t, lambda t: t):
        h = F.linear(x, weight)
        F.linear(FUNCTIONS[name][0](h), weight)
    addresses = [t.untyped_storage().data_ptr() for t in saved]
    assert addresses.count(h.untyped_storage().data_ptr()) == kept


@pytest.mark.parametrize("shape", [(37, 65), (3, BLOCK + 1)], ids=str)
def test_every_element_is_written_and_bits_repeat(shape, device):
    x = make(shape, torch.float32, device)
    dy = torch.rand_like(x)

    def run():
        y = gelu(x)
        return y, *torch.autograd.grad(y, x, dy)

    with use_backend("triton"), poisoned_memory():
        assert all(t.isfinite().all() for t in run())
        check_deterministic(run)


@functions
def test_inputs_are_left_alone(name, device):
    x = make((7, 12), torch.float32, device)
    dy = torch.rand_like(x)
    before = [t.detach().clone() for t in (x, dy)]
    with use_backend("triton"):
        FUNCTIONS[name][0](x).backward(dy)
    for a, b in zip((x, dy), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@functions
def test_output_is_contiguous(name, backend, device):
    with use_backend(backend):
        assert FUNCTIONS[name][0](torch.randn(4, 6, device=device).T).is_contiguous()


def test_modules_are_torchs(device):
    x = make((5, 24), torch.float32, device)
    for ours, torchs in (
        (ReLU(), torch.nn.ReLU()),
        (GELU(), torch.nn.GELU()),
        (GELU("tanh"), torch.nn.GELU("tanh")),
        (SiLU(), torch.nn.SiLU()),
    ):
        assert isinstance(ours, type(torchs))
        assert repr(ours) == repr(torchs)
        with use_backend("triton"):
            torch.testing.assert_close(ours(x), torchs(x))
    with use_backend("triton"):
        torch.testing.assert_close(ReLUSquared()(x), F.relu(x).square())


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    x = make((7, 12), torch.float32, torch.device("cuda"))
    dy = torch.rand_like(x)
    with no_synchronization():
        gelu(x).backward(dy)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    # One flat row, and rows with a gap, whose last offsets int32 cannot hold.
    rows, width = 2**17 + 4, 2**14
    x = torch.randn(4, width, device="cuda", dtype=torch.bfloat16).repeat(rows // 4, 1)
    for part in (x, x[:, 8:]):
        part = part.detach().requires_grad_()
        y = gelu(part)
        torch.testing.assert_close(y[-4:], gelu_reference(part[:4]))
        (gradient,) = torch.autograd.grad(y, part, y.detach())
        torch.testing.assert_close(gradient[-4:], gradient[:4])
        assert gradient[-1].abs().max() > 0
        del y, gradient


@pytest.mark.multigpu(2)
def test_tensors_on_another_than_the_current_device():
    assert torch.cuda.current_device() == 0
    check(make((5, 16), torch.float32, torch.device("cuda:1")))


@functions
def test_bad_input(name, device):
    with pytest.raises(TypeError, match=r"input is torch.int64.*to\(torch.bfloat16\)"):
        FUNCTIONS[name][0](torch.ones(5, 16, dtype=torch.int64, device=device))


def test_bad_options(device):
    unknown: Any = "erf"
    with pytest.raises(ValueError, match=r"approximate is 'erf'; it must be 'none' or 'tanh'"):
        gelu(torch.ones(3, device=device), unknown)
    for module in (ReLU, SiLU):
        with pytest.raises(ValueError, match=r"inplace is True; .*leave it out"):
            module(inplace=True)
