import dataclasses
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tilewright_bench import Case, Measurement, Variant, Work, run
from tilewright_bench.clock import device_clock
from tilewright_bench.measure import Group, selected

CPU = torch.device("cpu")


def scale(x, weight):
    return x * weight


def make_inputs(device, generator):
    options = {"device": device, "generator": generator, "dtype": torch.bfloat16}
    return tuple(torch.randn(24, 16, **options).requires_grad_() for _ in range(2))


SCALE = Case(
    operator="scale",
    shape=(24, 16),
    dtype=torch.bfloat16,
    make_inputs=make_inputs,
    reference=scale,
    forward=Work(bytes=1536, flops=384),
    backward=Work(bytes=2304, flops=1152),
)


def variant(function, provider="torch", direction: Any = "fwd"):
    return Variant(provider=provider, direction=direction, build=lambda: function)


@pytest.mark.smoke
@pytest.mark.benchmark(timer=device_clock)
def test_run_records_times_and_a_measurement(benchmark):
    run(benchmark, SCALE, variant(scale, direction="bwd"))
    info = benchmark.extra_info
    assert set(info) == {field.name for field in dataclasses.fields(Measurement)}
    assert benchmark.group == "scale 24x16-bf16 bwd"
    assert benchmark.params == {"case": "24x16-bf16", "direction": "bwd", "provider": "torch"}
    median = benchmark.stats["median"]
    assert info["gb_per_s"] == pytest.approx(2304 / median / 1e9, rel=1e-6)


def test_compared_packages_do_not_run_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(pytest.skip.Exception, match="liger: compared on a GPU only"):
        run(Mock(), SCALE, variant(scale, provider="liger"))


def test_a_disabled_session_checks_the_result_once():
    calls = []

    def counting(x, weight):
        calls.append(x)
        return scale(x, weight)

    benchmark = Mock(disabled=True, extra_info={})
    run(benchmark, SCALE, variant(counting))
    assert len(calls) == 1
    benchmark.pedantic.assert_called_once()
    assert benchmark.extra_info == {}


@pytest.mark.parametrize("factor", [1.1, torch.nan])
def test_a_wrong_result_fails_the_benchmark(factor):
    with pytest.raises(pytest.fail.Exception, match="fwd-torch of scale 24x16-bf16: error"):
        run(Mock(), SCALE, variant(lambda x, weight: x * weight * factor))


def test_the_first_of_a_group_measures_the_others_and_each_hears_of_its_own(monkeypatch):
    ours, theirs = variant(scale, "tilewright"), variant(lambda x, weight: x, "torch")
    monkeypatch.setitem(selected, "bench_scale[a]", group := Group(SCALE, [ours, theirs]))
    monkeypatch.setitem(selected, "bench_scale[b]", group)
    measured = []
    monkeypatch.setattr(
        "tilewright_bench.measure.measure_together",
        lambda case, variants, device, *, timed: (
            measured.append(variants) or {ours: None, theirs: ValueError("theirs")}
        ),
    )
    run(Mock(fullname="bench_scale[a]", disabled=True), SCALE, ours)
    with pytest.raises(ValueError, match="theirs"):
        run(Mock(fullname="bench_scale[b]", disabled=True), SCALE, theirs)
    assert measured == [[ours, theirs]]
    run(Mock(fullname="bench_scale[a]", disabled=True), SCALE, ours)
    assert len(measured) == 2, "asked again, it measures again"


def test_a_group_holds_no_provider_that_a_cpu_does_not_run():
    calls = []

    def refused(x, weight):
        calls.append(x)
        return scale(x, weight)

    ours, theirs = variant(scale), variant(refused, "liger")
    assert Group(SCALE, [ours, theirs]).result(ours, CPU, timed=False) is None
    assert not calls
