import dataclasses
import math
from unittest.mock import Mock

import pytest
import torch

from tilewright_bench import Case, Measurement, Variant, Work, run
from tilewright_bench.clock import device_clock
from tilewright_bench.measure import (
    L2_MULTIPLE,
    MAX_INPUT_SETS,
    copies,
    directed,
    fresh_compilers,
    input_sets,
    peak_extra_bytes,
    relative_error,
    rotating,
)

CPU = torch.device("cpu")
ROWS, WIDTH = 24, 16
SIZE = ROWS * WIDTH


def scale(x, weight):
    return x * weight


def make_inputs(device, generator):
    options = {"device": device, "generator": generator, "dtype": torch.bfloat16}
    return (
        torch.randn(ROWS, WIDTH, **options).requires_grad_(),
        torch.randn(WIDTH, **options).requires_grad_(),
    )


SCALE = Case(
    operator="scale",
    shape=(ROWS, WIDTH),
    dtype=torch.bfloat16,
    make_inputs=make_inputs,
    reference=scale,
    forward=Work(bytes=2 * SIZE * 2, flops=SIZE),
    backward=Work(bytes=3 * SIZE * 2, flops=3 * SIZE),
)


@pytest.mark.smoke
@pytest.mark.benchmark(timer=device_clock)
def test_run_records_times_and_a_measurement(benchmark):
    run(benchmark, SCALE, Variant(provider="torch", direction="bwd", build=lambda: scale))
    info = benchmark.extra_info
    assert set(info) == {field.name for field in dataclasses.fields(Measurement)}
    assert benchmark.group == "scale 24x16-bf16 bwd"
    assert benchmark.params == {"case": "24x16-bf16", "direction": "bwd", "provider": "torch"}
    median = benchmark.stats["median"]
    assert info["bytes"] == 3 * SIZE * 2
    assert info["gb_per_s"] == pytest.approx(info["bytes"] / median / 1e9, rel=1e-6)
    assert info["tflop_per_s"] == pytest.approx(info["flops"] / median / 1e12, rel=1e-6)
    assert info["share_of_copy"] == pytest.approx(info["gb_per_s"] / info["copy_gb_per_s"])
    assert info["error"] < torch.finfo(torch.bfloat16).eps


def test_compared_packages_do_not_run_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    variant = Variant(provider="liger", direction="fwd", build=lambda: scale)
    with pytest.raises(pytest.skip.Exception, match="liger: compared on a GPU only"):
        run(Mock(), SCALE, variant)


def test_a_disabled_session_checks_the_result_once():
    calls = []

    def counting(x, weight):
        calls.append(x)
        return scale(x, weight)

    benchmark = Mock(disabled=True, extra_info={})
    run(benchmark, SCALE, Variant(provider="torch", direction="fwd", build=lambda: counting))
    assert len(calls) == 1
    benchmark.pedantic.assert_called_once()
    assert benchmark.extra_info == {}


def test_directions_compute_results_and_gradients(device):
    x, weight = SCALE.inputs(device, seed=3)
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


def test_a_backward_needs_an_input_to_differentiate():
    with pytest.raises(ValueError, match="no input requires grad, so there is no bwd to time"):
        directed(scale, (torch.ones(2), torch.ones(2)), "bwd")


@pytest.mark.parametrize("direction", ["fwd", "bwd", "fwd+bwd"])
def test_error_is_that_of_the_dtype_and_no_more(direction, device):
    assert 1e-4 < relative_error(scale, SCALE, direction, device) < 2**-8

    def wrong(x, weight):
        return x * weight * 1.1

    assert relative_error(wrong, SCALE, direction, device) == pytest.approx(0.1, rel=0.1)


def test_a_nan_is_not_hidden_by_a_smaller_error():
    def nan_in_the_first_gradient(x, weight):
        return x * weight + (x - x.detach()) * torch.nan

    assert math.isnan(relative_error(nan_in_the_first_gradient, SCALE, "bwd", CPU))


@pytest.mark.parametrize("factor", [1.1, torch.nan])
def test_a_wrong_result_fails_the_benchmark(factor):
    variant = Variant(
        provider="torch", direction="fwd", build=lambda: lambda x, weight: x * weight * factor
    )
    with pytest.raises(pytest.fail.Exception, match="fwd-torch of scale 24x16-bf16: error"):
        run(Mock(), SCALE, variant)


def test_error_is_the_largest_over_gradients():
    def wrong_weight_gradient(x, weight):
        return x * (weight + 0.5 * (weight - weight.detach()))

    assert relative_error(wrong_weight_gradient, SCALE, "fwd", CPU) < 2**-8
    assert relative_error(wrong_weight_gradient, SCALE, "bwd", CPU) == pytest.approx(0.5, rel=0.02)


def test_input_sets_exceed_the_cache(monkeypatch):
    class Properties:
        L2_cache_size = 60_000_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    cuda = torch.device("cuda", 0)
    for traffic in (1_000_000, 59_999_999, 134_217_728):
        sets = input_sets(traffic, cuda)
        assert traffic * (sets - 1) < L2_MULTIPLE * Properties.L2_cache_size <= traffic * sets
    assert input_sets(1 << 32, cuda) == 1, "larger than any cache: one set will do"
    assert input_sets(1, cuda) == MAX_INPUT_SETS


def test_calls_rotate():
    seen = []
    call = rotating([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(7):
        call()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_copies_move_the_bytes_they_are_asked_for(device):
    first, second = copies(6000, 2, device)
    target, other = first(), second()
    assert target.nbytes == 3000, "each byte is read and written"
    assert target.data_ptr() != other.data_ptr()
    assert len(target.unique()) > 200, "random bytes, not zeros"


def test_memory_of_a_cpu_is_not_measured():
    assert peak_extra_bytes(lambda: None, CPU) is None


@pytest.mark.gpu
def test_peak_memory_counts_results_and_temporaries():
    x = torch.randn(1 << 20, device="cuda")

    def call():
        temporary = x * 2
        return temporary + 1

    assert peak_extra_bytes(call, x.device) == 2 * x.nbytes


@pytest.mark.gpu
def test_compiled_backwards_run_repeatedly():
    cuda = torch.device("cuda")
    with fresh_compilers(cuda, "bwd"):
        compiled = torch.compile(lambda x, w: torch.sin(x * w).exp(), dynamic=False)
        call = directed(compiled, SCALE.inputs(cuda, seed=0), "bwd")
        for a, b in zip(call(), call(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.benchmark(timer=device_clock)
@pytest.mark.parametrize("direction", ["fwd", "bwd", "fwd+bwd"])
def test_an_elementwise_kernel_runs_at_the_speed_of_a_copy(benchmark, direction):
    """x · 2 moves what copy_ moves, and so does its backward."""
    rows = 32768

    def inputs(device, generator):
        return (torch.randn(rows, 4096, device=device, generator=generator).requires_grad_(),)

    moved = Work(bytes=2 * rows * 4096 * 4, flops=0)
    case = Case(
        operator="double",
        shape=(rows, 4096),
        dtype=torch.float32,
        make_inputs=inputs,
        reference=lambda x: x * 2,
        forward=moved,
        backward=moved,
        forward_backward=moved + moved,
    )
    run(benchmark, case, Variant(provider="torch", direction=direction, build=lambda: _double))
    assert benchmark.extra_info["share_of_copy"] == pytest.approx(1.0, abs=0.08)
    assert benchmark.extra_info["error"] < 1e-7
    assert benchmark.extra_info["clock"] == "cuda events"


def _double(x):
    return x * 2
