import time

import pytest
import torch

from tilewright_bench.timer import Samples, time_interleaved, timer_for

CPU = torch.device("cpu")


def elapsed_on_device(call, count):
    """Seconds a call by one pair of events around many: no gaps, no overhead of events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / count


def test_more_work_takes_more_time(device):
    # Far enough apart for a busy machine: four numbers and four million, on a GPU 400 million.
    small = torch.randn(4, device=device)
    large = torch.randn(400_000_000 if device.type == "cuda" else 4_000_000, device=device)
    quick, slow = time_interleaved([small.sum, large.sum], device, seconds=0.02, min_rounds=10)
    assert slow.median > 5 * quick.median


def test_limits_of_rounds_hold():
    def nap():
        time.sleep(0.002)

    calls = 0

    def count():
        nonlocal calls
        calls += 1

    napping, counting = time_interleaved(
        [nap, count], CPU, seconds=0.004, min_rounds=10, max_rounds=40
    )
    assert len(napping.seconds) == 10  # two would have filled the time
    assert len(counting.seconds) == 40  # thousands would have fitted
    assert calls > 40, "warm-up calls are not among the timed ones"
    assert min(napping.seconds) >= 0.002


def test_functions_take_turns():
    order = []
    time_interleaved(
        [lambda: order.append("a"), lambda: order.append("b")],
        CPU,
        seconds=0.001,
        min_rounds=20,
        max_rounds=20,
    )
    # Two blocks each of one uncounted and ten timed calls, after the warm-up.
    assert "".join(order).endswith("a" * 11 + "b" * 11 + "a" * 11 + "b" * 11)


def test_median_ignores_an_interruption():
    samples = Samples(clock="x", seconds=(1.0, 1.1, 50.0), host_seconds=(2.0, 9.0, 2.5))
    assert samples.median == 1.1
    assert samples.host_median == 2.5


def test_the_clock_is_named(device):
    (samples,) = time_interleaved([lambda: None], device, seconds=0.001, min_rounds=1)
    assert samples.clock == ("cuda events" if device.type == "cuda" else "perf_counter")


def test_on_a_cpu_host_and_device_are_one():
    (samples,) = time_interleaved([lambda: None], CPU, seconds=0.001, min_rounds=1)
    assert samples.seconds == samples.host_seconds


@pytest.mark.gpu
def test_events_agree_with_a_long_run_of_copies():
    source = torch.randn(256 << 20, device="cuda")  # 1 GiB: half a millisecond a copy
    target = torch.empty_like(source)
    (samples,) = time_interleaved([lambda: target.copy_(source)], torch.device("cuda"), seconds=0.1)
    expected = elapsed_on_device(lambda: target.copy_(source), 100)
    assert samples.median == pytest.approx(expected, rel=0.05)


@pytest.mark.gpu
def test_the_hosts_delays_stay_out_of_device_time():
    x = torch.randn(1024, device="cuda")

    def slow_to_launch():
        time.sleep(3e-4)
        x.neg_()

    (samples,) = time_interleaved([slow_to_launch], torch.device("cuda"), seconds=0.01)
    assert samples.host_median > 3e-4
    assert samples.median < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calls": []}, "calls is empty"),
        ({"calls": [print], "min_rounds": 9, "max_rounds": 3}, "min_rounds 9 .* max_rounds 3"),
        ({"calls": [print], "min_rounds": 0}, "min_rounds 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        time_interleaved(arguments.pop("calls"), CPU, seconds=0.01, **arguments)


def test_a_device_without_a_timer_is_an_error():
    with pytest.raises(ValueError, match="device meta cannot be timed; use cuda or cpu"):
        timer_for(torch.device("meta"))
