from typing import Any

import pytest

from tilewright_bench.judge import Bar, judge
from tilewright_bench.rows import row_of


@pytest.fixture
def row(info):
    """A row of rms_norm's forward: (median in µs, provider, fields that differ) -> Row."""

    def make(microseconds, provider="tilewright", spread=0.0, **fields):
        median = microseconds * 1e-6
        stats = {"median": median, "iqr": spread * median}
        return row_of(stats, info(provider=provider, **fields))

    return make


def bar(**fields: Any) -> Bar:
    plain: dict[str, Any] = {
        "operators": ("rms_norm",),
        "cases": ("16384x4096-bf16",),
        "directions": ("fwd",),
        "quantity": "speed",
        "limit": 1.0,
    }
    return Bar(**(plain | fields))


def test_a_share_is_of_the_ceiling_that_bounds_the_case(row):
    (verdict,) = judge([bar(quantity="share", limit=0.95)], [row(70, share=0.949)])
    assert (verdict.value, verdict.met) == (0.949, False)
    product = [row(70, share=0.95, ceiling="matmul")]
    (verdict,) = judge([bar(quantity="share", limit=0.95)], product)
    assert (verdict.figures[0].beside, verdict.met) == ("matmul", True)


def test_speed_is_beside_the_best_of_the_peers(row):
    rows = [row(100), row(300, "torch"), row(150, "compile"), row(90, "liger")]
    (verdict,) = judge([bar(limit=1.5, peers=("torch", "compile"))], rows)
    assert verdict.value == pytest.approx(1.5)
    assert (verdict.figures[0].beside, verdict.met) == ("compile", True)
    (verdict,) = judge([bar(limit=1.5, peers=("torch", "liger"))], rows)
    assert (verdict.figures[0].beside, verdict.met) == ("liger", False)


@pytest.mark.parametrize(("spread", "met"), [(0.0, False), (0.015, False), (0.03, True)])
def test_a_miss_smaller_than_the_spread_of_either_is_none(row, spread, met):
    rows = [row(102), row(100, "torch", spread=spread)]
    assert judge([bar(peers=("torch",), noise=True)], rows)[0].met is met
    assert judge([bar(peers=("torch",))], rows)[0].met is False


@pytest.mark.parametrize(("spread", "met"), [(0.0, False), (0.05, True)])
def test_so_it_is_from_above(row, spread, met):
    rows = [row(1, host_us=104.0), row(1, "torch", spread=spread, host_us=100.0)]
    assert judge([bar(quantity="host", peers=("torch",), noise=True)], rows)[0].met is met
    assert judge([bar(quantity="host", peers=("torch",))], rows)[0].met is False


def test_host_time_and_memory_are_bounded_from_above(row):
    ours = row(1, host_us=130.0, peak_extra_bytes=30, result_bytes=20)
    rows = [ours, row(9, "torch", host_us=100.0, peak_extra_bytes=60, result_bytes=20)]
    bars = [
        bar(quantity=q, peers=("torch",), limit=n) for q in ("host", "memory") for n in (0.2, 2)
    ]
    verdicts = judge(bars, rows)
    assert [verdict.value for verdict in verdicts] == [1.3, 1.3, 0.25, 0.25]
    assert [verdict.met for verdict in verdicts] == [False, True, False, True]


@pytest.mark.parametrize(("ours", "theirs", "met"), [(0, 0, True), (8, 0, False), (0, 8, True)])
def test_no_memory_at_all_is_the_best(row, ours, theirs, met):
    sizes = {"tilewright": ours, "torch": theirs}
    rows = [row(1, name, peak_extra_bytes=size, result_bytes=0) for name, size in sizes.items()]
    (verdict,) = judge([bar(quantity="memory", peers=("torch",))], rows)
    assert verdict.met is met


@pytest.mark.parametrize("absent", ["tilewright", "torch", "compile"])
def test_without_ours_or_a_peer_nothing_is_said(row, absent):
    rows = [row(1, name) for name in ("tilewright", "torch", "compile") if name != absent]
    (verdict,) = judge([bar(peers=("torch", "compile"))], rows)
    assert (verdict.value, verdict.met) == (None, None)


def test_memory_that_was_not_measured_is_not_compared(row):
    rows = [row(1, peak_extra_bytes=None), row(1, "torch")]
    assert judge([bar(quantity="memory", peers=("torch",))], rows)[0].met is None


def test_to_run_is_to_be_measured(row):
    (verdict,) = judge([bar(quantity="runs", limit=0.0)], [row(70)])
    assert (verdict.value, verdict.met) == (pytest.approx(70e-6), True)
    assert judge([bar(quantity="runs", limit=0.0)], [row(70, "torch")])[0].met is None


def test_another_provider_of_ours_can_be_judged(row):
    rows = [row(100), row(160, "deterministic"), row(80, "torch")]
    slower = bar(limit=0.5, provider="deterministic", peers=("torch",))
    faster, other = judge([bar(limit=0.5, peers=("torch",)), slower], rows)
    assert (faster.value, other.value) == (0.8, pytest.approx(0.5))
    assert faster.place != other.place
    assert judge([slower], [rows[0], rows[2]])[0].met is None


def test_a_rate_is_beside_that_of_another_operator_or_case(row):
    there = {"operator": "swiglu", "case": "8x8-bf16"}
    rows = [row(1, tflop_per_s=86.0), row(1, "torch", tflop_per_s=999.0)]
    rows += [row(1, tflop_per_s=100.0, **there), row(1, "torch", tflop_per_s=10.0, **there)]
    wanted = {"quantity": "rate", "limit": 0.87, "than": ("swiglu", "8x8-bf16")}
    (verdict,) = judge([bar(**wanted)], rows)
    assert (verdict.value, verdict.met) == (0.86, False)
    for absent in (0, 2):
        assert judge([bar(**wanted)], rows[:absent] + rows[absent + 1 :])[0].met is None
    rows[2] = row(1, tflop_per_s=100.0, **there, direction="bwd")
    assert judge([bar(**wanted)], rows)[0].met is None


def test_a_part_is_of_the_time_elsewhere(row):
    there = {"operator": "swiglu", "case": "8x8-bf16"}
    rows = [row(3), row(1, "torch"), row(100, **there), row(10, "torch", **there)]
    wanted = {"quantity": "part", "than": ("swiglu", "8x8-bf16")}
    for limit, met in ((0.031, True), (0.029, False)):
        (verdict,) = judge([bar(limit=limit, **wanted)], rows)
        assert (verdict.value, verdict.met) == (pytest.approx(0.03), met)
    assert judge([bar(limit=0.03, **wanted)], rows[:2])[0].met is None


@pytest.fixture
def products(row):
    """Eight cases at 0.8, 0.9, … 1.5 times the speed of torch, forward and backward in turns."""
    found = []
    for i in range(8):
        place = {"case": f"8x{i + 1}-bf16", "direction": ("fwd", "bwd")[i % 2]}
        found += [row(10, **place), row(8 + i, "torch", **place)]
    return found


def test_all_cases_can_be_judged_together(products):
    def verdict(over, limit):
        everywhere = {"cases": (), "directions": ("fwd", "bwd"), "peers": ("torch",)}
        (found,) = judge([bar(over=over, limit=limit, **everywhere)], products)
        return found

    assert verdict("least", 0.8).value == pytest.approx(0.8)
    assert not verdict("least", 0.81).met
    # exp(mean(log(0.8 … 1.5)))
    assert verdict("mean", 1.12).value == pytest.approx(1.1266, abs=1e-4)
    assert verdict("mean", 1.12).met
    assert not verdict("mean", 1.13).met
    assert verdict("quarter", 1.35).value == 0.25
    assert verdict("quarter", 1.35).met
    assert not verdict("quarter", 1.45).met


def test_cases_are_not_judged_together_before_all_are_measured(products):
    everywhere = {"cases": (), "directions": ("fwd", "bwd"), "peers": ("torch",)}
    (verdict,) = judge([bar(over="least", limit=0.1, **everywhere)], products[:-1])
    assert verdict.met is None
    (verdict,) = judge([bar(over="least", limit=0.1, **everywhere)], [])
    assert verdict.met is None


def test_verdicts_of_one_place_stand_together(row):
    rows = [row(1, direction=direction) for direction in ("fwd", "bwd")]
    bars = [
        bar(operators=("rms_norm", "swiglu"), directions=("fwd", "bwd"), quantity="runs"),
        bar(quantity="share", limit=0.5),
    ]
    found = [(v.operators[0], v.direction, v.bar.quantity) for v in judge(bars, rows)]
    assert found == [
        ("rms_norm", "fwd", "runs"),
        ("rms_norm", "fwd", "share"),
        ("rms_norm", "bwd", "runs"),
        ("swiglu", "fwd", "runs"),
        ("swiglu", "bwd", "runs"),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantity": "latency"}, "quantity 'latency' is none of 'share', 'speed', 'host'"),
        ({"over": "all"}, "over 'all' is none of 'each', 'least', 'mean', 'quarter'"),
        ({"quantity": "speed"}, r"'speed' needs peers, and \(\) are given"),
        ({"quantity": "share", "peers": ("torch",)}, "'share' needs no peers, and .*torch"),
        ({"quantity": "rate"}, "'rate' and 'part' need than, and others none: 'rate', None"),
        ({"quantity": "part"}, "'rate' and 'part' need than, and others none: 'part', None"),
        ({"peers": ("torch",), "than": ("a", "b")}, "need than, and others none: 'speed'"),
        ({"peers": ("torch",), "over": "mean", "noise": True}, "over 'mean' .* without noise"),
        ({"quantity": "host", "peers": ("torch",), "over": "least"}, "over 'least' is for"),
    ],
)
def test_bars_that_say_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        bar(**fields)
