import subprocess
import sys

import pytest

from tilewright_bench.compare import changes, compare
from tilewright_bench.saved import SavedRunError, load

BEFORE = {"bench_op[fwd-tilewright]": 2e-3, "bench_op[fwd-torch]": 4e-3, "bench_op[old]": 1e-3}
AFTER = {"bench_op[fwd-tilewright]": 1e-3, "bench_op[fwd-torch]": 5e-3, "bench_op[new]": 1e-3}


@pytest.fixture
def runs(tmp_path, write_run):
    """A baseline and a newer run, each with a spread of 2 %."""
    before = write_run(tmp_path / "before.json", BEFORE, spread=0.02)
    after = write_run(tmp_path / "after.json", AFTER, spread=0.01)
    return load(before), load(after)


def test_ratios_refer_to_the_baseline_and_the_worst_comes_first(runs):
    slower, faster = changes(*runs)
    assert (slower.name, faster.name) == ("bench_op[fwd-torch]", "bench_op[fwd-tilewright]")
    assert (slower.ratio, faster.ratio) == (pytest.approx(1.25), pytest.approx(0.5))
    assert (slower.verdict, faster.verdict) == ("slower", "faster")
    assert slower.spread == pytest.approx(0.02), "the larger of the two"


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(1.03, "slower"), (1.019, ""), (0.981, ""), (0.97, "faster")]
)
def test_what_lies_within_the_spread_is_equal(tmp_path, write_run, ratio, verdict):
    before = write_run(tmp_path / "a.json", {"bench_op[a]": 1e-3}, spread=0.02)
    after = write_run(tmp_path / "b.json", {"bench_op[a]": ratio * 1e-3})
    (change,) = changes(load(before), load(after))
    assert change.verdict == verdict


@pytest.mark.parametrize(("fail", "status"), [(None, 0), (0.22, 1), (0.24, 0)])
def test_a_slowdown_beyond_spread_and_limit_fails(runs, capsys, fail, status):
    assert compare(*runs, fail=fail, words="fwd") == status  # 25 % slower, spread 2 %
    out = capsys.readouterr().out
    assert ("FAILED: 1 slower by more than 22.0%" in out) == bool(status)


def test_the_table_says_what_changed(tmp_path, write_run, info, capsys):
    infos = [{"bench_op[fwd-torch]": info(provider="torch", share=share)} for share in (0.9, 0.72)]
    before = write_run(tmp_path / "before.json", BEFORE, infos=infos[0])
    after = write_run(tmp_path / "after.json", AFTER, infos=infos[1])
    assert compare(load(before), load(after)) == 0
    out = capsys.readouterr().out
    assert "missing: bench_op[old]\n" in out
    assert "2 benchmarks compared, 1 missing, 1 new" in out
    (torch,) = [line for line in out.splitlines() if "torch" in line]
    assert torch.split() == [
        *(
            "rms_norm",
            "16384x4096-bf16",
            "fwd",
            "torch",
            "4000.0",
            "5000.0",
            "1.250",
            "0.0%",
            "90%",
            "→",
            "72%",
            "slower",
        ),
    ]
    assert "geometric mean 0.791; slower beyond their spread: 1, faster: 1" in out


def test_a_missing_benchmark_fails_unless_it_was_not_chosen(runs, capsys):
    assert compare(*runs, fail=1.0) == 1
    assert "FAILED: 1 missing from the run" in capsys.readouterr().out
    assert compare(*runs, fail=1.0, words="fwd") == 0
    assert compare(*runs) == 0


def test_benchmarks_are_matched_by_what_they_measure(tmp_path, write_run, info, capsys):
    infos = [{"bench_old[0]": info()}, {"bench_new[9]": info(clock="cuda events")}]
    before, after = [
        load(write_run(tmp_path / f"{i}.json", dict.fromkeys(info_, 1e-3), infos=info_))
        for i, info_ in enumerate(infos)
    ]
    (change,) = changes(before, after)
    assert change.clocks == ("cuda graph", "cuda events")
    assert compare(before, after, fail=0.0) == 0
    assert "1.000 *" in capsys.readouterr().out


def test_words_choose(runs, capsys):
    assert [c.name for c in changes(*runs, words="fwd tile")] == ["bench_op[fwd-tilewright]"]
    assert compare(*runs, fail=0.05, words="tilewright") == 0
    assert "fwd-torch]" not in capsys.readouterr().out
    with pytest.raises(SavedRunError, match="in common whose name holds 'bwd'"):
        changes(*runs, words="bwd")


def test_words_are_looked_for_in_what_was_measured_too(tmp_path, write_run, info):
    infos = {"bench_norms[0]": info(), "bench_norms[1]": info(operator="layer_norm")}
    medians = dict.fromkeys(infos, 1e-3)
    runs = [load(write_run(tmp_path / f"{i}.json", medians, infos=infos)) for i in range(2)]
    assert [c.name for c in changes(*runs, words="layer_norm norms tilewright")] == [
        "layer_norm 16384x4096-bf16 fwd tilewright"
    ]


def test_pytest_benchmark_compares_the_files_by_itself(runs, tmp_path):
    files = [str(path) for path in sorted(tmp_path.rglob("*.json"))]
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", *files, "--group-by=fullname"],
        capture_output=True,
        text=True,
        # It imports the conftest.py of its working directory; the root's takes seconds.
        cwd=tmp_path,
        check=True,
    )
    assert done.stdout.count("fwd-torch] (") == 2


def test_another_device_is_pointed_out(runs, tmp_path, write_run, capsys):
    cpu = load(write_run(tmp_path / "cpu.json", AFTER, machine={"gpu": None}))
    assert compare(runs[0], cpu) == 0
    out = capsys.readouterr().out
    assert "(NVIDIA H200, driver 580.1)" in out
    assert "(cpu)" in out
    assert "The devices differ" in out


def test_runs_without_a_common_benchmark(runs, tmp_path, write_run):
    other = load(write_run(tmp_path / "other.json", {"bench_else": 1.0}))
    with pytest.raises(SavedRunError, match=r"have no benchmark in common$"):
        changes(other, runs[1])


def test_a_run_is_not_compared_with_itself(runs):
    with pytest.raises(SavedRunError, match="would be compared with itself"):
        changes(runs[0], runs[0])
