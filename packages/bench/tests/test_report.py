from tilewright_bench.report import Row, rows_of, table

INFO = {
    "operator": "rms_norm",
    "case": "16384x4096-bf16",
    "direction": "fwd",
    "provider": "tilewright",
    "gb_per_s": 3912.4,
    "share_of_copy": 0.953,
    "host_us": 21.04,
    "peak_extra_bytes": 134_217_728,
    "error": 0.00163,
}


def test_a_row_says_what_was_measured():
    line = table([Row(median=68.61e-6, iqr=1.37e-6, extra_info=INFO)]).splitlines()[-1]
    assert line.split() == [
        *("rms_norm", "16384x4096-bf16", "fwd", "tilewright"),
        *("68.6", "2.0%", "3912", "95%", "21.0", "128.0", "1.6e-03"),
    ]


def test_columns_line_up_and_groups_are_set_apart():
    slow = INFO | {"provider": "torch", "gb_per_s": 0.257, "peak_extra_bytes": None}
    other = INFO | {"direction": "bwd"}
    lines = table(
        [Row(median=1e-3, iqr=0.0, extra_info=info) for info in (INFO, slow, other)]
    ).splitlines()
    header, blank, first, second, gap, last = lines
    assert blank == gap == ""
    assert len({len(line) for line in (header, first, second, last)}) == 1
    assert second.split()[6] == "0.26"
    assert second.split()[9] == "-"


def test_benchmarks_measured_otherwise_are_left_out():
    ours = {"stats": {"median": 2.0, "iqr": 0.1}, "extra_info": INFO}
    theirs = {"stats": {"median": 1.0, "iqr": 0.1}, "extra_info": {}}
    assert rows_of([theirs, ours]) == [Row(median=2.0, iqr=0.1, extra_info=INFO)]
