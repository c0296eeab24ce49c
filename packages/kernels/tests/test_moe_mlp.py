"""moe_mlp: against the float64 loop over experts, for every way of routing; what is kept."""

from typing import Any

import pytest
import torch

from tilewright_kernels import use_backend
from tilewright_kernels.grouped_mm import launches
from tilewright_kernels.moe_mlp import functional, moe_mlp, moe_mlp_reference
from tilewright_kernels.moe_route import Routing, moe_permutation_reference
from tilewright_kernels.testing import (
    FLOATING,
    check_against_float64,
    check_compiles,
    check_deterministic,
    check_gradients,
    layouts,
    no_synchronization,
    poisoned_memory,
    randn,
)

pytestmark = pytest.mark.usefixtures("small_group_tiles")


def route(tokens, experts, k, how="random", dtype=torch.float32, device="cpu", seed=0):
    """A routing: random experts, the same k for all, or the first one for half of all tokens."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    if how == "all to the last":
        scores[:] = torch.arange(experts)
    elif how == "skewed":
        scores[: tokens // 2, 0] = 2.0
    elif how == "every second expert":
        scores[:, ::2] = -1.0
    ids = scores.argsort(dim=1, descending=True)[:, :k].contiguous()
    weights = torch.rand(tokens, k, generator=generator).to(device, dtype).requires_grad_()
    order = moe_permutation_reference(ids.to(device), experts)
    return Routing(weights, ids.int().to(device), *order[:4])


def make(
    tokens, hidden, width, experts, k, how="random", *, dtype=torch.float32, device="cpu", seed=0
):
    """x, both matrices, the router's weights, and the routing."""
    routing = route(tokens, experts, k, how, dtype, device, seed)
    x = randn(tokens, hidden, dtype=dtype, device=device, seed=seed)
    w_gate_up = randn(experts, 2 * width, hidden, dtype=dtype, device=device, seed=seed + 1)
    w_down = randn(experts, hidden, width, dtype=dtype, device=device, seed=seed + 2)
    w_gate_up, w_down = w_gate_up * hidden**-0.5, w_down * max(width, 1) ** -0.5
    tensors = (x.requires_grad_(), w_gate_up.requires_grad_(), w_down.requires_grad_())
    return (*tensors, routing.weights), routing


def weights_of(tensors):
    return tensors[3]


def layer(routing, **options):
    return lambda x, w1, w2, w: moe_mlp(x, w1, w2, routing._replace(weights=w), **options)


def reference(routing, **options):
    return lambda x, w1, w2, w: moe_mlp_reference(x, w1, w2, routing._replace(weights=w), **options)


def check(tensors, routing, activation="silu", **options):
    check_against_float64(
        layer(routing, activation=activation, **options),
        reference(routing, activation=activation),
        tensors,
        operator="moe_mlp",
    )


HOWS = ("random", "all to the last", "skewed", "every second expert")


@pytest.mark.parametrize("how", HOWS)
def test_matches_float64(how, dot_dtype, device):
    check(*make(13, 24, 40, 5, 2, how, dtype=dot_dtype, device=device))


@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "experts", "k"),
    [(1, 1, 1, 1, 1), (5, 7, 9, 3, 2), (33, 16, 8, 128, 1), (5, 8, 16, 9, 8), (23, 40, 24, 2, 2)],
    ids=str,
)
def test_sizes(tokens, hidden, width, experts, k, device):
    check(*make(tokens, hidden, width, experts, k, device=device))


def test_weights_in_float32_beside_16_bits(device):
    # As moe_route gives them. Their gradient is a sum of rounded numbers, in a dtype that shows it.
    (*tensors, weights), routing = make(13, 24, 40, 5, 2, dtype=torch.float16, device=device)
    tensors = (*tensors, weights.detach().float().requires_grad_())
    wide = [t.detach().double().requires_grad_() for t in tensors]
    dy = randn(13, 24, dtype=torch.float16, device=device)
    with use_backend("triton"):
        (ours,) = torch.autograd.grad(layer(routing)(*tensors), weights_of(tensors), dy)
    (torchs,) = torch.autograd.grad(reference(routing)(*tensors), weights_of(tensors), dy)
    (oracle,) = torch.autograd.grad(reference(routing)(*wide), weights_of(wide), dy.double())
    assert ours.dtype == torch.float32
    assert (ours - oracle).norm() <= 2 * (torchs - oracle).norm()


@pytest.mark.smoke
def test_reference_is_the_formula(device):
    # Token by token, without any order of rows.
    (x, w_gate_up, w_down, weights), routing = make(6, 10, 8, 4, 2, device=device)
    expected = torch.zeros_like(x)
    for t in range(6):
        for j, e in enumerate(routing.ids[t].tolist()):
            gate, up = (w_gate_up[e] @ x[t]).split(8)
            h = torch.nn.functional.silu(gate) * up
            expected[t] += weights[t, j] * (w_down[e] @ h)
    torch.testing.assert_close(moe_mlp_reference(x, w_gate_up, w_down, routing), expected)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_activations(activation, recompute, device):
    tensors, routing = make(9, 16, 24, 4, 2, dtype=torch.float16, device=device)
    check(tensors, routing, activation, recompute=recompute)


@pytest.mark.parametrize("sizes", [(16, 24), (12, 9)], ids=str)
def test_torch_backend(sizes, device):
    # Widths that torch's grouped product takes, and others.
    tensors, routing = make(9, sizes[0], sizes[1], 4, 2, device=device)
    dy = torch.rand_like(tensors[0])
    with use_backend("torch"):
        y = layer(routing)(*tensors)
        ours = y, *torch.autograd.grad(y, tensors, dy)
    y = reference(routing)(*tensors)
    for a, b in zip(ours, (y, *torch.autograd.grad(y, tensors, dy)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "needed",
    [
        (True, False, False, False),
        (False, True, False, False),
        (False, False, True, False),
        (False, False, False, True),
        (True, True, True, False),
    ],
    ids=str,
)
def test_gradients_of_some_inputs_only(needed, recompute, device):
    tensors, routing = make(9, 16, 24, 4, 2, dtype=torch.float16, device=device)
    tensors = tuple(t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True))
    check(tensors, routing, recompute=recompute)


def test_layouts_of_every_operand(device):
    tensors, routing = make(8, 16, 24, 4, 2, dtype=torch.float16, device=device)
    for position, tensor in enumerate(tensors):
        for name, strided in layouts(tensor.shape, tensor.dtype, device):
            given = list(tensors)
            given[position] = strided.mul_(0.25) if name != "expanded rows" else strided * 0.25
            given[position].requires_grad_()
            try:
                check(given, routing)
            except AssertionError as error:
                raise AssertionError(f"operand {position}, {name}: {error}") from error


def test_three_dimensions_and_a_gradient_of_any_layout(device):
    (x, *others), routing = make(6, 8, 16, 4, 2, device=device)
    x = x.detach().view(2, 3, 8).requires_grad_()
    for dy in (torch.ones((), device=device).expand(2, 3, 8), torch.rand(8, 3, 2).to(device).mT.mT):
        dy = dy if dy.shape == x.shape else dy.transpose(0, 2)
        with use_backend("triton"):
            ours = torch.autograd.grad(layer(routing)(x, *others), (x, *others), dy)
        expected = torch.autograd.grad(reference(routing)(x, *others), (x, *others), dy)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("how", "activation", "fast_mode"), [("random", "silu", False), ("skewed", "gelu", True)]
)
def test_gradcheck(how, activation, fast_mode):
    tensors, routing = make(3, 2, 2, 3, 2, how, dtype=torch.float64)
    check_gradients(
        layer(routing, activation=activation), tensors, operator="moe_mlp", fast_mode=fast_mode
    )


@pytest.mark.parametrize("sizes", [(16, 24), (7, 9)], ids=str)
def test_recomputed_bits_are_the_kept_ones(sizes, device):
    tensors, routing = make(9, sizes[0], sizes[1], 4, 2, dtype=torch.float16, device=device)

    def run(recompute):
        y = layer(routing, recompute=recompute)(*tensors)
        return y, *torch.autograd.grad(y, tensors, torch.ones_like(y))

    with use_backend("triton"):
        for a, b in zip(run(False), run(True), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("recompute", [False, True])
def test_two_backwards_of_one_graph_agree(recompute, device):
    # Only the last one may write over what is kept.
    tensors, routing = make(9, 16, 24, 4, 2, dtype=torch.float16, device=device)
    with use_backend("triton"):
        total = layer(routing, recompute=recompute)(*tensors).sum()
        first = torch.autograd.grad(total, tensors, retain_graph=True)
        for a, b in zip(first, torch.autograd.grad(total, tensors), strict=True):
            assert torch.equal(a, b)


def test_many_output_gradients_at_once(device):
    tensors, routing = make(5, 16, 24, 4, 2, dtype=torch.float16, device=device)
    x = tensors[0]
    dys = torch.rand(3, 5, 16, device=device, dtype=torch.float16)
    with use_backend("triton"):
        y = layer(routing)(*tensors)
        (together,) = torch.autograd.grad(y, x, dys, is_grads_batched=True)
        for dx, dy in zip(together, dys, strict=True):
            assert torch.equal(dx, *torch.autograd.grad(layer(routing)(*tensors), x, dy))


@pytest.mark.parametrize(("recompute", "numbers"), [(False, 6 * 16 + 12 * 48), (True, 6 * 16)])
def test_bytes_kept_between_forward_and_backward(recompute, numbers, device):
    tensors, routing = make(6, 16, 24, 4, 2, dtype=torch.float16, device=device)
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(routing, recompute=recompute)(*tensors)
    for given in (*tensors[1:], *routing):
        kept.pop(given.data_ptr(), None)
    assert sum(kept.values()) == 2 * numbers
    assert y.requires_grad


def test_nothing_is_kept_where_no_gradient_is_needed(device, monkeypatch):
    tensors, routing = make(6, 16, 24, 4, 2, dtype=torch.float16, device=device)
    made, forward = [], functional.moe_mlp_forward

    def spy(*args):
        made.append(forward(*args))
        return made[-1]

    monkeypatch.setattr(functional, "moe_mlp_forward", spy)
    with use_backend("triton"):
        expected = layer(routing)(*tensors)
        with torch.no_grad():
            assert torch.equal(layer(routing)(*tensors), expected)
    assert [gate_up.numel() for _, gate_up in made] == [12 * 48, 0]


@pytest.mark.parametrize("recompute", [False, True])
def test_compiles(recompute, device):
    tensors, routing = make(5, 16, 8, 4, 2, device=device)
    check_compiles(layer(routing, recompute=recompute), tensors, operator="moe_mlp")


@pytest.mark.parametrize("keep", [False, True])
def test_opcheck(keep, device):
    tensors, routing = make(5, 16, 8, 4, 2, device=device)
    order, ops = (routing.offs, routing.permutation, routing.inverse), torch.ops.tilewright
    torch.library.opcheck(ops.moe_mlp_forward.default, (*tensors, *order, "gelu", keep, False))
    with torch.no_grad():
        y, gate_up = ops.moe_mlp_forward(*tensors, *order, "gelu", keep, False)
        for needed in ([True] * 4, [True, False, False, False], [False, False, True, True]):
            torch.library.opcheck(
                ops.moe_mlp_backward.default, (y, *tensors, gate_up, *order, "gelu", needed)
            )


@pytest.mark.parametrize("sizes", [(16, 136), (19, 23)], ids=str)
@pytest.mark.parametrize("how", ["random", "every second expert"])
def test_every_element_is_written_and_bits_repeat(how, sizes, device):
    tensors, routing = make(23, sizes[0], sizes[1], 4, 2, how, dtype=torch.float16, device=device)

    def run():
        y = layer(routing)(*tensors)
        return y, *torch.autograd.grad(y, tensors, torch.ones_like(y))

    with use_backend("triton"), poisoned_memory():
        assert all(t.isfinite().all() for t in run())
        check_deterministic(run)


def test_inputs_are_left_alone(device):
    tensors, routing = make(7, 16, 8, 4, 2, dtype=torch.float16, device=device)
    before = [t.detach().clone() for t in (*tensors, *routing)]
    with use_backend("triton"):
        layer(routing)(*tensors).sum().backward()
    for a, b in zip((*tensors, *routing), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce:RuntimeWarning")
def test_nans_stay_in_their_token(device):
    tensors, routing = make(9, 16, 24, 4, 2, dtype=torch.float16, device=device)
    sick = tensors[0].detach().clone()
    sick[2, 3], sick[5, 0] = torch.nan, torch.inf
    sick.requires_grad_()
    healthy = [0, 1, 3, 4, 6, 7, 8]
    with use_backend("triton"):
        y, expected = layer(routing)(sick, *tensors[1:]), layer(routing)(*tensors)
        (dx,) = torch.autograd.grad(y, sick, torch.ones_like(y))
        (expected_dx,) = torch.autograd.grad(expected, tensors[0], torch.ones_like(y))
    assert torch.equal(y[healthy], expected[healthy])
    assert torch.equal(dx[healthy], expected_dx[healthy])
    assert y[2].isnan().all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("sizes", [(16, 24), (12, 9)], ids=str)
def test_rows_of_experts_elsewhere_are_zeros(sizes, backend, device):
    (x, w_gate_up, w_down, weights), routing = make(9, sizes[0], sizes[1], 5, 2, device=device)
    with torch.no_grad():  # the last two experts' results are known, and those of their rows
        w_down[3:] = 0
    expected = reference(routing)(x, w_gate_up, w_down, weights)
    here = routing._replace(offs=routing.offs[:3], tokens_per_expert=routing.tokens_per_expert[:3])
    given = (x, w_gate_up[:3].detach().requires_grad_(), w_down[:3].detach().requires_grad_())
    dy = torch.rand_like(x)
    with use_backend(backend), poisoned_memory():
        y = layer(here)(*given, weights)
        ours = torch.autograd.grad(y, (*given, weights), dy)
    theirs = torch.autograd.grad(expected, (x, w_gate_up, w_down, weights), dy)
    torch.testing.assert_close(y, expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b[: len(a)])


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_no_tokens_and_nothing_between(backend, device):
    for tokens, width in ((0, 8), (3, 0)):
        tensors, routing = make(tokens, 16, width, 4, 2, device=device)
        with use_backend(backend):
            y = layer(routing)(*tensors)
            grads = torch.autograd.grad(y, tensors, torch.ones_like(y))
        assert not y.any()
        for grad, tensor in zip(grads, tensors, strict=True):
            assert grad.shape == tensor.shape
            assert not grad.any()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_rank_without_experts(recompute, backend, device):
    (x, w_gate_up, w_down, weights), routing = make(5, 16, 8, 4, 2, device=device)
    given = (x, w_gate_up[:0].detach(), w_down[:0].detach(), weights)
    given = tuple(t.requires_grad_() for t in given)
    here = routing._replace(offs=routing.offs[:0], tokens_per_expert=routing.tokens_per_expert[:0])
    with use_backend(backend), poisoned_memory():
        y = layer(here, recompute=recompute)(*given)
        grads = torch.autograd.grad(y, given, torch.ones_like(y))
    assert y.shape == x.shape
    for zeros in (y, *grads):
        assert not zeros.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 6])
@pytest.mark.parametrize("sizes", [(16, 24), (12, 9)], ids=str)
def test_torch_backend_compiles(sizes, tokens, dtype, device):
    tensors, routing = make(tokens, sizes[0], sizes[1], 4, 2, dtype=dtype, device=device)
    torch._dynamo.reset()
    with use_backend("torch"):
        compiled = torch.compile(layer(routing), fullgraph=True, backend="aot_eager")
        y = compiled(*tensors)
        ours = y, *torch.autograd.grad(y, tensors, torch.ones_like(y))
    wide = [t.detach().double().requires_grad_() for t in tensors]
    y = reference(routing)(*wide)
    for a, b in zip(ours, (y, *torch.autograd.grad(y, wide, torch.ones_like(y))), strict=True):
        error = (a - b).norm() / b.norm().clamp(min=1e-30)
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_experts_not_chosen_have_no_influence(value, compiled, device):
    tensors, routing = make(6, 16, 24, 4, 2, "all to the last", device=device)
    expected = reference(routing)(*tensors)
    theirs = torch.autograd.grad(expected, tensors, torch.ones_like(expected))
    with torch.no_grad():
        for weight in tensors[1:3]:
            weight[0] = value
    torch._dynamo.reset()
    function = layer(routing)
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    with use_backend("torch"):
        y = function(*tensors)
        ours = torch.autograd.grad(y, tensors, torch.ones_like(y))
    for a, b in zip((y, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_strided_routing(backend, device):
    tensors, routing = make(9, 16, 24, 4, 2, dtype=torch.float16, device=device)
    names = ("offs", "permutation", "inverse", "tokens_per_expert", "ids")
    order = {name: getattr(routing, name) for name in names}
    strided = {name: torch.stack([t, t * 0], -1)[..., 0] for name, t in order.items()}
    results = []
    for given in (routing, routing._replace(**strided)):
        with use_backend(backend):
            y = layer(given)(*tensors)
            results.append((y, *torch.autograd.grad(y, tensors, torch.ones_like(y))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast(backend, device):
    tensors, routing = make(5, 16, 8, 4, 2, device=device)
    with torch.autocast(device.type, torch.float16), use_backend(backend):
        y = layer(routing)(*tensors)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), reference(routing)(*tensors), rtol=5e-3, atol=5e-3)


def test_second_derivative_is_refused(device):
    tensors, routing = make(3, 8, 4, 4, 2, device=device)
    with use_backend("triton"), pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(layer(routing)(*tensors).sum(), tensors[0], create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (5, 9)}, r"w_gate_up has shape \(4, 16, 8\); with x \(5, 9\)"),
        ({"x": (6, 8)}, r"route these 6 tokens, for which it is \[6, k\]"),
        ({"x": ()}, "x is a scalar"),
        ({"w_gate_up": (4, 15, 8)}, r"it must be \[E, 2I, hidden\]"),
        ({"w_gate_up": (16, 8)}, r"it must be \[E, 2I, hidden\]"),
        ({"w_down": (4, 8, 9)}, r"w_down has shape \(4, 8, 9\)"),
        ({"w_down": (3, 8, 8)}, "routing to 4 experts"),
    ],
    ids=str,
)
def test_bad_shapes(change, message):
    shapes = {"x": (5, 8), "w_gate_up": (4, 16, 8), "w_down": (4, 8, 8)} | change
    x, w_gate_up, w_down = (torch.ones(s) for s in shapes.values())
    with pytest.raises(ValueError, match=message):
        moe_mlp(x, w_gate_up, w_down, route(5, 4, 2))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda r: {"weights": r.weights[:, :1]}, ValueError, r"it must be \[5\]"),
        (lambda r: {"weights": r.weights.repeat(1, 2)}, ValueError, r"it must be \[20\]"),
        (lambda r: {"permutation": r.permutation[:9]}, ValueError, r"permutation has shape \(9,\)"),
        (lambda r: {"inverse": r.inverse[:9]}, ValueError, r"inverse has shape \(9,\)"),
        (lambda r: {"inverse": r.inverse[:, None]}, ValueError, r"inverse has shape \(10, 1\)"),
        (lambda r: {"offs": r.offs[:, None]}, ValueError, r"offs has shape \(4, 1\)"),
        (lambda r: {"offs": r.offs.long()}, TypeError, r"give offs\.int\(\)"),
        (lambda r: {"permutation": r.permutation.long()}, TypeError, r"permutation\.int\(\)"),
        (lambda r: {"inverse": r.inverse.long()}, TypeError, r"give inverse\.int\(\)"),
        (lambda r: {"inverse": r.inverse.to("meta")}, ValueError, "inverse on meta"),
    ],
    ids=range(10),
)
def test_bad_routing(change, error, message, backend):
    (x, w_gate_up, w_down, _), routing = make(5, 8, 8, 4, 2)
    with use_backend(backend), pytest.raises(error, match=message):
        moe_mlp(x, w_gate_up, w_down, routing._replace(**change(routing)))


def test_bad_dtypes_and_names():
    unknown: Any = "tanh"
    (x, w_gate_up, w_down, _), routing = make(5, 8, 8, 4, 2)
    with pytest.raises(TypeError, match=r"give w_down\.to\(x\.dtype\)"):
        moe_mlp(x, w_gate_up, w_down.half(), routing)
    with pytest.raises(ValueError, match="choose from silu, gelu, relu"):
        moe_mlp(x, w_gate_up, w_down, routing, activation=unknown)


# Not float64: the oracle would be torch's product in float64, which is no better than ours.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATING[1:], ids=str)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("sizes", [(264, 520), (256, 512), (131, 67)], ids=str)
def test_matches_float64_at_real_shapes(sizes, how, dtype):
    check(*make(1000, sizes[0], sizes[1], 8, 3, how, dtype=dtype, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("how", HOWS)
def test_hopper_agrees_with_its_twin(how, monkeypatch):
    tensors, routing = make(1500, 264, 520, 8, 3, how, dtype=torch.float16, device="cuda")

    def run():
        y = layer(routing)(*tensors)
        return y, *torch.autograd.grad(y, tensors, torch.ones_like(y))

    with use_backend("triton"):
        hopper = run()
        monkeypatch.setattr(launches, "is_hopper", lambda _: False)
        for a, b in zip(hopper, run(), strict=True):
            error = (a.double() - b.double()).norm() / b.double().norm()
            assert error < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(256, 512), (131, 67)], ids=str)
def test_graph_follows_the_routing(sizes):
    # Captured with one routing, replayed with others: nothing has read it on the host.
    tensors, routing = make(700, sizes[0], sizes[1], 8, 2, dtype=torch.float16, device="cuda")
    dy = torch.rand_like(tensors[0])

    def run():
        # New leaves: those of the warm-up belong to its stream.
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = layer(routing)(*leaves)
        return y, *torch.autograd.grad(y, leaves, dy)

    with use_backend("triton"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), no_synchronization():
            captured = run()
        for how in HOWS:
            other = route(700, 8, 2, how, device="cuda", seed=7)
            with torch.no_grad():
                for a, b in zip(routing, other, strict=True):
                    a.copy_(b)
            graph.replay()
            torch.cuda.synchronize()
            for a, b in zip(captured, run(), strict=True):
                assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_less_memory_than_torchs_grouped_product(recompute):
    tensors, routing = make(4096, 512, 512, 16, 4, dtype=torch.bfloat16, device="cuda")

    def peak(backend, **options):
        with use_backend(backend):
            layer(routing, **options)(*tensors).sum().backward()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            layer(routing, **options)(*tensors).sum().backward()
            return torch.cuda.max_memory_allocated() - before

    assert peak("triton", recompute=recompute) < peak("torch")


@pytest.mark.gpu
def test_beyond_2_to_31_elements():
    # gate_up has 66000 x 32768 of them. The last tokens' rows are the last of both experts.
    tensors, routing = make(33000, 64, 16384, 2, 2, dtype=torch.float16, device="cuda")
    x, w_gate_up, w_down, weights = tensors
    with use_backend("triton"):
        y = layer(routing)(*tensors)
        dx, dweights = torch.autograd.grad(y, (x, weights), torch.ones_like(y))
    last = slice(-50, None)
    some = (x[last].detach().requires_grad_(), w_gate_up, w_down, weights[last].detach())
    some[3].requires_grad_()
    order = moe_permutation_reference(routing.ids[last], 2)
    expected = reference(Routing(some[3], routing.ids[last], *order[:4]))(*some)
    grads = torch.autograd.grad(expected, (some[0], some[3]), torch.ones_like(expected))
    for ours, theirs in ((y, expected), (dx, grads[0]), (dweights, grads[1])):
        error = (ours[last].double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 4e-3
