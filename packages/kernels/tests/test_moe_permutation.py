"""Permutation: rows to their experts and back, with one device and with the experts on several."""

import itertools

import pytest
import torch
from torch import Tensor

from tilewright_kernels import moe_permutation, moe_route, swiglu, use_backend
from tilewright_kernels.moe_route import rows as rows_module
from tilewright_kernels.testing import (
    FLOATING,
    check_against_float64,
    check_compiles,
    check_deterministic,
    check_gradients,
    layouts,
    poisoned_memory,
    randn,
)

TOKENS, EXPERTS, K = 21, 6, 3


def order_of(tokens, k, device, experts=EXPERTS):
    logits = randn(tokens, experts, dtype=torch.float32, device=device, seed=5)
    return moe_route(logits, k).order()


def apply_reference(order):
    return lambda x: x[order.indices // order.k]


def combine_reference(order):
    """In the accumulation's dtype, as the definition says; k sums of bfloat16 would lose more."""

    def combine(rows, weights=None):
        wide = rows if rows.dtype == torch.float64 else rows.float()
        chosen = wide[order.inverse].unflatten(0, (-1, order.k))
        if weights is not None:
            chosen = chosen * weights[..., None]
        return chosen.sum(1).to(rows.dtype)

    return combine


@pytest.fixture
def small_tiles(monkeypatch):
    """Rows past 16 columns are walked in blocks."""
    monkeypatch.setattr(rows_module, "BLOCK_N", 16)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("width", [7, 40])
def test_matches_float64(width, dtype, small_tiles, device):
    order = order_of(TOKENS, K, device)
    x = randn(TOKENS, width, dtype=dtype, device=device).requires_grad_()
    rows = randn(TOKENS * K, width, dtype=dtype, device=device).requires_grad_()
    weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weights = randn(TOKENS, K, dtype=weights_dtype, device=device).requires_grad_()
    # The kernel adds the k gradients of a row in float32; so does this.
    wide = apply_reference(order)
    check_against_float64(
        order.apply,
        lambda x: wide(x.float()).to(x.dtype) if x.dtype != torch.float64 else wide(x),
        [x],
        operator="moe_permute",
    )
    for inputs in ((rows,), (rows, weights)):
        check_against_float64(
            order.combine, combine_reference(order), inputs, operator="moe_combine"
        )


@pytest.mark.parametrize("k", [1, 2, 6])
def test_any_k(k, device):
    order = order_of(TOKENS, k, device)
    x = randn(TOKENS, 9, dtype=torch.float32, device=device).requires_grad_()
    with use_backend("triton"):
        torch.testing.assert_close(order.apply(x), apply_reference(order)(x))
        # There and back, with shares that sum to 1, is where it began.
        shares = torch.full((TOKENS, k), 1 / k, device=device)
        torch.testing.assert_close(order.combine(order.apply(x), shares), x)


def test_rows_of_an_expert_lie_together(device):
    logits = randn(TOKENS, EXPERTS, dtype=torch.float32, device=device)
    routing = moe_route(logits, K)
    names = torch.arange(TOKENS, device=device).float()[:, None]
    with use_backend("triton"):
        tokens = routing.order().apply(names)[:, 0].long()
    ends = routing.offs.tolist()
    for expert, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        chosen = (routing.ids == expert).any(1).nonzero()[:, 0]
        assert torch.equal(tokens[start:end], chosen)


def test_gradient_of_weights_only(device):
    order = order_of(TOKENS, K, device)
    rows = randn(TOKENS * K, 8, dtype=torch.float32, device=device)
    weights = randn(TOKENS, K, dtype=torch.float32, device=device).requires_grad_()
    inputs = (rows, weights)
    check_against_float64(order.combine, combine_reference(order), inputs, operator="moe_combine")


def test_layouts(device):
    order = order_of(6, 1, device)
    for name, x in layouts((6, 10), torch.float32, device):
        x.requires_grad_()
        try:
            check_against_float64(order.apply, apply_reference(order), [x], operator="moe_permute")
            check_against_float64(
                order.combine, combine_reference(order), [x], operator="moe_combine"
            )
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_strided_order(backend, device):
    order = order_of(TOKENS, K, device)
    indices, inverse = (torch.stack([t, t * 0], 1)[:, 0] for t in (order.indices, order.inverse))
    x = randn(TOKENS, 9, dtype=torch.float32, device=device).requires_grad_()
    results = []
    for given in (order, order._replace(indices=indices, inverse=inverse)):
        with use_backend(backend):
            y = given.combine(given.apply(x).square())
            results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_output_gradient_layouts(device):
    order = order_of(8, 1, device)
    x = randn(8, 8, dtype=torch.float32, device=device).requires_grad_()
    weights = randn(8, 1, dtype=torch.float32, device=device).requires_grad_()
    one, wide = torch.ones((), device=device), torch.rand(8, 19, device=device)
    for dy in (one.expand(8, 8), wide[:, :8].T, wide[:, 3:11]):
        grads = []
        for backend in ("triton", "torch"):
            with use_backend(backend):
                grads.append(
                    torch.autograd.grad(
                        (order.apply(x), order.combine(x, weights)), (x, weights), (dy, dy)
                    )
                )
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_no_tokens_and_no_columns(backend, device):
    for tokens, width in ((0, 5), (4, 0)):
        order = order_of(tokens, 2, device)
        x = torch.randn(tokens, width, device=device, requires_grad=True)
        weights = torch.rand(tokens, 2, device=device, requires_grad=True)
        with use_backend(backend), poisoned_memory():
            y = order.combine(order.apply(x), weights)
            dx, dweights = torch.autograd.grad(y.sum(), (x, weights))
        assert y.shape == dx.shape == (tokens, width)
        assert not dweights.any()


def test_gradcheck(small_tiles):
    order = order_of(4, 2, torch.device("cpu"))
    x = randn(4, 19, dtype=torch.float64, device="cpu").requires_grad_()
    rows = randn(8, 19, dtype=torch.float64, device="cpu").requires_grad_()
    weights = randn(4, 2, dtype=torch.float64, device="cpu").requires_grad_()
    check_gradients(order.apply, [x], operator="moe_permute", fast_mode=True)
    check_gradients(order.combine, [rows], operator="moe_combine", fast_mode=True)
    check_gradients(order.combine, [rows, weights], operator="moe_combine", fast_mode=True)


def test_compiles(device):
    order = order_of(TOKENS, K, device)
    x = randn(TOKENS, 8, dtype=torch.float32, device=device).requires_grad_()
    weights = randn(TOKENS, K, dtype=torch.float32, device=device).requires_grad_()
    check_compiles(
        lambda x, w: order.combine(order.apply(x), w), [x, weights], operator="moe_combine"
    )


def test_opcheck(device):
    order = order_of(TOKENS, K, device)
    x = randn(TOKENS, 8, dtype=torch.float32, device=device).requires_grad_()
    weights = randn(TOKENS, K, dtype=torch.float32, device=device).requires_grad_()
    operators = torch.ops.tilewright
    torch.library.opcheck(operators.moe_permute_forward.default, (x, order.inverse, K))
    with torch.no_grad():
        rows = order.apply(x)
    for given in (None, weights):
        torch.library.opcheck(
            operators.moe_combine_forward.default,
            (rows.clone().requires_grad_(), given, order.inverse, K),
        )
    with torch.no_grad():
        torch.library.opcheck(operators.moe_permute_backward.default, (rows, order.inverse, K))
        torch.library.opcheck(
            operators.moe_combine_backward.default, (x, rows, weights, order.inverse, K)
        )


def test_every_element_is_written_and_bits_repeat(small_tiles, device):
    order = order_of(TOKENS, K, device)
    x = randn(TOKENS, 40, dtype=torch.float32, device=device).requires_grad_()
    weights = randn(TOKENS, K, dtype=torch.float32, device=device).requires_grad_()

    def run():
        y = order.combine(order.apply(x), weights)
        return y, *torch.autograd.grad(y.square().sum(), (x, weights))

    with use_backend("triton"), poisoned_memory():
        check_deterministic(run)
        assert all(t.isfinite().all() for t in run())


def all_to_all(sent: list[list[Tensor]]) -> list[Tensor]:
    """What rank r sends to each, sent[r], to what each has from all, in the order of ranks."""
    return [torch.cat(pieces) for pieces in zip(*sent, strict=True)]


def by_expert(rows: Tensor, ends: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """The experts one after another."""
    starts_ends = itertools.pairwise([0, *ends.tolist()])
    products = zip(starts_ends, w_gate_up, w_down, strict=True)
    return torch.cat([swiglu(rows[a:b] @ up.T) @ down.T for (a, b), up, down in products])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_experts_on_several_ranks_are_as_on_one(ranks, device):
    tokens, experts, k, hidden, width = 24, 8, 3, 6, 5
    x = randn(tokens, hidden, dtype=torch.float64, device=device, seed=1).requires_grad_()
    logits = randn(tokens, experts, dtype=torch.float64, device=device, seed=2) * 3
    logits.requires_grad_()
    w_gate_up = randn(experts, 2 * width, hidden, dtype=torch.float64, device=device, seed=3)
    w_down = randn(experts, hidden, width, dtype=torch.float64, device=device, seed=4)
    wrt = (x, logits, w_gate_up.requires_grad_(), w_down.requires_grad_())

    def one_process() -> Tensor:
        routing = moe_route(logits, k)
        order = routing.order()
        rows = by_expert(order.apply(x), order.offs, w_gate_up, w_down)
        return order.combine(rows, routing.weights)

    def many_ranks() -> Tensor:
        here = experts // ranks  # rank r has the experts from r · here on
        routings = [moe_route(part, k) for part in logits.chunk(ranks)]
        orders = [routing.order() for routing in routings]
        sent, loads = [], []
        for order, part in zip(orders, x.chunk(ranks), strict=True):
            load = order.tokens_per_expert.view(ranks, here)
            sent.append(list(order.apply(part).split(load.sum(1).tolist())))
            loads.append(list(load))
        returned = []
        received_loads = [torch.stack(pieces) for pieces in zip(*loads, strict=True)]
        for rank, received in enumerate(all_to_all(sent)):
            # In the order of ranks, and within one by expert; the products want it by expert.
            names = torch.arange(here, device=device).repeat(ranks)
            ids = names.repeat_interleave(received_loads[rank].flatten())
            local = moe_permutation(ids, here)
            own = slice(rank * here, (rank + 1) * here)
            rows = by_expert(local.apply(received), local.offs, w_gate_up[own], w_down[own])
            back = local.combine(rows)
            returned.append(list(back.split(received_loads[rank].sum(1).tolist())))
        parts = zip(orders, all_to_all(returned), routings, strict=True)
        return torch.cat([order.combine(rows, routing.weights) for order, rows, routing in parts])

    with use_backend("triton"):
        outputs = [function() for function in (one_process, many_ranks)]
        dy = randn(tokens, hidden, dtype=torch.float64, device=device, seed=6)
        grads = [torch.autograd.grad(y, wrt, dy) for y in outputs]
    torch.testing.assert_close(*outputs)
    for alone, together in zip(*grads, strict=True):
        torch.testing.assert_close(alone, together)


def test_errors(device):
    order = order_of(TOKENS, K, device)
    x = torch.randn(TOKENS, 8, device=device)
    rows = torch.randn(TOKENS * K, 8, device=device)
    for error, message, call in (
        (ValueError, r"\[21, N\]", lambda: order.apply(x[:5])),
        (ValueError, r"\[21, N\]", lambda: order.apply(x[:, 0])),
        (ValueError, r"\[63, N\]", lambda: order.combine(x)),
        (ValueError, r"\(21, 3\)", lambda: order.combine(rows, rows[:, 0])),
        (TypeError, "int64", lambda: order.apply(x.long())),
        (TypeError, "int64", lambda: order.combine(rows, order.inverse.view(-1, K).long())),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
