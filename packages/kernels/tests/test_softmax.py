"""softmax and log_softmax: one set of kernels, so one set of tests, run for each."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewright_kernels
from tilewright_kernels import LogSoftmax, Softmax, _softmax, use_backend
from tilewright_kernels._softmax import _as_lanes, _split
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

OPERATORS = ("softmax", "log_softmax")
pytestmark = pytest.mark.parametrize("name", OPERATORS)


def get(name, **options):
    """The operator and its reference, with these options."""
    function = getattr(tilewright_kernels, name)
    reference = getattr(tilewright_kernels, f"{name}_reference")
    return lambda x: function(x, **options), lambda x: reference(x, **options)


def check(name, x, **options):
    check_against_float64(*get(name, **options), [x.requires_grad_()], operator=name)


def make(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()


@pytest.fixture
def narrow_tiles(monkeypatch):
    """Lanes count as wide from 65 elements on, in blocks of 32: three walks over 65, one ragged."""
    monkeypatch.setattr(_softmax, "MAX_TILE", 64)
    walk_for = _softmax.walk_for.__wrapped__

    def small_blocks(*args, **flags):
        walk = walk_for(*args, **flags)
        return walk._replace(LANES=min(walk.LANES, 16), BLOCK_N=32) if walk.wide else walk

    monkeypatch.setattr(_softmax, "walk_for", small_blocks)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_matches_float64(name, shape, dtype, device):
    check(name, make(shape, dtype, device))


@pytest.mark.smoke
def test_reference_is_torchs(name, device):
    x = make((6, 40), torch.float64, device)
    torchs = getattr(torch, name)
    for dim in (0, -1):
        torch.testing.assert_close(getattr(tilewright_kernels, name)(x, dim), torchs(x, dim))


# Every place of dim, with lanes of one, few and more than a tile; (3, 5, 1): nothing follows dim.
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((4, 33), 0), ((2, 5, 70), 1), ((3, 9, 2), -2), ((3, 5, 1), 1), ((2, 3, 4, 5), 0), ((9,), 0)],
    ids=str,
)
def test_any_dimension(name, shape, dim, device):
    check(name, make(shape, torch.float32, device), dim=dim)


def test_scalar(name, device):
    check(name, torch.tensor(2.0, device=device))


# Rows; two and more lanes side by side; causal rows, which see nothing of their last blocks.
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 65), {}),
        ((2, 65, 2), {"dim": 1}),
        ((2, 4, 66), {"causal": True}),
        ((4, 98), {"causal": True}),
        ((68, 66), {"dim": 0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide(name, shape, options, dtype, device, narrow_tiles):
    check(name, make(shape, dtype, device), **options)


@pytest.mark.parametrize("options", [{}, {"dim": 0}, {"causal": True}], ids=str)
def test_pairs(name, options, device, monkeypatch):
    monkeypatch.setattr(_softmax, "PAIRS_FROM", 1)
    check(name, make((3, 13), torch.float32, device), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [4096, 16384, 32000, 32768, 32769, 262144])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_rows_of_models(name, width, dtype):
    check(name, make((5, width), dtype, torch.device("cuda")))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 300, 129), (2, 4096, 40), (5000, 64)], ids=str)
def test_columns_of_models(name, shape):
    check(name, make(shape, torch.bfloat16, torch.device("cuda")), dim=-2)


# Square, more queries than keys, fewer; batches whose tiles begin in the middle of a matrix; tiles
# of 32 whole lanes, which without the causal mask would need none.
@pytest.mark.parametrize(
    "shape", [(8, 8), (2, 11, 5), (3, 5, 11), (2, 2, 3, 40), (64, 64), (2, 32, 64)], ids=str
)
def test_causal(name, shape, device):
    check(name, make(shape, torch.float32, device), causal=True)


def test_causal_hides_what_is_later(name, device):
    function, _ = get(name, causal=True)
    x = make((5, 5), torch.float32, device).detach()
    later = torch.ones(5, 5, device=device, dtype=torch.bool).triu(1)
    x.masked_fill_(later, torch.nan).requires_grad_()
    with use_backend("triton"):
        y = function(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y).masked_fill(later, torch.nan))
    assert torch.all(y[later] == (0.0 if name == "softmax" else -torch.inf))
    assert y[~later].isfinite().all()
    assert dx.isfinite().all()
    assert not dx[later].any()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(6, 10), (40, 70)], ids=str)
def test_layouts(name, shape, dim, device):
    for layout, x in layouts(shape, torch.float32, device):
        try:
            check(name, x, dim=dim)
        except AssertionError as error:
            raise AssertionError(f"{layout}: {error}") from error


def test_views_are_read_in_place(name):
    x = torch.empty(4, 6, 8, 10)
    for view, dim in (
        (x, 3), (x, 1), (x[..., 2:8], 3), (x[:, :, 1:5], 3), (x[:, 1:3], 1), (x.transpose(2, 3), 3),
        (x[:, :, :, 3], 1), (x[..., ::2], 2), (x[:1].expand(4, 6, 8, 10), 3),
    ):  # fmt: skip
        lanes = _as_lanes(view, dim, _split(view, dim))
        assert lanes.data_ptr() == view.data_ptr(), f"{view.shape} {view.stride()} dim {dim}"
        assert lanes.shape[-1] == view.shape[dim]


def test_output_gradient_layouts(name, device):
    # What sum(), transposes and slices hand back: expanded, transposed and strided gradients.
    x = make((8, 8), torch.float32, device)
    function, reference = get(name)
    one, wide = torch.ones((), device=device), torch.rand(8, 19, device=device)
    for dy in (one.expand(8, 8), wide[:, :8].T, wide[:, 3:11]):
        with use_backend("triton"):
            (ours,) = torch.autograd.grad(function(x), x, dy)
        torch.testing.assert_close(ours, torch.autograd.grad(reference(x), x, dy)[0])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    dim=st.integers(-4, 3),
    pad=st.integers(0, 3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
)
def test_any_shape_and_stride(name, shape, dim, pad, dtype):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = make((*shape[:-1], shape[-1] + pad), dtype, device).detach()[..., pad:]
    check(name, x, dim=max(-len(shape), min(len(shape) - 1, dim)))


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_dtype_is_torchs(name, given_dtype, dtype, device):
    x = make((5, 33), given_dtype, device)
    dy = make((5, 33), dtype, device, seed=1).detach()
    with use_backend("triton"):
        ours = get(name, dtype=dtype)[0](x)
        (dx,) = torch.autograd.grad(ours, x, dy)
    expected = getattr(torch, name)(x, -1, dtype)
    torch.testing.assert_close(ours, expected)
    # Backward starts from y as rounded to dtype: an ulp of log y is a share of eʸ.
    tolerance = 2e-2 if 2 in (given_dtype.itemsize, dtype.itemsize) else 1e-6
    torch.testing.assert_close(
        dx, torch.autograd.grad(expected, x, dy)[0], rtol=tolerance, atol=tolerance
    )


def test_integers_with_a_dtype(name, device):
    x = torch.arange(6, device=device).view(2, 3)
    with use_backend("triton"):
        ours = get(name, dtype=torch.float32)[0](x)
    torch.testing.assert_close(ours, getattr(torch, name)(x, -1, torch.float32))


@pytest.mark.parametrize("kernel", ["steps", "pairs", "wide"])
def test_extreme_values(name, kernel, device, request, monkeypatch):
    if kernel == "pairs":
        monkeypatch.setattr(_softmax, "PAIRS_FROM", 1)
    wide = kernel == "wide"
    if wide:
        request.getfixturevalue("narrow_tiles")
    inf, nan = torch.inf, torch.nan
    columns = [[0.0] * 4, [3e38] * 4, [-3e38, 3e38, 0.0, 1.0], [1e-30, -1e-30, 0.0, 1.0]]
    columns += [[-inf] * 4, [-inf, 1.0, -inf, 2.0], [1.0, inf, 0.0, 2.0], [nan, 0.0, 1.0, 2.0]]
    # Two parts of nothing but -inf are joined before and after what counts.
    columns += [[-inf, -inf, 1.0, 2.0], [1.0, 2.0, -inf, -inf], [-inf, -inf, -inf, -3e38]]
    x = torch.tensor(columns, device=device)
    if wide:  # a first block of nothing, then the values
        x = torch.cat([torch.full((len(x), 96), -inf, device=device), x], dim=1)
    with use_backend("triton"):
        ours = get(name)[0](x)
    torch.testing.assert_close(ours, getattr(torch, name)(x, -1), equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"dim": 0}, {"causal": True}], ids=str)
def test_gradcheck(name, options):
    x = make((5, 4), torch.float64, torch.device("cpu"))
    function, _ = get(name, **options)
    if options.get("causal") and name == "log_softmax":  # -inf has no differences
        seen = torch.ones(5, 4, dtype=torch.bool).tril()
        check_gradients(lambda x: function(x)[seen], [x], operator=name)
    else:
        check_gradients(function, [x], operator=name)


def test_second_derivative_is_refused(name, device):
    x = make((3, 5), torch.float32, device)
    with use_backend("triton"), pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(get(name)[0](x).square().sum(), x, create_graph=True)


def test_compiles(name, device):
    x = make((5, 16), torch.float32, device)
    for options in ({"dim": 0}, {"dtype": torch.float64}):
        check_compiles(get(name, **options)[0], [x], operator=name)


def test_opcheck(name, device):
    x = make((5, 16), torch.float32, device)
    forward = getattr(torch.ops.tilewright, f"{name}_forward").default
    backward = getattr(torch.ops.tilewright, f"{name}_backward").default
    torch.library.opcheck(forward, (x, 1, torch.float32, True))
    with torch.no_grad():
        y = forward(x, 1, torch.float32, False)
        torch.library.opcheck(backward, (torch.ones_like(y), y, 1, torch.float32, False))


@pytest.mark.parametrize("shape", [(37, 33), (3, 65)], ids=str)
def test_every_element_is_written_and_bits_repeat(name, shape, device, narrow_tiles):
    x = make(shape, torch.float32, device)
    dy = torch.rand_like(x)

    def run():
        outputs = [get(name, dim=dim)[0](x) for dim in (0, 1)]
        return *outputs, *torch.autograd.grad(outputs, x, [dy, dy])

    with use_backend("triton"), poisoned_memory():
        assert all(t.isfinite().all() for t in run())
        check_deterministic(run)


def test_inputs_are_left_alone(name, device):
    x = make((7, 12), torch.float32, device)
    dy = torch.rand_like(x)
    before = x.detach().clone(), dy.clone()
    with use_backend("triton"):
        get(name)[0](x).backward(dy)
    assert torch.equal(x, before[0])
    assert torch.equal(dy, before[1])


@pytest.mark.gpu
def test_no_synchronization(name):
    x = make((64, 4096), torch.bfloat16, torch.device("cuda"))
    function, _ = get(name, causal=True)
    function(x).sum().backward()
    with no_synchronization():
        function(x).sum().backward()


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(name):
    # 2³¹ elements plus four rows: offsets that int32 cannot hold. 4 GiB in, 4 GiB out.
    rows, width = 2**17 + 4, 2**14
    x = torch.randn(4, width, device="cuda", dtype=torch.bfloat16).repeat(rows // 4, 1)
    y = get(name)[0](x)
    torch.testing.assert_close(y[-4:], y[:4])
    assert y[-1].abs().max() > 0
    del y
    # Along the other dimension the distance between two elements of a lane is what grows.
    y = get(name, dim=0)[0](x)
    expected = x[:4].double().softmax(0) / (rows // 4)
    ours = y[-4:].double()
    torch.testing.assert_close(
        ours if name == "softmax" else ours.exp(), expected, rtol=0.1, atol=0.0
    )


@pytest.mark.parametrize("dim", [0, -1])
def test_module_is_torchs(name, dim, device):
    ours, torchs = {
        "softmax": (Softmax, torch.nn.Softmax),
        "log_softmax": (LogSoftmax, torch.nn.LogSoftmax),
    }[name]
    x = make((5, 24), torch.float32, device).detach()
    with use_backend("triton"):
        torch.testing.assert_close(ours(dim)(x), torchs(dim)(x))
        torch.testing.assert_close(ours()(x), torchs(-1)(x))
        torch.testing.assert_close(ours(causal=True)(x), get(name, causal=True)[1](x))
    assert repr(ours(causal=True)) == f"{ours.__name__}(dim=-1, causal=True)"
    assert isinstance(ours(), torchs)


def test_bad_input(name, device):
    function = getattr(tilewright_kernels, name)
    x = make((5, 16), torch.float32, device)
    with pytest.raises(ValueError, match=r"dim is 2.*\(5, 16\); give -2 to 1"):
        function(x, 2)
    with pytest.raises(ValueError, match=r"causal masks keys.*dim is 0"):
        function(x, 0, causal=True)
    with pytest.raises(ValueError, match=r"causal masks keys.*\(16,\)"):
        function(x[0], causal=True)
    with pytest.raises(TypeError, match=r"input is torch.int64.*to\(torch.bfloat16\)"):
        function(torch.ones(5, 16, dtype=torch.int64, device=device))
    with pytest.raises(TypeError, match=r"dtype is torch.int32"):
        function(x, dtype=torch.int32)
