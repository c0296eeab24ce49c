import statistics

import pytest

from tilewright_bench.clock import DeviceClock, device_clock, replay


def test_the_clock_moves_only_when_told_to():
    clock = DeviceClock()
    assert (clock(), clock()) == (0.0, 0.0)
    clock.advance(0.25)
    assert clock() == 0.25


@pytest.mark.benchmark(timer=device_clock)
def test_replayed_samples_are_what_pytest_benchmark_records(benchmark):
    samples = [3e-6, 1e-6, 7.0]
    replay(benchmark, samples)
    assert benchmark.stats["median"] == pytest.approx(statistics.median(samples), rel=1e-6)
    assert benchmark.stats["rounds"] == 3
    assert benchmark.stats["max"] == pytest.approx(7.0)


def test_another_timer_is_an_error_that_names_the_remedy(benchmark):
    with pytest.raises(RuntimeError, match=r"--benchmark-timer=.*\.device_clock"):
        replay(benchmark, [1.0])
