import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch

from tilewright_bench import Case, Variant, Work, stopwatch, together
from tilewright_bench.together import (
    MATMUL_INTENSITY,
    fresh_compilers,
    measure_together,
    memory_of,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
ROWS, WIDTH = 24, 16
SIZE = ROWS * WIDTH


def scale(x, weight):
    return x * weight


def make_inputs(device, generator, rows=ROWS):
    options = {"device": device, "generator": generator, "dtype": torch.bfloat16}
    return (
        torch.randn(rows, WIDTH, **options).requires_grad_(),
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


def providers(direction: Any = "fwd", **functions):
    return {
        name: Variant(provider=name, direction=direction, build=lambda f=f: f)
        for name, f in functions.items()
    }


def measure(case, named, device=CPU, **options) -> dict[str, Any]:
    outcomes = measure_together(case, list(named.values()), device, **options)
    assert outcomes.keys() == set(named.values())
    return {name: outcomes[variant] for name, variant in named.items()}


def test_a_case_may_say_how_many_sets_of_inputs_there_are():
    seen: set[int] = set()

    def looking(x, weight):
        seen.add(x.data_ptr())
        return x * weight

    for sets in (1, 3):
        seen.clear()
        case = dataclasses.replace(SCALE, sets=sets)
        measured = measure(case, providers(ours=looking))["ours"]
        assert measured.measurement.input_sets == sets


def failing(x, weight):
    raise RuntimeError("out of luck")


def test_providers_are_timed_in_turns_over_the_same_inputs():
    order, seen = [], {"a": set(), "b": set()}

    def named(name):
        def function(x, weight):
            order.append(name)
            seen[name].add(x.data_ptr())
            return scale(x, weight)

        return function

    outcomes = measure(SCALE, providers(a=named("a"), b=named("b")))
    blocks = "".join(order[-66:])
    assert blocks in ("a" * 11 + "b" * 11) * 4, "blocks of one uncounted and ten counted calls"
    assert len(seen["a"] & seen["b"]) >= 2
    assert outcomes["a"].measurement.beside == ("b",)
    assert outcomes["b"].measurement.beside == ("a",)


def test_figures_fit_each_other():
    measured = measure(SCALE, providers("bwd", ours=scale))["ours"]
    info, median = measured.measurement, measured.samples.median
    assert info.bytes == 3 * SIZE * 2
    assert info.gb_per_s == pytest.approx(info.bytes / median / 1e9)
    assert info.tflop_per_s == pytest.approx(info.flops / median / 1e12)
    assert info.share_of_copy == pytest.approx(info.gb_per_s / info.copy_gb_per_s)
    assert (info.ceiling, info.share) == ("copy", info.share_of_copy)
    assert info.matmul_tflop_per_s is None
    assert info.result_bytes == 2 * (SIZE + WIDTH)
    assert info.error < torch.finfo(torch.bfloat16).eps


def test_much_arithmetic_is_measured_against_a_product():
    work = Work(bytes=SIZE, flops=1000 * MATMUL_INTENSITY * SIZE)
    info = measure(dataclasses.replace(SCALE, forward=work), providers(ours=scale))["ours"]
    info = info.measurement
    assert info.ceiling == "matmul"
    assert info.share == pytest.approx(info.tflop_per_s / info.matmul_tflop_per_s)
    assert info.share > info.share_of_copy


@pytest.mark.parametrize("timed", [True, False])
def test_one_failure_leaves_the_others_alone(timed):
    def unavailable():
        pytest.skip("not installed")

    named = providers(broken=failing, wrong=lambda x, w: x * w * 1.1, right=scale)
    named["absent"] = Variant(provider="absent", direction="fwd", build=unavailable)
    outcomes = measure(SCALE, named, timed=timed)
    assert str(outcomes["broken"]) == "out of luck"
    assert isinstance(outcomes["absent"], pytest.skip.Exception)
    assert isinstance(outcomes["wrong"], pytest.fail.Exception)
    assert "fwd-wrong of scale 24x16-bf16: error 0.1" in str(outcomes["wrong"])
    if timed:
        assert outcomes["right"].measurement.beside == ()
    else:
        assert outcomes["right"] is None


@pytest.mark.parametrize("calls_before", [1, 2, 4], ids=["first set", "second set", "warm-up"])
def test_a_provider_that_fails_late_is_left_out(calls_before):
    calls = 0

    def fails_later(x, weight):
        nonlocal calls
        calls += 1
        return scale(x, weight) if calls <= calls_before else failing(x, weight)

    outcomes = measure(SCALE, providers(late=fails_later, right=scale))
    assert str(outcomes["late"]) == "out of luck"
    assert outcomes["right"].samples.seconds


def test_a_provider_that_fails_between_the_blocks_is_left_out(monkeypatch):
    timing = False

    def fails_when_timed(x, weight):
        return failing(x, weight) if timing else scale(x, weight)

    def interleave(*args):
        nonlocal timing
        timing = True
        stopwatch.interleave(*args)

    monkeypatch.setattr(together, "interleave", interleave)
    outcomes = measure(SCALE, providers(late=fails_when_timed, right=scale))
    assert str(outcomes["late"]) == "out of luck"
    assert outcomes["right"].samples.seconds
    assert outcomes["right"].measurement.beside == ()


def test_a_nan_is_wrong():
    outcomes = measure(SCALE, providers(nan=lambda x, w: x * w * torch.nan))
    assert "error nan against float64" in str(outcomes["nan"])


def test_an_error_holds_no_tensors():
    alive = []

    def remember(tensor):
        alive.append(weakref.ref(tensor))
        return tensor

    def inputs(device, generator):
        return tuple(remember(t) for t in make_inputs(device, generator))

    def failing_with_a_tensor(x, weight):
        big = remember(x * 2)
        try:
            return big.view(-1, 7)
        except RuntimeError as error:
            raise ValueError("no such view") from error

    case = dataclasses.replace(SCALE, make_inputs=inputs)
    outcomes = measure(case, providers(broken=failing_with_a_tensor, right=scale))
    gc.collect()
    assert isinstance(outcomes["broken"], ValueError)
    (note,) = outcomes["broken"].__notes__
    assert "in failing_with_a_tensor\n    return big.view(-1, 7)" in note
    assert "ValueError: no such view" in note
    assert [ref() for ref in alive] == [None] * len(alive)


def test_a_provider_that_overwrites_gets_inputs_of_its_own():
    values = []

    def in_place(x, weight):
        values.append(x.detach().double().norm().item())
        with torch.no_grad():
            return x.data.mul_(weight)

    def looking(x, weight):
        values.append(x.detach().double().norm().item())
        return scale(x, weight)

    # In place on what it made in place before: without a reset the values would run away.
    assert not isinstance(measure(SCALE, providers(a=in_place))["a"], BaseException)
    assert max(values) < 10 * min(values)
    values.clear()
    outcomes = measure(SCALE, providers(a=in_place, b=looking))
    assert not any(isinstance(outcome, BaseException) for outcome in outcomes.values())
    assert max(values) < 10 * min(values)


def test_a_check_calls_what_will_be_timed():
    rows = []

    def looking(x, weight):
        rows.append(x.shape[0])
        return scale(x, weight)

    assert measure(SCALE, providers(ours=looking), timed=False) == {"ours": None}
    assert rows == [ROWS], "once, which both compares and compiles"
    rows.clear()
    small = dataclasses.replace(SCALE, check_inputs=lambda d, g: make_inputs(d, g, rows=3))
    assert measure(small, providers(ours=looking), timed=False) == {"ours": None}
    assert rows == [3, ROWS], "compared on few rows, compiled on all"


def test_memory_of_a_cpu_is_not_measured():
    x = torch.randn(8)
    assert memory_of(lambda: x * 2, (x,), CPU).peak_extra is None


def test_results_are_counted_once_and_views_of_inputs_are_not():
    x = torch.randn(8)

    def call():
        y = x * 2
        return y, y[:4], x[2:]

    assert memory_of(call, (x,), CPU).results == x.nbytes


@pytest.mark.gpu
def test_peak_memory_counts_results_and_temporaries():
    x = torch.randn(1 << 20, device="cuda")

    def call():
        temporary = x * 2
        return temporary + 1

    memory = memory_of(call, (x,), x.device)
    assert (memory.peak_extra, memory.results) == (2 * x.nbytes, x.nbytes)


@pytest.mark.gpu
def test_compiled_backwards_run_repeatedly():
    compiled = torch.compile(lambda x, w: torch.sin(x * w).exp(), dynamic=False)
    with fresh_compilers(CUDA, "bwd"):
        x, weight = SCALE.inputs(CUDA, seed=0)
        y = compiled(x, weight)
        first, second = (
            torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0] for _ in range(2)
        )
    angle, weight = (x * weight.double()).detach(), weight.detach().double()
    expected = torch.sin(angle).exp() * torch.cos(angle) * weight
    assert (first - expected).norm() < 0.02 * expected.norm()
    assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["fwd", "bwd", "fwd+bwd"])
def test_an_elementwise_kernel_runs_at_the_speed_of_a_copy(direction):
    """x · 2 moves what copy_ moves, and so does its backward."""
    case = doubling(32768, 4096)
    outcomes = measure(case, providers(direction, torch=double, compile=compiled()), CUDA)
    for outcome in outcomes.values():
        info = outcome.measurement
        assert info.share_of_copy == pytest.approx(1.0, abs=0.08)
        assert info.error < 1e-7
        assert info.clock == "cuda graph"


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_a_small_call_takes_the_time_of_its_kernel(direction):
    """1 MiB in, 1 MiB out: microseconds on the device, tens of them on the host."""
    outcome = measure(doubling(256, 1024), providers(direction, torch=double), CUDA)["torch"]
    info, median = outcome.measurement, outcome.samples.median
    assert info.clock == "cuda graph"
    assert median < 5e-6
    assert info.host_us > 2 * median * 1e6
    assert info.share_of_copy == pytest.approx(1.0, abs=0.35)


@pytest.mark.gpu
def test_a_provider_that_waits_is_timed_by_events_beside_a_copy_timed_so():
    def waits(x):
        x.sum().item()
        return double(x)

    outcomes = measure(doubling(4096, 4096), providers(torch=double, waits=waits), CUDA)
    assert outcomes["torch"].measurement.clock == "cuda graph"
    assert outcomes["waits"].measurement.clock == "cuda events"
    assert outcomes["waits"].measurement.share < outcomes["torch"].measurement.share


@pytest.mark.gpu
def test_a_group_leaves_no_memory_behind():
    before = torch.cuda.memory_allocated()
    named = providers("bwd", torch=double, broken=failing)
    measure(doubling(4096, 4096), named, CUDA)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


def doubling(rows, width):
    def inputs(device, generator):
        return (torch.randn(rows, width, device=device, generator=generator).requires_grad_(),)

    moved = Work(bytes=2 * rows * width * 4, flops=0)
    return Case(
        operator="double",
        shape=(rows, width),
        dtype=torch.float32,
        make_inputs=inputs,
        reference=double,
        forward=moved,
        backward=moved,
        forward_backward=moved + moved,
    )


def double(x):
    return x * 2


def compiled():
    return torch.compile(lambda x: x * 2, dynamic=False)
