"""The simulator against arithmetic done by hand, and against steps measured on 2 and 4 GPUs."""

from typing import Any

import pytest

from tilewright_dist.planning import Cluster, Layer, Link, Workload, held_bytes, plan, table

MB = 2**20


def cluster(**changes: Any) -> Cluster:
    values: dict[str, Any] = {
        "gpus_per_host": 8,
        "inside": Link(bandwidth=100e9),
        "between": Link(bandwidth=25e9),
    }
    return Cluster(**(values | changes))


def workload(layers=8, parameters=10**7, **changes: Any) -> Workload:
    values: dict[str, Any] = {"forward": 0.04, "backward": 0.08, "optimizer": 0.01}
    return Workload(layers=[Layer(parameters=parameters)] * layers, **(values | changes))


def test_one_gpu_sends_nothing():
    for scheme in ("ddp", "zero1", "zero3"):
        alone = plan(workload(), cluster(), 1, scheme)
        assert alone.step == pytest.approx(0.13)
        assert (alone.exposed, alone.sent_bytes) == (pytest.approx(0.0), 0.0)
        assert alone.held_bytes == 16 * 8 * 10**7


def test_all_but_the_last_bucket_hides_under_backward():
    # A layer computes for 10 ms and sends 40 MB at 2 (W-1)/W: 0.6 ms. Only the last one's shows.
    ddp = plan(workload(), cluster(), 4, "ddp")
    assert ddp.exposed == pytest.approx(1.5 * 40e6 / 100e9)
    assert ddp.communication == pytest.approx(8 * 1.5 * 40e6 / 100e9)
    assert ddp.sent_bytes == pytest.approx(1.5 * 4 * 8 * 10**7)


def test_what_a_slow_link_exposes():
    # 8 layers of 60 ms of communication behind 10 ms of backward.
    ddp = plan(workload(), cluster(inside=Link(bandwidth=1e9)), 4, "ddp")
    assert ddp.exposed == pytest.approx(0.01 + 8 * 0.06 - 0.08)


def test_interference_counts_hidden_seconds():
    quiet = plan(workload(), cluster(), 4, "ddp")
    disturbed = plan(workload(), cluster(interference=0.5), 4, "ddp")
    hidden = quiet.communication - quiet.exposed
    assert disturbed.exposed == pytest.approx(quiet.exposed + 0.5 * hidden)


def test_zero1_sends_as_much_and_divides_the_step():
    ddp, zero1 = (plan(workload(), cluster(), 4, s) for s in ("ddp", "zero1"))
    assert zero1.sent_bytes == pytest.approx(ddp.sent_bytes)
    assert zero1.computation == pytest.approx(ddp.computation - 0.0075)
    # The last reduce-scatter and the first all-gather.
    assert zero1.exposed == pytest.approx(2 * 0.75 * 40e6 / 100e9)


def test_zero3_sends_half_as_much_again():
    ddp, zero3 = (plan(workload(), cluster(), 4, s) for s in ("ddp", "zero3"))
    assert zero3.sent_bytes == pytest.approx(1.5 * ddp.sent_bytes)
    # First gather of forward and of backward, last reduce-scatter.
    assert zero3.exposed == pytest.approx(3 * 0.75 * 40e6 / 100e9)


def test_between_hosts_a_gpu_sends_its_part():
    # 2 hosts of 8: 7/8 of 40 MB inside, half of an eighth of it between; twice.
    wide = plan(workload(layers=1), cluster(), 16, "ddp")
    inside, between = 7 / 8 * 40e6, 0.5 * 40e6 / 8
    assert wide.sent_bytes == pytest.approx(2 * (inside + between))
    assert wide.exposed == pytest.approx(2 * (inside / 100e9 + between / 25e9))


def test_latency_makes_small_buckets_dear():
    slow = cluster(inside=Link(bandwidth=100e9, latency=1e-3))
    few = plan(workload(bucket_bytes=400 * MB), slow, 4, "ddp")
    many = plan(workload(bucket_bytes=MB), slow, 4, "ddp")
    assert many.communication > few.communication


def test_memory_is_the_arithmetic_of_bytes_a_parameter():
    model = workload(weight_bytes=2, gradient_bytes=2, state_bytes=12)
    n = model.parameters
    assert held_bytes(model, 4, "ddp") == 16 * n
    assert held_bytes(model, 4, "zero1") == 7 * n
    assert held_bytes(model, 4, "zero3") == 4 * n + 10**7 * (2 * 4 + 2)


# A decoder of 503 M parameters (16 layers of 28 M, a tied embedding of 50 M first), batch 4 x 2048
# a GPU, float32 gradients, on H200s: torch's DistributedDataParallel, fused AdamW 4.1 ms.
# ms alone, at 2 and at 4 GPUs.
MEASURED = {
    "eager": ((70.4, 76.2), (70.2, 77.6)),
    "compiled whole": ((53.9, 61.5), (54.0, 63.1)),
    "compiled blocks": ((57.0, 64.8), (57.0, 67.0)),
}


def decoder(step_ms):
    computing = (step_ms - 4.1) * 1e-3
    # The head, which is the embedding's weight, computes for a tenth of the pass.
    layers = [Layer(parameters=50_331_648, share=0.1)]
    layers += [Layer(parameters=28_314_624, share=0.9 / 16)] * 16
    return Workload(
        layers=layers, forward=computing / 3, backward=computing * 2 / 3, optimizer=4.1e-3
    )


def h200(bus_gb_per_s, interference):
    link = Link(bandwidth=bus_gb_per_s * 1e9, latency=20e-6)
    return Cluster(gpus_per_host=8, inside=link, between=link, interference=interference)


@pytest.mark.parametrize("mode", MEASURED)
def test_four_gpus_from_what_two_measured(mode):
    (alone_2, two), (alone_4, four) = MEASURED[mode]
    quiet = plan(decoder(alone_2), h200(330, 0.0), 2, "ddp")
    # Interference is what two GPUs show beyond waiting.
    hidden = quiet.communication - quiet.exposed
    interference = ((two - alone_2) * 1e-3 - quiet.exposed) / hidden
    predicted = plan(decoder(alone_4), h200(355, interference), 4, "ddp")
    assert predicted.step * 1e3 == pytest.approx(four, rel=0.02)
    assert predicted.exposed * 1e3 == pytest.approx(four - alone_4, rel=0.15)


@pytest.mark.parametrize(
    ("scheme", "world_size", "gib"), [("ddp", 4, 7.58), ("zero1", 2, 5.70), ("zero1", 4, 4.76)]
)
def test_memory_is_what_torch_was_measured_to_hold(scheme, world_size, gib):
    held = held_bytes(decoder(70.0), world_size, scheme) / 2**30
    assert held == pytest.approx(gib, rel=0.03)


def test_table_has_a_line_a_prediction():
    lines = table(plan(workload(), cluster(), n, "zero1") for n in (1, 2, 4)).splitlines()
    assert len(lines) == 4
    assert lines[1].split()[:2] == ["zero1", "1"]


def test_what_cannot_be_is_refused():
    scheme: Any = "zero2"
    with pytest.raises(ValueError, match="unknown scheme 'zero2'; valid: 'ddp'"):
        plan(workload(), cluster(), 2, scheme)
    with pytest.raises(ValueError, match="world_size 12 is not a multiple of gpus_per_host 8"):
        plan(workload(), cluster(), 12, "ddp")
    with pytest.raises(ValueError, match="gpus_per_host must be at least 1"):
        cluster(gpus_per_host=0)
    with pytest.raises(ValueError, match="bandwidths must be positive"):
        cluster(inside=Link(bandwidth=0))
