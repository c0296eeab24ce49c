"""bench-collectives: its arithmetic, and a run of two processes under torchrun."""

import csv
import subprocess
import sys

import pytest

from tilewright_bench import collectives
from tilewright_bench.collectives import Collective, bus_factor
from tilewright_bench.commands import main


@pytest.mark.parametrize(
    ("name", "world_size", "factor"),
    [
        ("all_reduce", 2, 1.0),
        ("all_reduce", 4, 1.5),
        ("reduce_scatter", 4, 0.75),
        ("all_gather", 8, 0.875),
        ("broadcast", 8, 1.0),
    ],
)
def test_what_a_rank_sends_at_least(name, world_size, factor):
    assert bus_factor(name, world_size) == factor


def measured(name="all_reduce", num_bytes=2**20):
    return Collective(
        name=name,
        dtype="float32",
        num_bytes=num_bytes,
        world_size=4,
        seconds=1e-3,
        algorithm_gb_per_s=1.05,
        bus_gb_per_s=1.57,
    )


def test_table_and_curves():
    rows = [measured(), measured("broadcast", 2**30), measured("broadcast", 1024)]
    lines = collectives.table(rows).splitlines()
    assert lines[1].split() == [
        "all_reduce",
        "float32",
        "1",
        "MiB",
        "1000.0",
        "µs",
        "1.05",
        "GB/s",
        "1.57",
        "GB/s",
    ]
    assert "1 GiB" in lines[2]
    assert "1 KiB" in lines[3]
    (panel,) = collectives.curves(rows).panels
    assert [(line.label, len(line.points)) for line in panel.lines] == [
        ("all_reduce", 1),
        ("broadcast", 2),
    ]


def test_without_torchrun_it_is_named(capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert main(["collectives", "--device=cpu"]) == 2
    assert "torchrun --nproc-per-node 2 -m tilewright_bench" in capsys.readouterr().err


def test_two_processes_of_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "tilewright_bench", "collectives", "--device=cpu"]
    command += ["--max-mb=0.02", f"--csv={tmp_path / 'rows.csv'}", f"--svg={tmp_path / 'bus.svg'}"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    # Three sizes (1, 4, 16 KiB), two dtypes, four collectives.
    assert len(rows) == 24
    assert len(finished.stdout.splitlines()) == 25
    for row in rows:
        size, seconds = int(row["num_bytes"]), float(row["seconds"])
        assert float(row["algorithm_gb_per_s"]) == pytest.approx(size / seconds / 1e9)
        assert float(row["bus_gb_per_s"]) == pytest.approx(
            float(row["algorithm_gb_per_s"]) * bus_factor(row["name"], 2)
        )
    assert "<svg" in (tmp_path / "bus.svg").read_text()
