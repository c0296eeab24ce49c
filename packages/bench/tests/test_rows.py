import pytest

from tilewright_bench.rows import groups_of, lead, row_of, rows_of

STATS = {"median": 68.61e-6, "iqr": 1.3722e-6}


def test_a_row_holds_what_was_measured(info):
    row = row_of(STATS, info())
    assert row.group == ("rms_norm", "16384x4096-bf16", "fwd")
    assert row.spread == pytest.approx(0.02)
    assert row.intensity == 1.0
    assert row.extra_bytes == 2 << 20, "results are not extra"


def test_memory_that_is_unknown_is_none(info):
    assert row_of(STATS, info(peak_extra_bytes=None)).extra_bytes is None
    # Written in place: nothing beyond the results, which are the inputs.
    assert row_of(STATS, info(peak_extra_bytes=0, result_bytes=0)).extra_bytes == 0


def test_files_from_before_ceilings_are_read(info):
    old = info(share_of_copy=0.8)
    for name in ("ceiling", "share", "result_bytes"):
        del old[name]
    row = row_of(STATS, old)
    assert (row.ceiling, row.share, row.extra_bytes) == ("copy", 0.8, None)


def test_benchmarks_measured_otherwise_are_left_out(info):
    ours, theirs = ({"stats": STATS, "extra_info": i} for i in (info(), {}))
    assert rows_of([theirs, ours]) == [row_of(STATS, info())]


def test_groups_keep_their_order_and_name_the_lead(info):
    def row(median, provider, direction="fwd"):
        return row_of({"median": median, "iqr": 0.0}, info(provider=provider, direction=direction))

    rows = [row(4.0, "torch", "bwd"), row(2.0, "tilewright"), row(5.0, "torch"), row(3.0, "liger")]
    backward, forward = groups_of(rows)
    assert [r.provider for r in forward] == ["tilewright", "torch", "liger"]
    assert lead(forward) == 1.5, "beside the best peer, not the first"
    assert lead(backward) is None
    assert lead(forward[:1]) is None
    assert lead([*forward, row(1.0, "deterministic")]) == 1.5, "ours in another mode is no peer"
