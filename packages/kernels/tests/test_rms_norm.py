"""rms_norm: the kernels against float64, torch's own function, and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright_kernels import RMSNorm, _norm, rms_norm, rms_norm_reference, use_backend
from tilewright_kernels.testing import (
    FLOATING,
    ROW_SHAPES,
    check_against_float64,
    check_compiles,
    check_deterministic,
    check_gradients,
    layouts,
    poisoned_memory,
)

EPS = 1e-6
# Every number of warps, widths that are no power of two, both sides of what fits in registers.
REAL_SHAPES = (
    *((500, 64), (500, 768), (500, 1024), (300, 4096)),
    *((150, 8192), (150, 16384), (150, 16385), (150, 32768), (150, 32769), (3, 262144)),
)


def function(x, weight):
    return rms_norm(x, x.shape[-1:], weight, EPS)


def reference(x, weight):
    return rms_norm_reference(x, x.shape[-1:], weight, EPS)


def make(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(shape[-1], generator=generator).to(device, dtype).requires_grad_()
    return x, weight


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
    check_against_float64(function, reference, make(shape, dtype, device), operator="rms_norm")


@pytest.mark.smoke
def test_reference_is_torchs(device):
    x, weight = make((6, 40), torch.float64, device)
    torch.testing.assert_close(reference(x, weight), F.rms_norm(x, (40,), weight, EPS))
    torch.testing.assert_close(rms_norm(x, (40,)), F.rms_norm(x, (40,)))


def test_without_weight(device):
    x, _ = make((9, 33), torch.float32, device)
    check_against_float64(
        lambda x: function(x, None), lambda x: reference(x, None), [x], operator="rms_norm"
    )


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_gradient_of_one_input_only(frozen, device):
    x, weight = make((9, 33), torch.float32, device)
    (x if frozen == "input" else weight).requires_grad_(False)
    check_against_float64(function, reference, (x, weight), operator="rms_norm")


def test_weight_of_another_dtype(device):
    # bfloat16 activations with float32 weights: what a model under autocast does.
    x, weight = make((9, 33), torch.bfloat16, device)
    weight = weight.detach().float().requires_grad_()
    check_against_float64(function, reference, (x, weight), operator="rms_norm")


def test_several_normalized_dimensions(device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, generator=generator).to(device).requires_grad_()
    weight = torch.randn(4, 5, generator=generator).to(device).requires_grad_()
    check_against_float64(
        lambda x, w: rms_norm(x, (4, 5), w, EPS),
        lambda x, w: rms_norm_reference(x, (4, 5), w, EPS),
        (x, weight),
        operator="rms_norm",
    )


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_wide_rows(dtype, small_tiles, device):
    # 45 is no multiple of the block, and two programs share the rows of a column.
    check_against_float64(function, reference, make((7, 45), dtype, device), operator="rms_norm")


@pytest.mark.parametrize("width", [9, 45])
def test_weight_offset(width, small_tiles, device):
    check_against_float64(
        lambda x, w: rms_norm(x, (width,), w, EPS, weight_offset=1.0),
        lambda x, w: rms_norm_reference(x, (width,), w, EPS, weight_offset=1.0),
        make((6, width), torch.float32, device),
        operator="rms_norm",
    )


def test_layouts(device):
    _, weight = make((6, 10), torch.float32, device)
    for name, x in layouts((6, 10), torch.float32, device):
        x.requires_grad_()
        try:
            check_against_float64(function, reference, (x, weight), operator="rms_norm")
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_output_gradient_layouts(device):
    # What sum(), transposes and slices hand back: expanded, transposed and strided gradients.
    x, weight = make((8, 8), torch.float32, device)
    one, wide = torch.ones((), device=device), torch.rand(8, 19, device=device)
    for dy in (one.expand(8, 8), wide[:, :8].T, wide[:, 3:11]):
        ours = torch.autograd.grad(function(x, weight), (x, weight), dy)
        with use_backend("torch"):
            expected = torch.autograd.grad(function(x, weight), (x, weight), dy)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 300),
    pad=st.integers(0, 5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
)
def test_any_shape_and_row_stride(rows, width, pad, dtype):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wide, _ = make((rows, width + pad), dtype, device)
    _, weight = make((1, width), dtype, device)
    x = wide.detach()[:, pad:].requires_grad_()
    check_against_float64(function, reference, (x, weight), operator="rms_norm")


def test_extreme_values(device):
    x = torch.tensor(
        [[0.0] * 4, [1e30] * 4, [1e-30] * 4, [1.0, torch.inf, 0.0, 2.0], [torch.nan] * 4],
        device=device,
    )
    with use_backend("triton"):
        ours = rms_norm(x, (4,), None, EPS)
    torch.testing.assert_close(ours, rms_norm_reference(x, (4,), None, EPS), equal_nan=True)


@pytest.mark.parametrize("shape", [(3, 5), (6, 1), (1, 19)], ids=str)
def test_gradcheck(shape, small_tiles):
    inputs = make(shape, torch.float64, torch.device("cpu"))
    check_gradients(function, inputs, operator="rms_norm")


def test_second_derivative_is_refused(device):
    x, weight = make((3, 5), torch.float32, device)
    with use_backend("triton"), pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(function(x, weight).sum(), x, create_graph=True)


def test_compiles(device):
    check_compiles(function, make((5, 16), torch.float32, device), operator="rms_norm")


def test_compiled_code_follows_the_backend(device):
    x, weight = make((5, 16), torch.float32, device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for backend in ("triton", "torch", "triton"):
        with use_backend(backend):
            torch.testing.assert_close(compiled(x, weight), reference(x, weight))


def test_opcheck(device):
    x, weight = make((5, 16), torch.float32, device)
    torch.library.opcheck(torch.ops.tilewright.rms_norm_forward.default, (x, weight, 16, EPS))
    with torch.no_grad():
        y, rstd = torch.ops.tilewright.rms_norm_forward(x, weight, 16, EPS)
        torch.library.opcheck(
            torch.ops.tilewright.rms_norm_backward.default, (y, x, weight, rstd, 16, True)
        )


@pytest.mark.parametrize("shape", [(70, 15), (7, 45)], ids=str)
def test_every_element_is_written_and_bits_repeat(shape, small_tiles, device):
    x, weight = make(shape, torch.float32, device)
    dy = torch.rand_like(x)

    def run():
        y = function(x, weight)
        return y, *torch.autograd.grad(y, (x, weight), dy)

    with use_backend("triton"), poisoned_memory():
        assert all(t.isfinite().all() for t in run())
        check_deterministic(run)


def test_inputs_are_left_alone(device):
    x, weight = make((7, 12), torch.float32, device)
    before = x.detach().clone(), weight.detach().clone()
    dy = torch.rand_like(x)
    dy_before = dy.clone()
    with use_backend("triton"):
        function(x, weight).backward(dy)
    for a, b in zip((x, weight, dy), (*before, dy_before), strict=True):
        assert torch.equal(a, b)


def test_module_is_torchs(device):
    ours, torchs = RMSNorm(24, eps=EPS, device=device), torch.nn.RMSNorm(24, eps=EPS, device=device)
    with torch.no_grad():
        ours.weight.uniform_()
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).to(device)
    with use_backend("triton"):
        torch.testing.assert_close(ours(x), torchs(x))


def test_module_with_an_offset_starts_as_the_identity_of_scale(device):
    norm = RMSNorm((4, 6), eps=EPS, device=device, weight_offset=1.0)
    assert torch.equal(norm.weight, torch.zeros(4, 6, device=device))
    x = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0)).to(device)
    with use_backend("triton"):
        torch.testing.assert_close(norm(x), F.rms_norm(x, (4, 6), None, EPS))
    assert "weight_offset=1.0" in repr(norm)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_matches_float64_at_real_widths(shape, dtype):
    inputs = make(shape, dtype, torch.device("cuda"))
    check_against_float64(function, reference, inputs, operator="rms_norm")


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    # 2³¹ elements plus a tile: offsets that int32 cannot hold. 4 GiB in, 4 GiB out.
    rows, width = 2**17 + 4, 2**14
    x = torch.randn(4, width, device="cuda", dtype=torch.bfloat16).repeat(rows // 4, 1)
    weight = torch.ones(width, device="cuda", dtype=torch.bfloat16)
    y = function(x, weight)
    torch.testing.assert_close(y[-4:], y[:4])
    assert y[-1].abs().max() > 0


@pytest.mark.multigpu(2)
def test_tensors_on_another_than_the_current_device():
    x, weight = make((5, 16), torch.float32, torch.device("cuda:1"))
    assert torch.cuda.current_device() == 0
    check_against_float64(function, reference, (x, weight), operator="rms_norm")


def test_bad_input(device):
    x, weight = make((5, 16), torch.float32, device)
    with pytest.raises(ValueError, match=r"\(5, 16\).*normalized_shape \(8,\)"):
        rms_norm(x, (8,))
    with pytest.raises(ValueError, match=r"weight has shape \(16,\)"):
        rms_norm(x, (5, 16), weight)
    with pytest.raises(TypeError, match=r"input is torch.int64.*to\(torch.bfloat16\)"):
        rms_norm(torch.ones(5, 16, dtype=torch.int64, device=device), (16,))
    with pytest.raises(ValueError, match=r"input on .*, weight on meta"):
        rms_norm(x, (16,), weight.to("meta"))
