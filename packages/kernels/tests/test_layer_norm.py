"""layer_norm: the kernels against float64, torch's own function, and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright_kernels import LayerNorm, _norm, layer_norm, layer_norm_reference, use_backend
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

# Every number of warps, widths that are no power of two, both sides of what fits in registers.
REAL_SHAPES = (
    *((500, 64), (500, 768), (500, 1024), (300, 4096)),
    *((150, 8192), (150, 16384), (150, 16385), (150, 32768), (150, 32769), (3, 262144)),
)


def eps(width):
    # One element has no variance: 1 / sqrt(1e-5) would magnify the rounding of terms that cancel.
    return 1.0 if width == 1 else 1e-5


def function(x, weight, bias):
    return layer_norm(x, x.shape[-1:], weight, bias, eps(x.shape[-1]))


def reference(x, weight, bias):
    return layer_norm_reference(x, x.shape[-1:], weight, bias, eps(x.shape[-1]))


def make(shape, dtype, device, seed=0, mean=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) + mean
    weight, bias = torch.randn(2, shape[-1], generator=generator)
    return tuple(t.to(device, dtype, copy=True).requires_grad_() for t in (x, weight, bias))


@pytest.fixture
def small_tiles(monkeypatch):
    # Rows past 16 elements take the kernels for wide rows, in blocks of 16.
    monkeypatch.setattr(_norm, "MAX_TILE_FORWARD", 16)
    monkeypatch.setattr(_norm, "MAX_TILE_BACKWARD", 16)
    monkeypatch.setattr(_norm, "WIDE_BLOCK_N", 16)
    monkeypatch.setattr(_norm, "WIDE_TILE", _norm.WIDE_TILE | {"BLOCK_N": 16})


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_matches_float64(shape, dtype, device):
    check_against_float64(function, reference, make(shape, dtype, device), operator="layer_norm")


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_wide_rows(dtype, small_tiles, device):
    # 45 is no multiple of the block, and two programs share the rows of a column.
    check_against_float64(function, reference, make((7, 45), dtype, device), operator="layer_norm")


def test_reference_is_torchs(device):
    x, weight, bias = make((6, 40), torch.float64, device)
    expected = F.layer_norm(x, (40,), weight, bias)
    torch.testing.assert_close(reference(x, weight, bias), expected)
    torch.testing.assert_close(layer_norm(x, (40,)), F.layer_norm(x, (40,)))


@pytest.mark.parametrize("width", [9, 45])
@pytest.mark.parametrize("given", ["neither", "weight", "bias"])
def test_without_weight_or_bias(given, width, small_tiles, device):
    x, weight, bias = make((6, width), torch.float32, device)
    inputs = (x, weight if given == "weight" else None, bias if given == "bias" else None)
    check_against_float64(function, reference, inputs, operator="layer_norm")


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_gradient_of_some_inputs_only(frozen, device):
    inputs = make((9, 33), torch.float32, device)
    inputs[frozen].requires_grad_(False)
    check_against_float64(function, reference, inputs, operator="layer_norm")


def test_parameters_of_another_dtype(device):
    x, weight, bias = make((9, 33), torch.bfloat16, device)
    inputs = (x, *(p.detach().float().requires_grad_() for p in (weight, bias)))
    check_against_float64(function, reference, inputs, operator="layer_norm")


@pytest.mark.parametrize("width", [12, 44])
def test_a_large_mean_costs_no_digits(width, small_tiles, device):
    # The mean is good to 1e4 · 2⁻²⁴ = 6e-4; mean(x²) - mean(x)² would be off by 6 where it is 1.
    inputs = make((5, width), torch.float32, device, mean=1e4)
    with use_backend("triton"):
        y = function(*inputs)
    expected = reference(*(t.double() for t in inputs))
    torch.testing.assert_close(y.double(), expected, rtol=0.0, atol=5e-3)


def test_several_normalized_dimensions(device):
    x, weight, bias = make((3, 20), torch.float32, device)
    inputs = [t.detach().unflatten(-1, (4, 5)).requires_grad_() for t in (x, weight, bias)]
    check_against_float64(
        lambda x, w, b: layer_norm(x, (4, 5), w, b),
        lambda x, w, b: layer_norm_reference(x, (4, 5), w, b),
        inputs,
        operator="layer_norm",
    )


def test_layouts(device):
    _, weight, bias = make((6, 10), torch.float32, device)
    for name, x in layouts((6, 10), torch.float32, device):
        x.requires_grad_()
        try:
            check_against_float64(function, reference, (x, weight, bias), operator="layer_norm")
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 300),
    pad=st.integers(0, 5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
)
def test_any_shape_and_row_stride(rows, width, pad, dtype):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wide, _, _ = make((rows, width + pad), dtype, device)
    _, weight, bias = make((1, width), dtype, device)
    x = wide.detach()[:, pad:].requires_grad_()
    check_against_float64(function, reference, (x, weight, bias), operator="layer_norm")


@pytest.mark.parametrize("shape", [(3, 5), (1, 19)], ids=str)
def test_gradcheck(shape, small_tiles):
    inputs = make(shape, torch.float64, torch.device("cpu"))
    check_gradients(function, inputs, operator="layer_norm")


def test_compiles(device):
    check_compiles(function, make((5, 16), torch.float32, device), operator="layer_norm")


def test_opcheck(device):
    x, weight, bias = make((5, 16), torch.float32, device)
    ops = torch.ops.tilewright
    torch.library.opcheck(ops.layer_norm_forward.default, (x, weight, bias, 16, 1e-5))
    with torch.no_grad():
        y, mean, rstd = ops.layer_norm_forward(x, weight, bias, 16, 1e-5)
        for need_sums in (True, False):
            arguments = (y, x, weight, bias, mean, rstd, 16, need_sums)
            torch.library.opcheck(ops.layer_norm_backward.default, arguments)


@pytest.mark.parametrize("shape", [(70, 15), (7, 45)], ids=str)
def test_every_element_is_written_and_bits_repeat(shape, small_tiles, device):
    x, weight, bias = make(shape, torch.float32, device)
    dy = torch.rand_like(x)

    def run():
        with no_synchronization():
            y = function(x, weight, bias)
            return y, *torch.autograd.grad(y, (x, weight, bias), dy)

    with use_backend("triton"), poisoned_memory():
        assert all(t.isfinite().all() for t in run())
        check_deterministic(run)


def test_module_is_torchs(device):
    for bias in (True, False):
        ours = LayerNorm(24, bias=bias, device=device)
        torchs = torch.nn.LayerNorm(24, bias=bias, device=device)
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.uniform_()
        torchs.load_state_dict(ours.state_dict())
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).to(device)
        with use_backend("triton"):
            torch.testing.assert_close(ours(x), torchs(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_matches_float64_at_real_widths(shape, dtype):
    inputs = make(shape, dtype, torch.device("cuda"))
    check_against_float64(function, reference, inputs, operator="layer_norm")


def test_bad_input(device):
    x, weight, bias = make((5, 16), torch.float32, device)
    with pytest.raises(ValueError, match=r"\(5, 16\).*normalized_shape \(8,\)"):
        layer_norm(x, (8,))
    with pytest.raises(ValueError, match=r"bias has shape \(8,\)"):
        layer_norm(x, (16,), weight, bias[:8])
    with pytest.raises(TypeError, match=r"bias is torch.int64"):
        layer_norm(x, (16,), weight, bias.long())
    with pytest.raises(TypeError, match=r"weight is torch.float32 and bias torch.bfloat16"):
        layer_norm(x, (16,), weight, bias.bfloat16())
    with pytest.raises(ValueError, match=r"input on .*, bias on meta"):
        layer_norm(x, (16,), weight, bias.to("meta"))
