import pytest

from tilewright_bench.report import quantity, table
from tilewright_bench.rows import row_of

STATS = {"median": 68.61e-6, "iqr": 1.37e-6}


def test_a_row_says_what_was_measured(info):
    line = table([row_of(STATS, info())]).splitlines()[-1]
    assert line.split() == [
        *("rms_norm", "16384x4096-bf16", "fwd", "tilewright"),
        *("68.6", "2.0%", "3912", "3.91", "95%", "21.0", "2.0", "1.6e-03", "graph"),
    ]


def test_another_ceiling_than_a_copy_is_named(info):
    line = table([row_of(STATS, info(ceiling="matmul", share=0.61))]).splitlines()[-1]
    assert " 61% of matmul " in line


def test_columns_line_up_and_groups_are_set_apart(info):
    slow = info(provider="torch", gb_per_s=0.257, peak_extra_bytes=None)
    lines = table([row_of(STATS, i) for i in (info(), slow, info(direction="bwd"))]).splitlines()
    header, blank, first, second, gap, last = lines
    assert blank == gap == ""
    assert len({len(line) for line in (header, first, second, last)}) == 1
    assert second.split()[6] == "0.257"
    assert second.split()[10] == "-"


@pytest.mark.parametrize(
    ("value", "text"), [(3912.4, "3912"), (99.94, "99.9"), (4.256, "4.26"), (0.0, "0")]
)
def test_quantities_have_three_digits(value, text):
    assert quantity(value) == text
