from tilewright_bench.rows import row_of
from tilewright_bench.tables import full_table, summary_table


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
