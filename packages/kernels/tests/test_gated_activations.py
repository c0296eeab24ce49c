"""swiglu, geglu, reglu: the kernels against float64, torch's functions, and finite differences.

One pair of kernels serves all: what depends on the activation is tested for each, what depends on
shapes, strides and launches for swiglu.
"""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright_kernels import (
    GeGLU,
    ReGLU,
    SwiGLU,
    backend_report,
    geglu,
    geglu_reference,
    reglu,
    reglu_reference,
    swiglu,
    swiglu_reference,
    use_backend,
)
from tilewright_kernels._elementwise import BLOCK, ROW_BLOCK
from tilewright_kernels.gated_activations import _SWIGLU
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

UNITS = {
    "swiglu": (swiglu, swiglu_reference, F.silu),
    "geglu": (geglu, geglu_reference, F.gelu),
    "geglu_tanh": (
        partial(geglu, approximate="tanh"),
        partial(geglu_reference, approximate="tanh"),
        partial(F.gelu, approximate="tanh"),
    ),
    "reglu": (reglu, reglu_reference, F.relu),
}
units = pytest.mark.parametrize("unit", UNITS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(shape, dtype, device, count=2, seed=0):
    """Tensors of one shape; gates of both signs, large enough that the activation bends."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (3 * torch.randn(*shape, generator=generator)).to(device, dtype).requires_grad_()
        for _ in range(count)
    ]


def make_packed(shape, dtype, device, seed=0):
    return make((*shape[:-1], 2 * shape[-1]), dtype, device, count=1, seed=seed)


def check(inputs, unit="swiglu"):
    function, reference, _ = UNITS[unit]
    operator = unit.removesuffix("_tanh")
    check_against_float64(function, reference, inputs, operator=operator)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
@units
def test_matches_float64(unit, shape, dtype, device):
    check(make(shape, dtype, device), unit)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_both_halves_in_one_tensor(shape, dtype, device):
    check(make_packed(shape, dtype, device))


@units
def test_both_halves_in_one_tensor_of_each_unit(unit, device):
    check(make_packed((9, 33), torch.float32, device), unit)


# Two whole tiles and a little more, flat and in rows: tiles with a mask and tiles without.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_tiles(dtype, device):
    check(make((2 * BLOCK + 3,), dtype, device))
    check(make_packed((3, 2 * ROW_BLOCK + 1), dtype, device))


@pytest.mark.smoke
@units
def test_reference_is_torchs(unit, device):
    function, _, activation = UNITS[unit]
    gate, up = make((6, 40), torch.float64, device)
    torch.testing.assert_close(function(gate, up), activation(gate) * up)
    torch.testing.assert_close(function(torch.cat((gate, up), -1)), activation(gate) * up)


@pytest.mark.parametrize("shape", [(12,), (2, 0)], ids=str)
def test_one_row_and_no_columns(shape, device):
    check(make(shape, torch.float32, device))
    check(make_packed(shape, torch.float32, device))


def test_one_tensor_is_its_chunks(device):
    (packed,) = make_packed((2, 5, 33), torch.float32, device)
    dy = torch.rand(2, 5, 33, device=device)
    with use_backend("triton"):
        joint, apart = swiglu(packed), swiglu(*packed.chunk(2, -1))
        grads = [torch.autograd.grad(y, packed, dy)[0] for y in (joint, apart)]
    assert torch.equal(joint, apart)
    assert torch.equal(*grads)


@pytest.mark.parametrize("frozen", ["gate", "up"])
def test_gradient_of_one_input_only(frozen, device):
    gate, up = make((9, 33), torch.float32, device)
    (gate if frozen == "gate" else up).requires_grad_(False)
    check((gate, up))


def test_gate_and_up_are_one_tensor(device):
    (x,) = make((5, 9), torch.float32, device, count=1)
    check_against_float64(
        lambda x: swiglu(x, x), lambda x: swiglu_reference(x, x), [x], operator="swiglu"
    )


def test_layouts(device):
    pairs = zip(
        layouts((6, 10), torch.float32, device),
        reversed(list(layouts((6, 10), torch.float32, device, seed=1))),
        strict=True,
    )
    for (name, gate), (other, up) in pairs:
        for inputs in ((gate.requires_grad_(), up.requires_grad_()), (gate,)):
            try:
                check(inputs)
            except AssertionError as error:
                raise AssertionError(f"{name}, {other}: {error}") from error


def test_rows_are_read_and_written_in_place(device, monkeypatch):
    """No copy before a launch: the kernels get pointers into the caller's own memory."""
    launched = []
    monkeypatch.setattr(
        _SWIGLU, "launch", lambda kernel, grid, *args, **meta: launched.append(args)
    )

    def storages():
        return [a.untyped_storage().data_ptr() for a in launched.pop() if torch.is_tensor(a)]

    (packed,) = make_packed((2, 3, 8), torch.float32, device)
    (wide,) = make((2, 3, 11), torch.float32, device, count=1)
    owner = packed.untyped_storage().data_ptr()
    with use_backend("triton"):
        y = swiglu(packed)
        assert storages() == [owner, owner, y.untyped_storage().data_ptr()]
        (dpacked,) = torch.autograd.grad(y, packed, y.detach())
        gradient = dpacked.untyped_storage().data_ptr()
        assert storages()[1:] == [owner, owner, gradient, gradient]
        swiglu(packed.chunk(2, -1)[0], wide[..., 3:])
        assert storages()[:2] == [owner, wide.untyped_storage().data_ptr()]


def test_output_gradient_layouts(device):
    # What sum(), transposes and concatenations hand back.
    inputs = make((8, 8), torch.float32, device)
    one, wide = torch.ones((), device=device), torch.rand(8, 19, device=device)
    for dy in (one.expand(8, 8), torch.rand(8, 8, device=device).T, wide[:, 3:11]):
        with use_backend("triton"):
            ours = torch.autograd.grad(swiglu(*inputs), inputs, dy)
        expected = torch.autograd.grad(swiglu_reference(*inputs), inputs, dy)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 300),
    pads=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    packed=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
)
def test_any_shape_and_row_stride(rows, width, pads, packed, dtype):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    widths = [2 * width] if packed else [width, width]
    check(
        [
            make((rows, w + pad), dtype, device, count=1, seed=i)[0]
            .detach()[:, pad:]
            .requires_grad_()
            for i, (w, pad) in enumerate(zip(widths, pads, strict=False))
        ]
    )


@units
def test_extreme_values(unit, device):
    # Where exponentials overflow and vanish, and what float64 makes of ±∞ and NaN.
    function, _, activation = UNITS[unit]
    gate = torch.tensor([0.0, -0.0, 1e4, -1e4, 1e-30, torch.inf, -torch.inf, torch.nan])
    gate = gate.to(device).requires_grad_()
    up = torch.full_like(gate, 2.0).requires_grad_()
    with use_backend("triton"):
        ours = function(gate, up)
        grads = torch.autograd.grad(ours.sum(), (gate, up))
    expected = (activation(gate.double()) * up).float()
    torch.testing.assert_close(ours, expected, equal_nan=True)
    for a, b in zip(grads, torch.autograd.grad(expected.sum(), (gate, up)), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@units
def test_gradcheck(unit):
    function, operator, cpu = UNITS[unit][0], unit.removesuffix("_tanh"), torch.device("cpu")
    for shape in ((3, 5), (6, 1)):
        check_gradients(function, make(shape, torch.float64, cpu), operator=operator)
        check_gradients(function, make_packed(shape, torch.float64, cpu), operator=operator)


def test_second_derivative_is_refused(device):
    gate, up = make((3, 5), torch.float32, device)
    with use_backend("triton"), pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(swiglu(gate, up).sum(), gate, create_graph=True)


@units
def test_compiles(unit, device):
    function, operator = UNITS[unit][0], unit.removesuffix("_tanh")
    check_compiles(function, make((5, 16), torch.float32, device), operator=operator)
    check_compiles(function, make_packed((5, 16), torch.float32, device), operator=operator)


def test_compiled_code_follows_the_backend(device):
    (packed,) = make_packed((5, 16), torch.float32, device)
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    for backend in ("triton", "torch", "triton"):
        with use_backend(backend):
            torch.testing.assert_close(compiled(packed), swiglu_reference(packed))


@units
def test_opcheck(unit, device):
    forward = getattr(torch.ops.tilewright, f"{unit}_forward").default
    backward = getattr(torch.ops.tilewright, f"{unit}_backward").default
    gate, up = make((5, 16), torch.float32, device)
    dy = torch.rand(5, 16, device=device)
    for inputs in ((gate, up), (*make_packed((5, 16), torch.float32, device), None)):
        torch.library.opcheck(forward, inputs)
        with torch.no_grad():
            torch.library.opcheck(backward, (dy, *inputs))


def test_backend_of_one_unit(device):
    # One factory makes them all; each is an operator of its own.
    gate, up = make((5, 16), torch.float32, device)
    with use_backend("triton", geglu="torch"):
        backend_report(reset=True)
        for function, _, _ in UNITS.values():
            function(gate, up)
        report = backend_report()
    assert (report["geglu"].torch, report["geglu"].launches) == (2, 0)
    assert (report["swiglu"].triton, report["swiglu"].launches) == (1, 1)
    assert (report["reglu"].triton, report["reglu"].launches) == (1, 1)


@pytest.mark.parametrize("shape", [(37, 65), (3, ROW_BLOCK + 1)], ids=str)
def test_every_element_is_written_and_bits_repeat(shape, device):
    pair, packed = make(shape, torch.float32, device), make_packed(shape, torch.float32, device)
    dy = torch.rand(shape, device=device)

    def run():
        outs = swiglu(*pair), swiglu(*packed)
        return (*outs, *torch.autograd.grad(outs, (*pair, *packed), (dy, dy)))

    with use_backend("triton"), poisoned_memory():
        assert all(t.isfinite().all() for t in run())
        check_deterministic(run)


def test_inputs_are_left_alone(device):
    pair, packed = make((7, 12), torch.float32, device), make_packed((7, 12), torch.float32, device)
    dy = torch.rand(7, 12, device=device)
    tensors = (*pair, *packed, dy)
    before = [t.detach().clone() for t in tensors]
    with use_backend("triton"):
        swiglu(*pair).backward(dy)
        swiglu(*packed).backward(dy)
    for a, b in zip(tensors, before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_output_is_contiguous(backend, device):
    gate = torch.randn(4, 6, device=device).T
    with use_backend(backend):
        assert swiglu(gate, gate).is_contiguous()


def test_modules(device):
    (packed,) = make_packed((5, 24), torch.float32, device)
    gate, up = packed.chunk(2, -1)
    modules = SwiGLU(), GeGLU(), GeGLU("tanh"), ReGLU()
    with use_backend("triton"):
        for module, (_, _, activation) in zip(modules, UNITS.values(), strict=True):
            torch.testing.assert_close(module(packed), activation(gate) * up)
            torch.testing.assert_close(module(gate, up), activation(gate) * up)
    assert repr(GeGLU("tanh")) == "GeGLU(approximate='tanh')"


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    (packed,) = make_packed((7, 12), torch.float32, torch.device("cuda"))
    dy = torch.rand(7, 12, device="cuda")
    with no_synchronization():
        swiglu(packed).backward(dy)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    # One tensor of 2³² elements and some: gate, up and output offsets that int32 cannot hold.
    rows, width = 2**17 + 4, 2**14
    packed = torch.randn(4, 2 * width, device="cuda", dtype=torch.bfloat16).repeat(rows // 4, 1)
    packed.requires_grad_()
    y = swiglu(packed)
    torch.testing.assert_close(y[-4:], swiglu_reference(packed[:4]))
    (gradient,) = torch.autograd.grad(y, packed, y.detach())
    torch.testing.assert_close(gradient[-4:], gradient[:4])
    assert gradient[-1].abs().max() > 0


@pytest.mark.multigpu(2)
def test_tensors_on_another_than_the_current_device():
    assert torch.cuda.current_device() == 0
    check(make((5, 16), torch.float32, torch.device("cuda:1")))


def test_bad_input(device):
    unknown: Any = "erf"
    gate, up = make((5, 16), torch.float32, device)
    with pytest.raises(ValueError, match=r"\(5, 16\) and up \(5, 8\)"):
        swiglu(gate, up[:, :8])
    with pytest.raises(ValueError, match=r"\(5, 16\) and up \(1, 16\).*expand_as"):
        swiglu(gate, up[:1])
    with pytest.raises(ValueError, match=r"\(5, 15\); without up .* must be even"):
        swiglu(gate[:, 1:])
    with pytest.raises(ValueError, match="gate is a scalar"):
        swiglu(gate[0, 0])
    with pytest.raises(TypeError, match=r"gate is torch.int64.*to\(torch.bfloat16\)"):
        swiglu(torch.ones(5, 16, dtype=torch.int64, device=device))
    with pytest.raises(TypeError, match=r"gate is torch.float32 and up torch.float16"):
        swiglu(gate, up.half())
    with pytest.raises(ValueError, match=r"gate on .*, up on meta"):
        swiglu(gate, up.to("meta"))
    with pytest.raises(ValueError, match=r"approximate is 'erf'; it must be 'none' or 'tanh'"):
        geglu(gate, up, unknown)
    with pytest.raises(ValueError, match="approximate is 'erf'"):
        GeGLU(unknown)
