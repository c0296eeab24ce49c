"""The benchmarks of the repository, run as `nox -s bench` runs them, on a CPU."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tilewright_bench import Case, Measurement, Variant, Work
from tilewright_bench.commands import main
from tilewright_bench.evaluate import error_limit
from tilewright_bench.plugin import pytest_collection_finish

ROOT = Path(__file__).parents[3]
BENCHMARKS = ROOT / "packages" / "bench" / "benchmarks"


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> SimpleNamespace:
    """One run of all benchmarks: what it printed, where it saved, and what."""
    storage = tmp_path_factory.mktemp("storage")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", str(BENCHMARKS), "-Wdefault"),
            *("-p", "no:cacheprovider", "--benchmark-only", "--benchmark-autosave"),
            f"--benchmark-storage=file://{storage}",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (saved,) = storage.glob("*/0001_*.json")
    return SimpleNamespace(
        output=done.stdout, storage=storage, saved=json.loads(saved.read_text(encoding="utf-8"))
    )


def test_every_operator_provider_and_direction_is_saved(session):
    seen = {
        (b["extra_info"]["operator"], b["params"]["direction"], b["params"]["provider"])
        for b in session.saved["benchmarks"]
    }
    providers = ("tilewright", "torch")
    assert seen >= {("rms_norm", d, p) for d in ("fwd", "bwd") for p in providers}
    assert seen >= {("cross_entropy", d, p) for d in ("fwd", "bwd", "fwd+bwd") for p in providers}


def test_each_benchmark_holds_a_measurement_that_fits_its_times(session):
    for benchmark in session.saved["benchmarks"]:
        info, stats = benchmark["extra_info"], benchmark["stats"]
        assert set(info) == {field.name for field in fields(Measurement)}
        assert info["gb_per_s"] == pytest.approx(info["bytes"] / stats["median"] / 1e9, rel=1e-6)
        assert info["share_of_copy"] == pytest.approx(info["gb_per_s"] / info["copy_gb_per_s"])
        assert info["clock"] == "perf_counter"
        assert info["error"] <= error_limit(torch.bfloat16)
        assert benchmark["options"]["timer"] == "device_clock"
        assert "UNSERIALIZABLE" not in json.dumps(benchmark)


def test_providers_of_a_case_were_measured_together(session):
    beside = {
        b["extra_info"]["provider"]: b["extra_info"]["beside"]
        for b in session.saved["benchmarks"]
        if b["group"].startswith("rms_norm") and b["group"].endswith(" bwd")
    }
    assert beside == {"tilewright": ["torch"], "torch": ["tilewright"]}


def test_the_machine_and_the_commit_are_named(session):
    machine = session.saved["machine_info"]
    assert machine["gpu"] is None
    assert machine["torch"].startswith("2.")
    assert machine["triton"] is not None or sys.platform != "linux"
    assert "id" in session.saved["commit_info"]


def test_the_output_names_the_device_and_tabulates_bandwidth(session):
    assert session.output.count("say nothing about a GPU") == 2
    assert "bandwidth, memory and accuracy" in session.output
    assert "compile: compared on a GPU only" in session.output


def test_show_prints_the_same_table_again(session, capsys):
    assert main(["show", f"--storage={session.storage}"]) == 0
    table = capsys.readouterr().out.split("\n", 1)[1].rstrip()
    assert "rms_norm" in table
    assert table in session.output


def test_a_run_on_a_cpu_is_no_baseline(session, tmp_path, capsys):
    places = [f"--storage={session.storage}", f"--baselines={tmp_path}"]
    assert main(["save", "laptop", *places]) == 2
    assert "a baseline is a run on a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_cases_of_one_name_and_different_work_are_refused():
    def item(flops):
        work = Work(bytes=8, flops=flops)
        case = Case(
            operator="scale", shape=(8,), dtype=torch.float32, make_inputs=lambda d, g: (),
            reference=abs, forward=work, backward=work,
        )  # fmt: skip
        variant = Variant(provider="torch", direction="fwd", build=lambda: abs)
        params = {"case": case, "variant": variant}
        return SimpleNamespace(nodeid="b.py::bench[0]", callspec=SimpleNamespace(params=params))

    session: Any = SimpleNamespace(items=[item(1), item(2)])
    with pytest.raises(pytest.UsageError, match="two cases of scale are both called 8-fp32"):
        pytest_collection_finish(session)
