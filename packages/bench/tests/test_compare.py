import json
import re
import subprocess
import sys

import pytest

from tilewright_bench.__main__ import main
from tilewright_bench.compare import compare
from tilewright_bench.saved import load

BEFORE = {"bench_op[fwd-tilewright]": 2e-3, "bench_op[fwd-torch]": 4e-3, "bench_op[old]": 1e-3}
AFTER = {"bench_op[fwd-tilewright]": 1e-3, "bench_op[fwd-torch]": 5e-3, "bench_op[new]": 1e-3}


@pytest.fixture
def places(tmp_path, write_run, monkeypatch):
    """A baseline and a newer run, and the options that say where they are."""
    # pytest-benchmark imports the conftest.py of its working directory; the root's takes seconds.
    monkeypatch.chdir(tmp_path)
    # Alphabetically after "run": the reference must be the baseline, not the first by name.
    write_run(tmp_path / "baselines" / "zeroth.json", BEFORE)
    write_run(tmp_path / "storage" / "platform" / "0001_abc.json", AFTER)
    return [f"--storage={tmp_path / 'storage'}", f"--baselines={tmp_path / 'baselines'}"]


def test_differences_refer_to_the_baseline(places, capfd):
    assert main(["compare", "zeroth", *places]) == 0
    out = capfd.readouterr().out
    assert "2 benchmarks in both, 2 in one only" in out
    assert re.search(r"fwd-tilewright\] +2\.0000 +1\.0000 +-50\.0%", out)
    assert re.search(r"fwd-torch\] +4\.0000 +5\.0000 +\+25\.0%", out)
    assert re.search(r"new\] +N/A", out)


def test_options_reach_pytest_benchmark(places, capfd):
    assert main(["compare", "zeroth", *places, "-k", "tilewright"]) == 0
    out = capfd.readouterr().out
    assert "fwd-tilewright]" in out
    assert "fwd-torch]" not in out


def test_pytest_benchmark_compares_the_files_by_itself(places, tmp_path):
    files = [str(path) for path in sorted(tmp_path.rglob("*.json"))]
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", *files, "--group-by=fullname"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert done.stdout.count("fwd-torch] (") == 2


def test_another_device_is_pointed_out(places, tmp_path, write_run, capfd):
    cpu = write_run(tmp_path / "cpu.json", AFTER, machine={"gpu": None})
    baseline = load(tmp_path / "baselines" / "zeroth.json")
    assert compare(baseline, load(cpu)) == 0
    out = capfd.readouterr().out
    assert "(NVIDIA H200, driver 580.1)" in out
    assert "(cpu)" in out
    assert "The devices differ" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "nope"], "'nope' is no baseline, .*: zeroth$"),
        (["compare", "zeroth", "nope"], "'nope' is no baseline"),
        (["compare", "1"], "would be compared with itself"),
        (["save", "a/b"], "'a/b' cannot name a baseline"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_two(places, capsys, arguments, message):
    assert main([*arguments, *places]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error.rstrip())


def test_runs_without_a_common_benchmark(places, tmp_path, write_run, capsys):
    write_run(tmp_path / "baselines" / "other.json", {"bench_else": 1.0})
    assert main(["compare", "other", *places]) == 2
    assert "have no benchmark in common" in capsys.readouterr().err


def test_an_unknown_option_of_another_command_is_refused(places, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["save", "name", "--comit=abcdef0", *places])
    assert exit_.value.code == 2
    assert "unknown arguments: --comit" in capsys.readouterr().err


def test_the_newest_run_is_saved_and_compared(places, tmp_path, capfd):
    assert main(["save", "first", *places]) == 0
    assert json.loads((tmp_path / "baselines" / "first.json").read_text())["benchmarks"]
    assert main(["compare", "zeroth", "first", *places]) == 0
    assert "2 benchmarks in both" in capfd.readouterr().out
