"""gated_mlp: both kernels against float64, finite differences, and what is kept between them."""

from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tilewright_kernels import (
    GatedMLP,
    gated_mlp,
    gated_mlp_reference,
    use_backend,
)
from tilewright_kernels._tf32 import rounded_to_tf32
from tilewright_kernels.gated_mlp import _gate_up, _gate_up_grad, _launch, functional
from tilewright_kernels.testing import (
    FLOATING,
    check_against_float64,
    check_compiles,
    check_deterministic,
    check_gradients,
    layouts,
    poisoned_memory,
)

ACTIVATIONS = ("silu", "gelu", "relu")
SHAPES = (
    ((1,), 1, 1),  # the smallest there is
    ((), 5, 3),  # a vector
    ((37,), 19, 23),  # odd in all: pointers
    ((2, 9), 64, 16),  # three dimensions, whole tiles
    ((3,), 8, 136),  # what descriptors can take in 16 bits: several tiles of I, the last partial
    ((0,), 4, 16),  # no tokens
    ((3,), 4, 0),  # nothing between
)
"""Leading dimensions, hidden, I."""

REAL_SHAPES = (((2048,), 1536, 4096), ((4, 500), 1536, 1000), ((1000,), 513, 1023))


def make(rows, hidden, width, dtype=torch.float32, device="cpu", seed=0):
    """x, w_gate_up, w_down, of a size that keeps every product near 1."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        values = torch.randn(*shape, generator=generator) / max(shape[-1], 1) ** 0.5
        return values.to(device, dtype).requires_grad_()

    x = torch.randn(*rows, hidden, generator=generator).to(device, dtype).requires_grad_()
    return x, leaf(2 * width, hidden), leaf(hidden, width)


def check(x, w_gate_up, w_down, activation: Any = "silu", **options):
    check_against_float64(
        partial(gated_mlp, activation=activation, **options),
        partial(gated_mlp_reference, activation=activation),
        (x, w_gate_up, w_down),
        operator="gated_mlp",
    )


@pytest.mark.parametrize(("rows", "hidden", "width"), SHAPES, ids=str)
def test_matches_float64(rows, hidden, width, dot_dtype, device):
    check(*make(rows, hidden, width, dot_dtype, device))


@pytest.mark.smoke
def test_reference_is_the_formula(device):
    x, w_gate_up, w_down = make((6,), 10, 8, torch.float64, device)
    for activation in ACTIVATIONS:
        f = getattr(F, activation)
        expected = (f(x @ w_gate_up[:8].T) * (x @ w_gate_up[8:].T)) @ w_down.T
        with use_backend("torch"):
            torch.testing.assert_close(gated_mlp(x, w_gate_up, w_down, activation), expected)


# 8 multiples for descriptors in float16, and odd ones for pointers.
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "sizes"), [(torch.float16, (16, 24)), (torch.float32, (7, 9))])
def test_activations(dtype, sizes, activation, recompute, device):
    check(*make((5,), *sizes, dtype=dtype, device=device), activation, recompute=recompute)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("needed", [*product([False, True], repeat=3)], ids=str)
def test_gradients_of_some_inputs_only(needed, recompute, device):
    for sizes in ((16, 24), (7, 9)):
        tensors = make((5,), *sizes, dtype=torch.float16, device=device)
        for tensor, need in zip(tensors, needed, strict=True):
            tensor.requires_grad_(need)
        check(*tensors, recompute=recompute)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layouts_of_every_operand(dtype, device):
    tensors = make((8,), 16, 24, dtype, device)
    for position, tensor in enumerate(tensors):
        for name, strided in layouts(tensor.shape, dtype, device):
            given = list(tensors)
            given[position] = strided.mul_(0.25) if name != "expanded rows" else strided * 0.25
            given[position].requires_grad_()
            try:
                check(*given)
            except AssertionError as error:
                raise AssertionError(f"operand {position}, {name}: {error}") from error


def test_layouts_in_three_dimensions(device):
    _, *weights = make((1,), 16, 8, device=device)
    for name, x in layouts((3, 4, 16), torch.float32, device):
        try:
            check(x.requires_grad_(), *weights)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_output_gradient_layouts(device):
    tensors = make((8,), 8, 16, device=device)
    one, wide = torch.ones((), device=device), torch.rand(8, 19, device=device)
    for dy in (one.expand(8, 8), wide[:, :8].T, wide[:, 3:11]):
        with use_backend("triton"):
            ours = torch.autograd.grad(gated_mlp(*tensors), tensors, dy)
        expected = torch.autograd.grad(gated_mlp_reference(*tensors), tensors, dy)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("shape", [((2,), 3, 5), ((2, 2), 1, 2), ((), 4, 3)], ids=str)
def test_gradcheck(shape, activation):
    check_gradients(
        partial(gated_mlp, activation=activation),
        make(*shape, dtype=torch.float64),
        operator="gated_mlp",
    )


@pytest.mark.parametrize("sizes", [(16, 24), (7, 9)], ids=str)
def test_recomputed_bits_are_the_kept_ones(sizes, device):
    tensors = make((5,), *sizes, dtype=torch.float16, device=device)
    dy = torch.rand(5, sizes[0], device=device, dtype=torch.float16)

    def run(recompute):
        y = gated_mlp(*tensors, recompute=recompute)
        return y, *torch.autograd.grad(y, tensors, dy)

    with use_backend("triton"):
        for a, b in zip(run(False), run(True), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("recompute", [False, True])
def test_two_backwards_of_one_graph_agree(recompute, device):
    # Only the last one may write over what is kept.
    tensors = make((5,), 16, 24, torch.float16, device)
    with use_backend("triton"):
        total = gated_mlp(*tensors, recompute=recompute).sum()
        first = torch.autograd.grad(total, tensors, retain_graph=True)
        for a, b in zip(first, torch.autograd.grad(total, tensors), strict=True):
            assert torch.equal(a, b)


def test_many_output_gradients_at_once(device):
    x, *weights = make((5,), 16, 24, torch.float16, device)
    dys = torch.rand(3, 5, 16, device=device, dtype=torch.float16)
    with use_backend("triton"):
        (together,) = torch.autograd.grad(gated_mlp(x, *weights), x, dys, is_grads_batched=True)
        for dx, dy in zip(together, dys, strict=True):
            assert torch.equal(dx, *torch.autograd.grad(gated_mlp(x, *weights), x, dy))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_output_gradients(device):
    # Without retain_graph: each of them needs what is kept.
    x, *weights = make((5,), 16, 24, torch.float16, device)
    dys = torch.rand(3, 5, 16, device=device, dtype=torch.float16)
    with use_backend("triton"):
        y = gated_mlp(x, *weights)
        together = torch.func.vmap(lambda dy: torch.autograd.grad(y, x, dy)[0])(dys)
        for dx, dy in zip(together, dys, strict=True):
            assert torch.equal(dx, *torch.autograd.grad(gated_mlp(x, *weights), x, dy))


@pytest.mark.parametrize("rows", [(5,), (2, 3), ()], ids=str)
def test_result_can_be_changed_in_place(rows, device):
    # As a residual is added: torch forbids it to views of what an operator made.
    tensors = make(rows, 16, 24, torch.float16, device)
    with use_backend("triton"):
        y = gated_mlp(*tensors)
        y += tensors[0].detach()
        ours = torch.autograd.grad(y, tensors, torch.ones_like(y))
        y = gated_mlp(*tensors)
        for a, b in zip(ours, torch.autograd.grad(y, tensors, torch.ones_like(y)), strict=True):
            assert torch.equal(a, b)


def test_the_last_backward_writes_over_what_was_kept(device):
    # Not a tensor like gate and up more at the peak.
    x, *weights = make((5,), 16, 24, torch.float16, device)
    kept: dict[tuple[int, ...], torch.Tensor] = {}

    def pack(tensor):
        return kept.setdefault(tuple(tensor.shape), tensor)

    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = gated_mlp(x, *weights)
    before = kept[5, 48].clone()
    torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert torch.equal(kept[5, 48], before)
    torch.autograd.grad(y, x, torch.ones_like(y))
    assert not torch.equal(kept[5, 48], before)


@pytest.mark.parametrize(("recompute", "numbers"), [(False, 6 * (16 + 2 * 24)), (True, 6 * 16)])
def test_bytes_kept_between_forward_and_backward(recompute, numbers, device):
    x, *weights = make((6,), 16, 24, torch.float16, device)
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = gated_mlp(x, *weights, recompute=recompute)
    for weight in weights:
        del kept[weight.data_ptr()]
    assert sum(kept.values()) == 2 * numbers
    assert y.requires_grad


def test_nothing_is_kept_where_no_gradient_is_needed(device, monkeypatch):
    x, *weights = make((6,), 16, 24, torch.float16, device)
    made, forward = [], functional.gated_mlp_forward

    def spy(*args):
        made.append(forward(*args))
        return made[-1]

    monkeypatch.setattr(functional, "gated_mlp_forward", spy)
    with use_backend("triton"):
        expected = gated_mlp(x, *weights)
        with torch.no_grad():
            assert torch.equal(gated_mlp(x, *weights), expected)
        assert torch.equal(gated_mlp(x.detach(), *(w.detach() for w in weights)), expected)
    assert [gate_up.numel() for _, gate_up in made] == [6 * 48, 0, 0]


def test_input_is_not_kept_for_a_frozen_weight(device):
    x, w_gate_up, w_down = make((6,), 16, 24, torch.float16, device)
    kept: set[int] = set()

    def pack(tensor):
        kept.add(tensor.data_ptr())
        return tensor

    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gated_mlp(x, w_gate_up.detach(), w_down)
        assert x.data_ptr() not in kept
        gated_mlp(x, w_gate_up.detach(), w_down, recompute=True)
    assert x.data_ptr() in kept


@pytest.fixture
def allow_tf32():
    former = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = former


@pytest.mark.usefixtures("allow_tf32")
def test_tf32_rounds_what_is_multiplied(device):
    # Tensor cores cut float32 off, which shifts every product towards zero.
    x, w_gate_up, w_down = tensors = make((5,), 16, 8, device=device)
    dy = torch.rand(5, 16, device=device)

    def tf32(t):
        return rounded_to_tf32(functional._OP, t.detach().float()).double()

    with use_backend("triton"):
        y = gated_mlp(*tensors, "relu")
        dx, dw_gate_up, _ = torch.autograd.grad(y, tensors, dy)
    gate, up = (tf32(x) @ tf32(w_gate_up).T).chunk(2, dim=1)
    dh = tf32(dy) @ tf32(w_down)
    dgate_up = torch.cat([dh * up * (gate > 0), dh * gate.relu()], dim=1)
    pairs = (
        (y.detach(), tf32(gate.relu() * up) @ tf32(w_down).T),
        (dx, tf32(dgate_up) @ tf32(w_gate_up)),
        (dw_gate_up, tf32(dgate_up).T @ tf32(x)),
    )
    # Less than a rounding to tf32, 5e-4, but for what float32's own errors push over an edge.
    for ours, expected in pairs:
        error = (ours.double() - expected).norm() / expected.norm()
        assert error < 1e-5


def test_second_derivative_is_refused(device):
    tensors = make((3,), 8, 4, device=device)
    with use_backend("triton"), pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(gated_mlp(*tensors).sum(), tensors[0], create_graph=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_compiles(recompute, device):
    check_compiles(
        partial(gated_mlp, recompute=recompute),
        make((5,), 16, 8, device=device),
        operator="gated_mlp",
    )


@pytest.mark.parametrize("keep", [False, True])
def test_opcheck(keep, device):
    x, w_gate_up, w_down = make((5,), 16, 8, device=device)
    ours, ops = [True] * 4, torch.ops.tilewright
    tensors = (x, w_gate_up, w_down)
    torch.library.opcheck(ops.gated_mlp_forward.default, (*tensors, "gelu", keep, ours, False))
    with torch.no_grad():
        y, gate_up = ops.gated_mlp_forward(*tensors, "gelu", keep, ours, False)
        for needed in ([True] * 3, [True, False, False], [False, False, True]):
            torch.library.opcheck(
                ops.gated_mlp_backward.default, (y, *tensors, gate_up, "gelu", ours, needed)
            )


@pytest.mark.parametrize("sizes", [(16, 136), (19, 23)], ids=str)
def test_every_element_is_written_and_bits_repeat(sizes, device):
    tensors = make((37,), *sizes, dtype=torch.float16, device=device)
    dy = torch.rand(37, sizes[0], device=device, dtype=torch.float16)

    def run():
        y = gated_mlp(*tensors)
        return y, *torch.autograd.grad(y, tensors, dy)

    with use_backend("triton"), poisoned_memory():
        assert all(t.isfinite().all() for t in run())
        check_deterministic(run)


def test_inputs_are_left_alone(device):
    tensors = make((7,), 16, 8, torch.float16, device)
    dy = torch.rand(7, 16, device=device, dtype=torch.float16)
    before = [t.detach().clone() for t in (*tensors, dy)]
    with use_backend("triton"):
        gated_mlp(*tensors).backward(dy)
    for a, b in zip((*tensors, dy), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_is_torchs(backend, device):
    # CPU autocast takes bfloat16 unless told; the interpreter multiplies float16 only.
    tensors = make((5,), 16, 8, device=device)
    dy = torch.rand(5, 16, device=device, dtype=torch.float16)
    with torch.autocast(device.type, torch.float16):
        with use_backend(backend):
            y = gated_mlp(*tensors)
        expected = gated_mlp_reference(*tensors)
    assert y.dtype == expected.dtype == torch.float16
    ours = torch.autograd.grad(y, tensors, dy)
    torchs = torch.autograd.grad(expected, tensors, dy)
    for a, b in zip((y, *ours), (expected, *torchs), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_module(activation, backend, device):
    torch.manual_seed(0)
    mlp = GatedMLP(24, 40, activation, device=device)
    assert mlp.w_gate_up.shape == (80, 24)
    assert 0.9 / 24**0.5 < mlp.w_gate_up.abs().max() <= 1 / 24**0.5
    assert 0.9 / 40**0.5 < mlp.w_down.abs().max() <= 1 / 40**0.5
    x = torch.randn(2, 5, 24, device=device)
    with use_backend(backend):
        y = mlp(x)
    torch.testing.assert_close(y, gated_mlp_reference(x, mlp.w_gate_up, mlp.w_down, activation))
    assert f"activation='{activation}'" in repr(mlp)


@pytest.mark.parametrize(("kib", "descriptors"), [(99, False), (163, False), (227, True)])
def test_descriptors_are_for_gpus_with_room(kib, descriptors, monkeypatch):
    properties = SimpleNamespace(shared_memory_per_block_optin=kib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert _launch.has_room.__wrapped__(torch.device("cuda", 0)) == descriptors
    x, *_ = make((5,), 16, 24, torch.float16)
    assert _launch.describable(x), "the interpreter"
    monkeypatch.setattr(_launch, "has_room", lambda _: False)
    assert not _launch.describable(x)


@pytest.mark.parametrize(
    ("dtype", "tokens", "sizes", "reason"),
    [
        (torch.float32, 4, (16, 8), "products in torch.float32 are cuBLAS's"),
        (torch.float16, 4, (16, 9), "widths 16 and 9 are no multiples of 8"),
        (torch.float16, 4, (12, 8), "widths 12 and 8 are no multiples of 8"),
        (torch.float16, 3, (16, 8), "fewer than 4 tokens do not fill a device with tiles"),
        (torch.float16, 4, (16, 8), None),
    ],
    ids=str,
)
def test_auto_leaves_what_is_not_measured_to_torch(dtype, tokens, sizes, reason, monkeypatch):
    better = []
    monkeypatch.setattr(functional, "LEAST_TOKENS", 4)

    def choose_torch(x, unsupported=None, torch_is_better=None):
        better.append(torch_is_better)
        return False

    monkeypatch.setattr(functional._OP, "uses_triton", choose_torch)
    gated_mlp(*make((tokens,), *sizes, dtype=dtype))
    assert better == [reason]


@pytest.mark.parametrize(("dtype", "sizes"), [(torch.float16, (16, 24)), (torch.float32, (7, 9))])
def test_nans_stay_in_their_rows(dtype, sizes, device):
    # Fewer rows than a tile has: what pads it is another row or zeros.
    x, *weights = make((5,), *sizes, dtype=dtype, device=device)
    sick = x.detach().clone()
    sick[1, 2], sick[4, 0] = torch.nan, torch.inf
    sick.requires_grad_()
    healthy = [0, 2, 3]
    with use_backend("triton"):
        y, expected = gated_mlp(sick, *weights), gated_mlp(x, *weights)
        (dx,) = torch.autograd.grad(y, sick, torch.ones_like(y))
        (expected_dx,) = torch.autograd.grad(expected, x, torch.ones_like(y))
    assert torch.equal(y[healthy], expected[healthy])
    assert torch.equal(dx[healthy], expected_dx[healthy])
    assert y[1].isnan().all()


# Not float64: the oracle would be torch's product in float64, which is no better than ours.
@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", FLOATING[1:], ids=str)
@pytest.mark.parametrize(("rows", "hidden", "width"), REAL_SHAPES, ids=str)
def test_matches_float64_at_real_shapes(rows, hidden, width, dtype, recompute):
    check(*make(rows, hidden, width, dtype, "cuda"), recompute=recompute)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_kernel_at_several_tiles_a_program(activation, dtype, monkeypatch):
    # More tiles than multiprocessors, partial ones at both edges; then what other GPUs run.
    tensors = make((4200,), 264, 2056, dtype, "cuda")
    dy = torch.rand_like(tensors[0])

    def run():
        check(*tensors, activation)
        y = gated_mlp(*tensors, activation)
        return y, *torch.autograd.grad(y, tensors, dy)

    with use_backend("triton"):
        hopper = run()
        monkeypatch.setattr(_gate_up, "is_hopper", lambda _: False)
        monkeypatch.setattr(_gate_up_grad, "is_hopper", lambda _: False)
        for a, b in zip(hopper, run(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    # gate and up of 2¹⁸ tokens and I = 4104: past 2³¹ numbers, 4 GiB. Tokens repeat, so do results.
    x, w_gate_up, w_down = make((64,), 64, 4104, torch.bfloat16, "cuda")
    x = x.detach().repeat(2**12, 1).requires_grad_()
    with use_backend("triton"):
        y = gated_mlp(x, w_gate_up, w_down)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    for t in (y.detach(), dx):
        torch.testing.assert_close(t[-64:], t[:64])
        assert t[-1].abs().max() > 0


@pytest.mark.multigpu(2)
def test_tensors_on_another_than_the_current_device():
    assert torch.cuda.current_device() == 0
    check(*make((5,), 16, 8, device="cuda:1"))


def test_bad_input(device):
    x, w_gate_up, w_down = make((5,), 16, 8, device=device)
    unknown: Any = "tanh"
    with pytest.raises(ValueError, match=r"activation is 'tanh'; choose from silu, gelu, relu"):
        gated_mlp(x, w_gate_up, w_down, unknown)
    with pytest.raises(ValueError, match=r"activation is 'tanh'; choose from silu, gelu, relu"):
        GatedMLP(16, 8, unknown)
    with pytest.raises(ValueError, match=r"w_gate_up has shape \(15, 16\).*2I, hidden"):
        gated_mlp(x, w_gate_up[:15], w_down)
    with pytest.raises(ValueError, match=r"w_gate_up has shape \(16, 12\).*\(16, 16\)"):
        gated_mlp(x, w_gate_up[:, :12], w_down)
    with pytest.raises(ValueError, match=r"w_down has shape \(16, 7\).*\(16, 8\)"):
        gated_mlp(x, w_gate_up, w_down[:, :7])
    with pytest.raises(ValueError, match="x is a scalar"):
        gated_mlp(x[0, 0], w_gate_up, w_down)
    with pytest.raises(TypeError, match=r"w_down is torch.float16 and x torch.float32"):
        gated_mlp(x, w_gate_up, w_down.half())
    with pytest.raises(TypeError, match=r"x is torch.int64"):
        gated_mlp(torch.ones(5, 16, dtype=torch.int64, device=device), w_gate_up, w_down)
    with pytest.raises(ValueError, match=r"x on .*, w_gate_up on .*, w_down on meta"):
        gated_mlp(x, w_gate_up, w_down.to("meta"))
