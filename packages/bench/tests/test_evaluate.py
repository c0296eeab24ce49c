import math

import pytest
import torch

from tilewright_bench import Case, Work
from tilewright_bench.evaluate import Oracle, directed, restoring

CPU = torch.device("cpu")
ROWS, WIDTH = 24, 16


def scale(x, weight):
    return x * weight


def make_inputs(device, generator, rows=ROWS):
    options = {"device": device, "generator": generator, "dtype": torch.bfloat16}
    return (
        torch.randn(rows, WIDTH, **options).requires_grad_(),
        torch.randn(WIDTH, **options).requires_grad_(),
    )


def case(**changes):
    return Case(
        operator="scale",
        shape=(ROWS, WIDTH),
        dtype=torch.bfloat16,
        make_inputs=make_inputs,
        reference=scale,
        forward=Work(bytes=1, flops=0),
        backward=Work(bytes=1, flops=0),
        **changes,
    )


def relative_error(function, direction, device=CPU):
    return Oracle(case(), direction, device).judge(function).error


def test_directions_compute_results_and_gradients(device):
    x, weight = case().inputs(device, seed=3)
    assert torch.equal(directed(scale, (x, weight), "fwd")(), x * weight)
    alone = directed(scale, (x, weight), "bwd")
    both = directed(scale, (x, weight), "fwd+bwd")
    # dy is the same at each call and in each direction, so the gradients are too.
    for dx, dweight in (alone(), alone(), both(), both()):
        assert torch.equal(dx, alone()[0])
        torch.testing.assert_close(dweight, alone()[1])
    ones = torch.ones_like(x).requires_grad_()
    dy = directed(scale, (ones, torch.ones_like(weight)), "bwd")()[0]
    assert torch.equal(alone()[0], dy * weight)
    assert x.grad is None, "gradients are returned, not accumulated"


def test_a_loss_gets_the_gradient_one():
    x = torch.randn(5, requires_grad=True)
    (gradient,) = directed(lambda x: x.sum(), (x,), "fwd+bwd")()
    assert torch.equal(gradient, torch.ones(5))


def test_several_results_are_differentiated_together():
    x = torch.randn(5, requires_grad=True)

    def function(x):
        return x * 2, x * 3

    (joint,) = directed(function, (x,), "bwd")()
    single = [directed(lambda x, i=i: function(x)[i], (x,), "bwd")()[0] for i in (0, 1)]
    torch.testing.assert_close(joint, single[0] + single[1])


@pytest.mark.parametrize("direction", ["bwd", "fwd+bwd"])
def test_results_without_a_gradient_are_left_out(direction):
    x = torch.randn(5, requires_grad=True)
    (gradient,) = directed(lambda x: (x.sum(), x.argmax()), (x,), direction)()
    assert torch.equal(gradient, torch.ones(5))


def test_a_backward_needs_an_input_to_differentiate():
    with pytest.raises(ValueError, match="no input requires grad, so there is no bwd to time"):
        directed(scale, (torch.ones(2), torch.ones(2)), "bwd")


@pytest.mark.parametrize("direction", ["fwd", "bwd", "fwd+bwd"])
def test_error_is_that_of_the_dtype_and_no_more(direction, device):
    assert 1e-4 < relative_error(scale, direction, device) < 2**-8

    def wrong(x, weight):
        return x * weight * 1.1

    assert relative_error(wrong, direction, device) == pytest.approx(0.1, rel=0.1)


def test_error_is_the_largest_over_gradients():
    def wrong_weight_gradient(x, weight):
        return x * (weight + 0.5 * (weight - weight.detach()))

    assert relative_error(wrong_weight_gradient, "fwd") < 2**-8
    assert relative_error(wrong_weight_gradient, "bwd") == pytest.approx(0.5, rel=0.02)


def test_a_nan_is_not_hidden_by_a_smaller_error():
    def nan_in_the_first_gradient(x, weight):
        return x * weight + (x - x.detach()) * torch.nan

    assert math.isnan(relative_error(nan_in_the_first_gradient, "bwd"))


def test_a_case_can_be_checked_on_smaller_inputs():
    seen = []

    def looking(x, weight):
        seen.append(x.shape[0])
        return scale(x, weight)

    def fewer(device, generator):
        return make_inputs(device, generator, rows=3)

    assert Oracle(case(check_inputs=fewer), "fwd", CPU).judge(looking).error < 2**-8
    assert seen == [3]
    assert case(check_inputs=fewer).inputs(CPU, seed=0)[0].shape[0] == ROWS


class InPlace(torch.autograd.Function):
    """x · weight that leaves its gradient where x was, and autograd unaware of it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, *grad_outputs):
        (dy,) = grad_outputs
        x, weight = ctx.saved_tensors
        dweight = (dy * x).sum(0)
        return x.data.copy_(dy * weight), dweight


@pytest.mark.parametrize(("direction", "overwrites"), [("fwd", False), ("bwd", True)])
def test_a_call_that_overwrites_its_inputs_is_noticed(direction, overwrites):
    verdict = Oracle(case(), direction, CPU).judge(InPlace.apply)
    assert verdict.overwrites == overwrites
    assert verdict.error < 2**-7
    assert not Oracle(case(), direction, CPU).judge(scale).overwrites


def test_overwritten_inputs_are_put_back_behind_autograds_back():
    kept, ours = (case().inputs(CPU, seed=0) for _ in range(2))
    call = directed(InPlace.apply, ours, "bwd")
    first = [t.clone() for t in call()]
    assert not torch.equal(ours[0], kept[0])
    restoring([ours], [kept])()
    assert torch.equal(ours[0], kept[0])
    for again, before in zip(call(), first, strict=True):
        assert torch.equal(again, before)
