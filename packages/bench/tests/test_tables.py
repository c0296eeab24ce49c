from typing import Any

from tilewright_bench.judge import Bar, judge
from tilewright_bench.rows import row_of
from tilewright_bench.tables import bars_summary, bars_table, full_table, summary_table


def row(info, median, **fields):
    return row_of({"median": median, "iqr": 0.0}, info(**fields))


def test_a_table_holds_every_provider_beside_ours(info):
    rows = [
        row(info, 103.21e-6, provider="compile", share=0.651, error=0.0021),
        row(info, 68.61e-6),
        row(info, 2.5e-3, direction="bwd", provider="liger", clock="cuda events"),
    ]
    assert full_table(rows).splitlines() == [
        "| shape | direction | provider | µs | GB/s | of copy | × ours | host µs | extra MiB "
        "| error |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| 16384×4096 bf16 | forward | tilewright | 68.6 | 3912 | 95 % | | 21 | 2 | 1.6e-03 |",
        "| | | torch.compile | 103 | 3912 | 65 % | 1.50 | 21 | 2 | 2.1e-03 |",
        "| | backward | Liger-Kernel | 2500 † | 3912 | 95 % | | 21 | 2 | 1.6e-03 |",
    ]


def test_a_ceiling_that_is_no_copy_is_named_beside_its_share(info):
    product = row(info, 1e-3, ceiling="matmul", tflop_per_s=471.3, share=0.67)
    copy = row(info, 2e-3, provider="torch", tflop_per_s=235.0)
    header, _, *lines = full_table([product, copy]).splitlines()
    assert "| TFLOP/s | of ceiling |" in header
    assert "| 471 | 67 % of matmul |" in lines[0]
    assert "| 235 | 95 % |" in lines[1]
    assert "| 1000 (67 % of matmul) | 2000 (95 %) |" in summary_table([[product, copy]])


def test_a_summary_has_a_column_a_provider(info):
    forward = [row(info, 68.61e-6), row(info, 82e-6, provider="torch", share=0.8)]
    adamw = [row(info, 3.35e-3, operator="adamw", provider="fused", case="130x50-fp32")]
    assert summary_table([forward, adamw]).splitlines() == [
        "| µs | tilewright | torch | fused |",
        "| --- | ---: | ---: | ---: |",
        "| `rms_norm` 16384×4096 bf16 forward | 68.6 (95 %) | 82 (80 %) | |",
        "| `adamw` 130×50 fp32 forward | | | 3350 (95 %) |",
    ]


def test_bars_stand_beside_their_figures(info):
    rows = [
        row(info, 100e-6, share=0.94996, host_us=130.1),
        row(info, 150.9e-6, provider="torch", host_us=100.0, peak_extra_bytes=None),
        row(info, 98.9e-6, provider="liger"),
    ]
    here: dict[str, Any] = {
        "operators": ("rms_norm",),
        "cases": ("16384x4096-bf16",),
        "directions": ("fwd",),
    }
    bars = [
        Bar(quantity="share", limit=0.95, **here),
        Bar(quantity="speed", limit=1.0, peers=("torch", "liger"), noise=True, **here),
        Bar(quantity="speed", limit=1.5, peers=("torch",), **here),
        Bar(quantity="host", limit=1.3, peers=("torch",), **here),
        Bar(quantity="memory", limit=1.0, peers=("torch",), **here),
        Bar(quantity="runs", operators=("rms_norm",), directions=("fwd",)),
        Bar(quantity="rate", limit=0.9, than=("rms_norm", "16384x4096-bf16"), **here),
        Bar(quantity="part", limit=0.03, than=("rms_norm", "16384x4096-bf16"), **here),
        Bar(quantity="share", limit=0.9, provider="liger", **here),
    ]
    verdicts = judge(bars, rows)
    # Rounded towards a miss: 95.0 % and 1.30 would seem to be met.
    assert bars_table(verdicts).splitlines()[2:] == [
        "| `rms_norm` 16384×4096 bf16 forward | share of the ceiling ≥ 95 % | 94.9 % of copy "
        "| **no** |",
        "| | speed ≥ 1× the best of torch, Liger-Kernel, within the spread "
        "| 0.989× Liger-Kernel, spread 1.0 % | **no** |",
        "| | speed ≥ 1.5× torch | 1.50× | yes |",
        "| | host time ≤ 1.3× torch | 1.31× | **no** |",
        "| | extra memory ≤ 1× torch | not measured | |",
        "| | runs | 100 µs | yes |",
        "| | TFLOP/s ≥ 0.9× `rms_norm` 16384×4096 bf16 | 1.00× | yes |",
        "| | ≤ 3 % of the time of `rms_norm` 16384×4096 bf16 | 100.0 % | **no** |",
        "| `rms_norm` 16384×4096 bf16 forward, Liger-Kernel | share of the ceiling ≥ 90 % "
        "| 95.3 % of copy | yes |",
    ]
    assert bars_summary(verdicts) == "4 met, 4 missed, 1 not measured."


def test_bars_over_all_cases_say_so(info):
    cases = [f"8x{n}-bf16" for n in (1, 2, 3)]
    rows = [row(info, 1.0, case=case, operator="linear") for case in cases]
    rows += [row(info, 1.0, case=case, operator="linear", provider="torch") for case in cases]
    bars = [
        Bar(
            operators=("linear",),
            directions=("fwd",),
            quantity="speed",
            limit=limit,
            peers=("torch",),
            over=over,
        )
        for over, limit in (("mean", 0.95), ("least", 1.05), ("quarter", 1.0))
    ]
    assert bars_table(judge(bars, rows)).splitlines()[2:] == [
        "| `linear` | geometric mean of speed ≥ 0.95× torch | 1.00× | yes |",
        "| | speed ≥ 1.05× torch in all cases | 1.00× | **no** |",
        "| | speed ≥ 1× torch in a quarter of the cases | 100 % of 3 cases | yes |",
    ]


def test_more_than_no_memory_has_no_ratio(info):
    rows = [row(info, 1.0), row(info, 1.0, provider="torch", peak_extra_bytes=0, result_bytes=0)]
    bar = Bar(
        operators=("rms_norm",),
        directions=("fwd",),
        quantity="memory",
        limit=1.0,
        peers=("torch",),
    )
    assert "| ∞× | **no** |" in bars_table(judge([bar], rows))
