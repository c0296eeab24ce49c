"""add_rms_norm: the kernels against float64, the two fused operators, and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright_kernels import (
    AddRMSNorm,
    _norm,
    add_rms_norm,
    add_rms_norm_reference,
    use_backend,
)
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

EPS = 1e-6
# Every number of warps, widths that are no power of two, both sides of what fits in registers.
REAL_SHAPES = (
    *((500, 64), (500, 768), (500, 1024), (300, 4096)),
    *((150, 8192), (150, 16384), (150, 16385), (150, 32768), (150, 32769), (3, 262144)),
)


def function(x, residual, weight):
    return add_rms_norm(x, residual, weight, EPS)


def reference(x, residual, weight):
    return add_rms_norm_reference(x, residual, weight, EPS)


def make(shape, dtype, device, seed=0, residual_dtype=None):
    generator = torch.Generator().manual_seed(seed)
    x, residual = torch.randn(2, *shape, generator=generator).to(device, dtype)
    weight = torch.randn(shape[-1], generator=generator).to(device, dtype)
    residual = residual.to(residual_dtype or dtype)
    return tuple(t.clone().requires_grad_() for t in (x, residual, weight))


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
    check_against_float64(function, reference, make(shape, dtype, device), operator="add_rms_norm")


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_wide_rows(dtype, small_tiles, device):
    # 45 is no multiple of the block, and two programs share the rows of a column.
    inputs = make((7, 45), dtype, device)
    check_against_float64(function, reference, inputs, operator="add_rms_norm")


@pytest.mark.parametrize("width", [9, 45])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_residual_in_float32(dtype, width, small_tiles, device):
    inputs = make((6, width), dtype, device, residual_dtype=torch.float32)
    check_against_float64(function, reference, inputs, operator="add_rms_norm")
    y, h = function(*inputs)
    assert (y.dtype, h.dtype) == (dtype, torch.float32)


def test_is_the_two_operators(device):
    x, residual, weight = make((6, 40), torch.bfloat16, device)
    with use_backend("triton"):
        y, h = function(x, residual, weight)
    assert torch.equal(h, x + residual) or device.type == "cpu"  # the interpreter truncates
    torch.testing.assert_close(h, x + residual)
    torch.testing.assert_close(y, F.rms_norm(h, (40,), weight, EPS), rtol=1e-2, atol=1e-2)


def test_without_weight(device):
    x, residual, _ = make((9, 33), torch.float32, device)
    check_against_float64(
        lambda x, r: function(x, r, None),
        lambda x, r: reference(x, r, None),
        (x, residual),
        operator="add_rms_norm",
    )


@pytest.mark.parametrize("width", [9, 45])
def test_weight_offset(width, small_tiles, device):
    check_against_float64(
        lambda x, r, w: add_rms_norm(x, r, w, EPS, weight_offset=1.0),
        lambda x, r, w: add_rms_norm_reference(x, r, w, EPS, weight_offset=1.0),
        make((6, width), torch.float32, device),
        operator="add_rms_norm",
    )


# A last block uses the normalized output alone, a branch that ends uses the sum alone.
@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_through_one_output(used, residual_dtype, device):
    inputs = make((9, 33), torch.bfloat16, device, residual_dtype=residual_dtype)
    check_against_float64(
        lambda *a: function(*a)[used],
        lambda *a: reference(*a)[used] + 0.0 * a[2].sum(),
        inputs if used == 0 else (*inputs[:2], inputs[2].detach()),
        operator="add_rms_norm",
    )


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_gradient_of_some_inputs_only(frozen, device):
    inputs = make((9, 33), torch.float32, device)
    inputs[frozen].requires_grad_(False)
    check_against_float64(function, reference, inputs, operator="add_rms_norm")


def test_gradients_of_leaves_are_their_own(device):
    # Both inputs have the same gradient; writing into one leaf's .grad must not change the other's.
    x, residual, weight = make((6, 10), torch.float32, device)
    with use_backend("triton"):
        y, h = function(x, residual, weight)
        (y + h).sum().backward()
    assert x.grad is not None
    assert residual.grad is not None
    before = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, before)


def test_layouts(device):
    x, _, weight = make((6, 10), torch.float32, device)
    for name, other in layouts((6, 10), torch.float32, device):
        other.requires_grad_()
        for inputs in ((x, other, weight), (other, x, weight)):
            try:
                check_against_float64(function, reference, inputs, operator="add_rms_norm")
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


def test_output_gradient_layouts(device):
    # What sum(), transposes and slices hand back: expanded, transposed and strided gradients.
    inputs = make((8, 8), torch.float32, device)
    one, wide = torch.ones((), device=device), torch.rand(8, 19, device=device)
    views = [one.expand(8, 8), wide[:, :8].T, wide[:, 3:11]]
    for dy, dh in zip(views, views[1:] + views[:1], strict=True):
        with use_backend("triton"):
            ours = torch.autograd.grad(function(*inputs), inputs, (dy, dh))
        expected = torch.autograd.grad(reference(*inputs), inputs, (dy, dh))
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    width=st.integers(2, 300),  # of one element, the gradient is the difference of equal terms
    pad=st.integers(0, 5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
)
def test_any_shape_and_row_stride(rows, width, pad, dtype):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wide, other, _ = make((rows, width + pad), dtype, device)
    _, _, weight = make((1, width), dtype, device)
    x, residual = wide.detach()[:, pad:], other.detach()[:, :width]
    inputs = x.requires_grad_(), residual.requires_grad_(), weight
    check_against_float64(function, reference, inputs, operator="add_rms_norm")


@pytest.mark.parametrize("shape", [(3, 5), (1, 19)], ids=str)
def test_gradcheck(shape, small_tiles):
    inputs = make(shape, torch.float64, torch.device("cpu"))
    check_gradients(function, inputs, operator="add_rms_norm")


def test_compiles(device):
    check_compiles(function, make((5, 16), torch.float32, device), operator="add_rms_norm")


def test_opcheck(device):
    x, residual, weight = make((5, 16), torch.float32, device)
    ops, arguments = torch.ops.tilewright, (x, residual, weight, 16, EPS, 0.0)
    torch.library.opcheck(ops.add_rms_norm_forward.default, arguments)
    with torch.no_grad():
        y, h, rstd = ops.add_rms_norm_forward(*arguments)
        for dh in (h, None):
            arguments = (y, dh, h, weight, rstd, 16, 0.0, True)
            torch.library.opcheck(ops.add_rms_norm_backward.default, arguments)


@pytest.mark.parametrize("shape", [(70, 15), (7, 45)], ids=str)
def test_every_element_is_written_and_bits_repeat(shape, small_tiles, device):
    inputs = make(shape, torch.float32, device)
    grads = torch.rand_like(inputs[0]), torch.rand_like(inputs[0])

    def run():
        with no_synchronization():
            outputs = function(*inputs)
            return *outputs, *torch.autograd.grad(outputs, inputs, grads)

    with use_backend("triton"), poisoned_memory():
        assert all(t.isfinite().all() for t in run())
        check_deterministic(run)


def test_inputs_are_left_alone(device):
    inputs = make((7, 12), torch.float32, device)
    before = [t.detach().clone() for t in inputs]
    with use_backend("triton"):
        outputs = function(*inputs)
        torch.autograd.grad(outputs, inputs, [torch.rand_like(o) for o in outputs])
    for a, b in zip(inputs, before, strict=True):
        assert torch.equal(a, b)


def test_module(device):
    norm = AddRMSNorm((2, 6), eps=EPS, device=device)
    bare = AddRMSNorm((2, 6), eps=EPS, elementwise_affine=False, device=device)
    x, residual = torch.randn(2, 5, 2, 6, generator=torch.Generator().manual_seed(0)).to(device)
    for module in (norm, bare):
        for backend in ("triton", "torch"):
            with use_backend(backend):
                y, h = module(x, residual)
            torch.testing.assert_close(h, x + residual)
            torch.testing.assert_close(y, F.rms_norm(h, (2, 6), None, EPS))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_matches_float64_at_real_widths(shape, dtype):
    inputs = make(shape, dtype, torch.device("cuda"))
    check_against_float64(function, reference, inputs, operator="add_rms_norm")


@pytest.mark.gpu
@pytest.mark.parametrize("width", [4096, 16384, 40000])
def test_residual_in_float32_at_real_widths(width):
    inputs = make((150, width), torch.bfloat16, torch.device("cuda"), residual_dtype=torch.float32)
    check_against_float64(function, reference, inputs, operator="add_rms_norm")


def test_bad_input(device):
    x, residual, weight = make((5, 16), torch.float32, device)
    with pytest.raises(ValueError, match=r"\(5, 16\).*normalized_shape \(8,\)"):
        add_rms_norm(x, residual, weight[:8])
    with pytest.raises(ValueError, match=r"\(5, 16\) and residual \(16,\).*expand_as"):
        add_rms_norm(x, residual[0], weight)
    with pytest.raises(
        TypeError, match=r"residual torch.bfloat16; residual must be torch.float32,"
    ):
        add_rms_norm(x, residual.bfloat16(), weight)
    with pytest.raises(TypeError, match=r"residual torch.float16; .* torch.bfloat16 or float32"):
        add_rms_norm(x.bfloat16(), residual.half(), weight)
    with pytest.raises(ValueError, match=r"input on .*, residual on meta"):
        add_rms_norm(x, residual.to("meta"), weight)
