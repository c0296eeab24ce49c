"""router_statistics against float64, its plain-torch definition and finite differences."""

import pytest
import torch

from tilewright_kernels import router_statistics, router_statistics_reference, use_backend
from tilewright_kernels.testing import (
    FLOATING,
    check_against_float64,
    check_compiles,
    check_deterministic,
    check_gradients,
    poisoned_memory,
    randn,
)

# One of each; odd; several programs with several blocks each, 16 tokens wide; the widest.
SHAPES = ((1, 1), (37, 5), (200, 128), (9, 512))


def make(tokens, experts, dtype, device):
    x = randn(tokens, experts, dtype=dtype, device=device).requires_grad_()
    return x, torch.arange(tokens, device=device) % 3


def function(x, weights):
    return tuple(router_statistics(x, weights))


def reference(x, weights):
    return tuple(router_statistics_reference(x, weights))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    # One shape in every dtype: each pair is kernels to compile.
    [(shape, torch.float32) for shape in SHAPES]
    + [((37, 5), dtype) for dtype in FLOATING if dtype != torch.float32],
    ids=str,
)
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_float64(shape, dtype, weighted, device):
    x, weights = make(shape[0], shape[1], dtype, device)
    inputs = (x, weights if weighted else None)
    check_against_float64(function, reference, inputs, operator="router_statistics")


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_sum_only(which, device):
    x, weights = make(37, 5, torch.float32, device)
    check_against_float64(
        lambda x: function(x, weights)[which],
        lambda x: reference(x, weights)[which],
        [x],
        operator="router_statistics",
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_tokens_without_weight_may_hold_anything(backend, device):
    x, _ = make(6, 4, torch.float32, device)
    spoiled = torch.cat([x.detach(), torch.full((2, 4), torch.nan, device=device)])
    spoiled.requires_grad_()
    weights = (torch.arange(8, device=device) < 6).float()
    with use_backend(backend):
        ours, expected = function(spoiled, weights), function(x, None)
        dspoiled, dx = (
            torch.autograd.grad(sums[0].square().sum() + sums[1], y)[0]
            for sums, y in ((ours, spoiled), (expected, x))
        )
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(dspoiled[:6], dx)
    assert not dspoiled[6:].any()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_no_tokens(backend, device):
    with use_backend(backend), poisoned_memory():
        sums = router_statistics(torch.empty(0, 6, device=device))
    assert sums.probability_sum.tolist() == [0] * 6
    assert sums.square_lse_sum.item() == 0


def test_strided_logits(device):
    wide = randn(20, 11, dtype=torch.float32, device=device)
    for x in (wide[:, 2:9], wide.T.contiguous().T[:, 2:9], wide[::2, 2:9]):
        inputs = (x.requires_grad_(), None)
        check_against_float64(function, reference, inputs, operator="router_statistics")


def test_strided_weights(device):
    x, _ = make(20, 6, torch.float32, device)
    for weights in (
        torch.rand(20, 2, device=device)[:, 0],
        torch.rand(1, device=device).expand(20),
    ):
        assert not weights.is_contiguous()
        check_against_float64(function, reference, (x, weights), operator="router_statistics")


def test_gradcheck():
    x, weights = make(7, 5, torch.float64, torch.device("cpu"))
    check_gradients(lambda x: function(x, weights), [x], operator="router_statistics")


def test_compiles(device):
    check_compiles(function, make(9, 5, torch.float32, device), operator="router_statistics")


def test_opcheck(device):
    x, weights = make(9, 5, torch.float32, device)
    forward = torch.ops.tilewright.router_statistics_forward.default
    torch.library.opcheck(forward, (x, weights.float()))
    with torch.no_grad():
        sums, square = forward(x, None)
        backward = torch.ops.tilewright.router_statistics_backward.default
        torch.library.opcheck(backward, (sums, square, x, weights.float()))


def test_every_element_is_written_and_bits_repeat(device):
    x, weights = make(200, 5, torch.float32, device)

    def run():
        sums = router_statistics(x, weights)
        loss = sums.probability_sum.square().sum() + sums.square_lse_sum
        return *sums, *torch.autograd.grad(loss, x)

    with use_backend("triton"), poisoned_memory():
        check_deterministic(run)
        assert all(t.isfinite().all() for t in run())


def test_errors(device):
    x, weights = make(4, 6, torch.float32, device)
    for error, message, call in (
        (ValueError, r"\(24,\)", lambda: router_statistics(x.flatten())),
        (ValueError, r"\(4, 0\)", lambda: router_statistics(x[:, :0])),
        (ValueError, r"must be \[4\]", lambda: router_statistics(x, weights[:3])),
        (TypeError, "int64", lambda: router_statistics(x.long())),
    ):
        with pytest.raises(error, match=message):
            call()
