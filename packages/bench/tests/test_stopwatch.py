import time

import pytest
import torch

from tilewright_bench.stopwatch import (
    MAX_GRAPH_CALLS,
    SAMPLE_SECONDS,
    Rotation,
    Samples,
    rotating,
    time_interleaved,
)
from tilewright_bench.timer import side_stream, timer_for

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


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
    rotations = [Rotation([small.sum]), Rotation([large.sum])]
    quick, slow = time_interleaved(rotations, device, seconds=0.02, min_rounds=10)
    assert slow.median > 5 * quick.median


def test_limits_of_rounds_hold():
    def nap():
        time.sleep(0.002)

    calls = 0

    def count():
        nonlocal calls
        calls += 1

    napping, counting = time_interleaved(
        [Rotation([nap]), Rotation([count])], CPU, seconds=0.004, min_rounds=10, max_rounds=40
    )
    assert 10 <= len(napping.seconds) < 15  # two would have filled the time; blocks are whole
    assert len(counting.seconds) == 40  # thousands would have fitted
    assert calls > 40, "warm-up calls are not among the timed ones"
    assert min(napping.seconds) >= 0.002


def test_functions_take_turns():
    order = []
    time_interleaved(
        [Rotation([lambda: order.append("a")]), Rotation([lambda: order.append("b")])],
        CPU,
        seconds=0.001,
        min_rounds=20,
        max_rounds=20,
    )
    # Two blocks each of one uncounted and ten timed calls, after the warm-up.
    assert "".join(order).endswith("a" * 11 + "b" * 11 + "a" * 11 + "b" * 11)


def test_calls_of_a_rotation_run_in_turn():
    seen = []
    call = rotating([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(7):
        call()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_a_reset_runs_before_each_sample_outside_its_time():
    state = [0]
    seen = []

    def call():
        seen.append(state[0])
        state[0] += 1

    def reset():
        time.sleep(0.002)
        state[0] = 0

    (samples,) = time_interleaved(
        [Rotation([call], reset)], CPU, seconds=0.001, min_rounds=5, max_rounds=5
    )
    assert seen[-5:] == [0] * 5
    assert samples.median < 0.001


def test_median_ignores_an_interruption():
    samples = Samples(clock="x", calls=1, seconds=(1.0, 1.1, 50.0), host_seconds=(2.0, 9.0, 2.5))
    assert samples.median == 1.1
    assert samples.host_median == 2.5


def test_on_a_cpu_host_and_device_are_one():
    (samples,) = time_interleaved([Rotation([int])], CPU, seconds=0.001, min_rounds=1)
    assert samples.seconds == samples.host_seconds
    assert (samples.clock, samples.calls) == ("perf_counter", 1)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "events"])
def test_device_times_agree_with_a_long_run(graph):
    source = torch.randn(256 << 20, device="cuda")  # 1 GiB: half a millisecond a call
    target = torch.empty_like(source)

    def call():
        torch.neg(source, out=target)

    (samples,) = time_interleaved([Rotation([call])], CUDA, seconds=0.1, graph=graph)
    assert samples.median == pytest.approx(elapsed_on_device(call, 100), rel=0.05)
    assert samples.clock == ("cuda graph" if graph else "cuda events")


@pytest.mark.gpu
def test_the_hosts_delays_stay_out_of_device_time():
    x = torch.randn(1024, device="cuda")

    def slow_to_launch():
        time.sleep(3e-4)
        x.neg_()

    for graph in (True, False):
        (samples,) = time_interleaved([Rotation([slow_to_launch])], CUDA, seconds=0.01, graph=graph)
        assert samples.host_median > 3e-4
        assert samples.median < (5e-6 if graph else 1e-4)


@pytest.mark.gpu
def test_short_calls_fill_a_graph_with_whole_rotations():
    tensors = [torch.randn(1024, device="cuda") for _ in range(7)]
    (samples,) = time_interleaved([Rotation([x.neg_ for x in tensors])], CUDA, seconds=0.01)
    assert samples.calls % 7 == 0
    assert samples.calls <= MAX_GRAPH_CALLS
    assert SAMPLE_SECONDS / 5 < samples.calls * samples.median < 2 * SAMPLE_SECONDS


@pytest.mark.gpu
def test_a_backward_is_captured():
    x = torch.randn(1 << 20, device="cuda", requires_grad=True)
    with side_stream(CUDA):
        y = x.sin()
        (samples,) = time_interleaved(
            [Rotation([lambda: torch.autograd.grad(y, x, y.detach(), retain_graph=True)])],
            CUDA,
            seconds=0.01,
        )
    assert samples.clock == "cuda graph"


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["item", "synchronize", "raise"])
def test_what_cannot_be_captured_is_timed_by_events_and_leaves_nothing_behind(how):
    x = torch.randn(1 << 24, device="cuda")

    def waits():
        result = (x * 2).sum()
        if how == "item":
            result.item()  # torch can tell beforehand
        elif how == "synchronize":
            torch.cuda.synchronize()  # only the capture itself fails
        elif torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not in a graph")

    def reserved_for_nothing():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def capturable():
        return torch.rand_like(x).sum()

    before = reserved_for_nothing()
    waiting, running = time_interleaved(
        [Rotation([waits]), Rotation([capturable])], CUDA, seconds=0.01
    )
    assert (waiting.clock, running.clock) == ("cuda events", "cuda graph")
    assert 0 < torch.rand((), device="cuda") < 1, "the random generator has survived"
    assert reserved_for_nothing() <= before + (32 << 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotations": []}, "rotations is empty"),
        ({"min_rounds": 9, "max_rounds": 3}, "min_rounds 9 .* max_rounds 3"),
        ({"min_rounds": 0}, "min_rounds 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    arguments = {"rotations": [Rotation([int])]} | arguments
    with pytest.raises(ValueError, match=message):
        time_interleaved(device=CPU, seconds=0.01, **arguments)


def test_a_rotation_without_calls_is_an_error():
    with pytest.raises(ValueError, match="calls is empty"):
        Rotation([])


def test_a_device_without_a_timer_is_an_error():
    with pytest.raises(ValueError, match="device meta cannot be timed; use cuda or cpu"):
        timer_for(torch.device("meta"))
