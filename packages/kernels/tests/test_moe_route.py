"""moe_route: the choice, the weights and the order of rows against plain torch and differences."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright_kernels import (
    Routing,
    moe_permutation,
    moe_permutation_reference,
    moe_route,
    moe_route_reference,
    use_backend,
)
from tilewright_kernels._triton import INTERPRETED
from tilewright_kernels.moe_route import launches
from tilewright_kernels.testing import (
    FLOATING,
    check_against_float64,
    check_compiles,
    check_deterministic,
    check_gradients,
    count_launches,
    no_synchronization,
    poisoned_memory,
    randn,
)

# T, E, k: one of each; odd numbers; all experts; several blocks of tokens; a model's; the widest.
SHAPES = ((1, 1, 1), (37, 5, 2), (9, 8, 8), (300, 16, 4), (70, 128, 8), (11, 512, 3))
BIAS = torch.linspace(0.4, -0.4, 16)
FORMULAS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax of all": {"normalize": False},
    "scaled": {"scale": 2.5},
    "sigmoid": {"scoring": "sigmoid"},
    "sigmoid of all": {"scoring": "sigmoid", "normalize": False},
    "bias": {"correction_bias": BIAS},
    "DeepSeek-V3": {
        "scoring": "sigmoid", "correction_bias": BIAS, "scale": 2.5, "num_groups": 4,
        "topk_groups": 2,
    },
    "groups": {"num_groups": 8, "topk_groups": 3},
    "groups of one": {"num_groups": 16, "topk_groups": 5},
}  # fmt: skip


def on(device, formula) -> dict[str, Any]:
    return {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in formula.items()}


def make(tokens, experts, dtype, device, seed=0):
    return randn(tokens, experts, dtype=dtype, device=device, seed=seed).requires_grad_()


def assert_same_choice(ours: Routing, expected: Routing):
    for name in ("ids", "tokens_per_expert", "offs", "permutation", "inverse"):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name
        assert getattr(ours, name).dtype == torch.int32


def assert_sorted(routing: Routing):
    """What makes an order of rows, without a reference."""
    num_tokens, k = routing.ids.shape
    rows = torch.arange(num_tokens * k, device=routing.ids.device)
    assert torch.equal(routing.permutation[routing.inverse].long(), rows)
    experts = routing.ids.flatten()[routing.permutation].long()
    ends = torch.searchsorted(experts, torch.arange(len(routing.offs), device=rows.device) + 1)
    assert torch.equal(routing.offs.long(), ends)
    key = experts * (num_tokens * k + 1) + routing.permutation
    assert (key.diff() > 0).all()  # by expert, then by token


@pytest.mark.parametrize(
    ("shape", "dtype"),
    # One shape in every dtype: each pair is kernels to compile.
    [(shape, torch.float32) for shape in SHAPES]
    + [((70, 128, 8), dtype) for dtype in FLOATING if dtype != torch.float32],
    ids=str,
)
def test_matches_float64(shape, dtype, device):
    tokens, experts, k = shape
    x = make(tokens, experts, dtype, device)
    with use_backend("triton"):
        ours = moe_route(x, k)
    assert_same_choice(ours, moe_route_reference(x, k))
    assert_sorted(ours)
    check_against_float64(
        lambda x: moe_route(x, k).weights,
        lambda x: moe_route_reference(x, k).weights.to(weights_dtype(dtype)),
        [x],
        operator="moe_route",
    )


def weights_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=list(FORMULAS))
def test_formulas(formula, device):
    formula = on(device, formula)
    x = make(40, 16, torch.float32, device)
    with use_backend("triton"):
        assert_same_choice(moe_route(x, 4, **formula), moe_route_reference(x, 4, **formula))
    check_against_float64(
        lambda x: moe_route(x, 4, **formula).weights,
        lambda x: moe_route_reference(x, 4, **formula).weights,
        [x],
        operator="moe_route",
    )


def test_choice_is_topks(device):
    x = make(50, 24, torch.float32, device)
    scores, ids = x.softmax(-1).topk(5)
    for backend in ("triton", "torch"):
        with use_backend(backend):
            routing = moe_route(x, 5, normalize=False)
            shares = moe_route(x, 5).weights
        assert torch.equal(routing.ids.long(), ids)
        torch.testing.assert_close(routing.weights, scores)
        # Mixtral's: normalized, it is the softmax over the chosen logits.
        torch.testing.assert_close(shares, x.gather(1, ids).softmax(-1))


def test_groups_are_deepseeks(device):
    # As published: the two best scores of a group with their bias, the best groups, the best of
    # their experts, weights without the bias.
    x, bias = make(30, 16, torch.float32, device), BIAS.to(device)
    scores = x.sigmoid()
    biased = (scores + bias).view(30, 4, 4)
    groups = biased.topk(2, -1).values.sum(-1).topk(2, -1).indices
    allowed = torch.zeros(30, 4, device=device).scatter(1, groups, 1.0).bool()
    ids = biased.masked_fill(~allowed[..., None], -torch.inf).flatten(1).topk(4).indices
    weights = scores.gather(1, ids)
    weights = 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20)
    with use_backend("triton"):
        routing = moe_route(x, 4, **on(device, FORMULAS["DeepSeek-V3"]))
    assert torch.equal(routing.ids.long(), ids)
    torch.testing.assert_close(routing.weights, weights)


def test_ties_go_to_the_lowest_index(device):
    x = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, -0.0, 0.0, -0.0]], device=device)
    with use_backend("triton"):
        ids = moe_route(x, 2).ids
    assert ids.tolist() == [[1, 2], [0, 1]]
    assert moe_route_reference(x, 2).ids.tolist() == [[1, 2], [0, 1]]


def test_extreme_logits(device):
    inf, nan = torch.inf, torch.nan
    rows = [[1e30, 0.0, -1e30], [-inf, 2.0, -inf], [nan, 1.0, 2.0], [inf, 1.0, 0.0]]
    rows += [[nan] * 3, [-inf] * 3, [-200.0] * 3]
    x = torch.tensor(rows, device=device)
    for scoring in ("softmax", "sigmoid"):
        with use_backend("triton"):
            ours = moe_route(x, 2, scoring=scoring)
        expected = moe_route_reference(x, 2, scoring=scoring)
        assert_same_choice(ours, expected)
        torch.testing.assert_close(ours.weights, expected.weights, equal_nan=True)


def test_all_tokens_to_one_expert(device):
    x = torch.zeros(200, 8, device=device)
    x[:, 5] = 1
    with use_backend("triton"):
        routing = moe_route(x, 1)
    assert routing.tokens_per_expert.tolist() == [0, 0, 0, 0, 0, 200, 0, 0]
    assert routing.offs.tolist() == [0, 0, 0, 0, 0, 200, 200, 200]
    assert torch.equal(routing.permutation, torch.arange(200, device=device).int())


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_no_tokens(backend, device):
    x = make(0, 6, torch.float32, device)
    with use_backend(backend), poisoned_memory():
        routing = moe_route(x, 2)
        (dx,) = torch.autograd.grad(routing.weights.sum(), x)
    assert routing.tokens_per_expert.tolist() == routing.offs.tolist() == [0] * 6
    assert [len(t) for t in (routing.weights, routing.ids, routing.permutation)] == [0, 0, 0]
    assert dx.shape == (0, 6)


@pytest.fixture
def small_tiles(monkeypatch):
    """Four tokens of 16 experts a program; histograms of two of them are summed at a time."""
    monkeypatch.setattr(launches, "TILE", 64)
    monkeypatch.setattr(launches, "BACKWARD_TILE", 64)
    monkeypatch.setattr(launches, "PREFIX_BLOCK", 2)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 90),
    experts=st.integers(1, 70),
    k=st.integers(1, 9),
    levels=st.sampled_from([2, 5, 1000]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
)
def test_any_shape_and_any_ties(tokens, experts, k, levels, dtype):
    if not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1: each example would be compiled")
    k, device = min(k, experts), torch.device("cpu")
    x = (randn(tokens, experts, dtype=torch.float64, device=device) * levels).round() / levels
    with use_backend("triton"):
        ours = moe_route(x.to(dtype), k)
    assert_same_choice(ours, moe_route_reference(x.to(dtype), k))


@pytest.mark.parametrize("k", [1, 3])
def test_many_blocks(k, small_tiles, device):
    x = make(50, 16, torch.float32, device)
    with use_backend("triton"):
        ours = moe_route(x, k)
        order = moe_permutation(ours.ids, 16)
    assert_same_choice(ours, moe_route_reference(x, k))
    assert all(torch.equal(a, b) for a, b in zip(ours.order()[:4], order[:4], strict=True))


@pytest.mark.gpu
def test_a_million_tokens():
    # Thousands of blocks, and row offsets beyond what the small cases reach.
    x = torch.randn(2**20, 128, device="cuda", dtype=torch.bfloat16)
    ours = moe_route(x, 8)
    assert_same_choice(ours, moe_route_reference(x, 8))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_permutation_of_given_experts(dtype, device):
    # As after an all-to-all: one expert a row, many rows of one, none of another; strided.
    ids = torch.tensor([3, 0, 3, 3, 1, 0, 3, 3], dtype=dtype, device=device)
    spread = torch.stack([ids, torch.full_like(ids, -7)], 1)[:, 0]
    with use_backend("triton"):
        ours = moe_permutation(spread, 5)
    expected = moe_permutation_reference(ids, 5)
    assert ours.k == expected.k == 1
    assert all(torch.equal(a, b) for a, b in zip(ours[:4], expected[:4], strict=True))
    assert ours.tokens_per_expert.tolist() == [2, 1, 0, 5, 0]
    assert ours.indices.tolist() == [1, 5, 4, 0, 2, 3, 6, 7]


def test_experts_that_are_none_spoil_no_other_rows(device):
    ids = torch.tensor([[0, 2], [-1, 99], [2, 0]], dtype=torch.int32, device=device)
    with use_backend("triton"):
        order = moe_permutation(ids, 3)
    assert order.tokens_per_expert.tolist() == [2, 0, 2]
    assert order.indices[:4].tolist() == [0, 5, 1, 4]


@pytest.mark.parametrize("name", ["softmax", "softmax of all", "sigmoid", "sigmoid of all"])
def test_gradcheck(name):
    x = make(5, 7, torch.float64, torch.device("cpu"))
    check_gradients(lambda x: moe_route(x, 3, **FORMULAS[name]).weights, [x], operator="moe_route")


def test_no_gradient_into_the_bias(device):
    x = make(6, 16, torch.float32, device)
    bias = BIAS.to(device).requires_grad_()
    for backend in ("triton", "torch"):
        with use_backend(backend):
            weights = moe_route(x, 2, correction_bias=bias).weights
        dx, dbias = torch.autograd.grad(weights.square().sum(), (x, bias), allow_unused=True)
        assert dx.abs().sum() > 0
        assert dbias is None


def test_strided_logits_and_gradients(device):
    wide = randn(20, 11, dtype=torch.float32, device=device)
    dw = randn(3, 20, dtype=torch.float32, device=device, seed=1).T
    for x in (wide[:, 2:9], wide.T.contiguous().T[:, 2:9], wide[::2, 2:9]):
        x.requires_grad_()
        grads = []
        for backend in ("triton", "torch"):
            with use_backend(backend):
                weights = moe_route(x, 3).weights
                grads += torch.autograd.grad(weights, x, dw[: len(x)])
        torch.testing.assert_close(*grads)


def test_compiles(device):
    x = make(20, 8, torch.float32, device)

    def function(x):
        routing = moe_route(x, 2)
        # Products with the integers, because every output is to have a gradient.
        rows = (routing.permutation, routing.inverse, routing.ids.flatten())
        loads = (routing.tokens_per_expert, routing.offs)
        weights = routing.weights.flatten()
        return *[weights * (r / 40) for r in rows], *[weights[0] * (n / 20) for n in loads]

    check_compiles(function, [x], operator="moe_route")


def test_compiles_with_order(device):
    x = make(20, 8, torch.float32, device)

    def function(x):
        routing = moe_route(x, 2)
        return routing.order().combine(routing.order().apply(x), routing.weights)

    check_compiles(function, [x], operator="moe_route")


def test_opcheck(device):
    x = make(9, 8, torch.float32, device)
    arguments = (x, None, 2, "softmax", True, 1.0, 1, 1)
    torch.library.opcheck(torch.ops.tilewright.moe_route_forward.default, arguments)
    with torch.no_grad():
        weights, ids, *_ = torch.ops.tilewright.moe_route_forward(*arguments)
        backward = torch.ops.tilewright.moe_route_backward.default
        torch.library.opcheck(backward, (weights, x, ids, "softmax", True, 1.0))
    torch.library.opcheck(torch.ops.tilewright.moe_permutation_forward.default, (ids, 8))


def test_every_element_is_written_and_bits_repeat(small_tiles, device):
    x = make(45, 16, torch.float32, device)

    def run():
        routing = moe_route(x, 3)
        return *routing, *torch.autograd.grad(routing.weights.square().sum(), x)

    with use_backend("triton"), poisoned_memory():
        check_deterministic(run, runs=3)
        assert all(t.isfinite().all() for t in run())


@pytest.mark.parametrize("experts", [4, 128])
def test_three_launches_and_one_backward(experts, device):
    x = make(300, experts, torch.float32, device)
    with use_backend("triton"):
        with count_launches() as forward:
            weights = moe_route(x, 2).weights
        with count_launches() as backward:
            weights.sum().backward()
    assert (forward["moe_route"], backward["moe_route"]) == (3, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [4, 128])
def test_nothing_waits(experts):
    x = make(300, experts, torch.float32, "cuda")
    with use_backend("triton"):
        moe_route(x, 2)  # compiles
        with no_synchronization():
            moe_route(x, 2).weights.sum().backward()
    assert x.grad is not None


@pytest.mark.gpu
def test_cuda_graph():
    x = torch.randn(500, 32, device="cuda")
    moe_route(x, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing = moe_route(x, 4)
    x.copy_(torch.randn(500, 32))
    graph.replay()
    assert_same_choice(routing, moe_route_reference(x, 4))


def test_errors(device):
    x = make(4, 6, torch.float32, device)
    a_float: Any = 2.0
    unknown: Any = "top"
    for error, message, call in (
        (ValueError, r"\(24,\)", lambda: moe_route(x.flatten(), 2)),
        (ValueError, "k is 7", lambda: moe_route(x, 7)),
        (ValueError, "k is 0", lambda: moe_route(x, 0)),
        (TypeError, "k is 2.0; give an integer", lambda: moe_route(x, a_float)),
        (ValueError, "scoring is 'top'", lambda: moe_route(x, 2, scoring=unknown)),
        (ValueError, "must divide 6", lambda: moe_route(x, 2, num_groups=4)),
        (ValueError, "topk_groups is 4", lambda: moe_route(x, 2, num_groups=3, topk_groups=4)),
        (ValueError, "fewer than the 3", lambda: moe_route(x, 3, num_groups=3)),
        (ValueError, r"must be \[6\]", lambda: moe_route(x, 2, correction_bias=x[0, :5])),
        (TypeError, "int64", lambda: moe_route(x.long(), 2)),
        (TypeError, "int64", lambda: moe_route(x, 2, correction_bias=x[0].long())),
        (ValueError, "assignments", lambda: moe_route(x[:1].expand(2**30, 6), 2)),
        (TypeError, "float32", lambda: moe_permutation(x, 2)),
        (ValueError, "num_experts is 1", lambda: moe_permutation(x.long(), 1)),
        (ValueError, r"\[T, k\] or \[T\]", lambda: moe_permutation(x.long()[None], 9)),
    ):
        with pytest.raises(error, match=message):
            call()
