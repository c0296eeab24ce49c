"""bench-parallel: what it makes of traces and times, and a run of two processes under torchrun."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from tilewright_bench import plots
from tilewright_bench.commands import main
from tilewright_bench.parallel import pages, prediction, results, trace
from tilewright_bench.parallel.decoder import SIZES, Decoder
from tilewright_dist import plan


def kernel(name, begin, end, correlation, stream=7, category="kernel"):
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": begin,
        "dur": end - begin,
        "args": {"stream": stream, "correlation": correlation},
    }


def launch(correlation, at):
    return {
        "ph": "X",
        "cat": "cuda_runtime",
        "name": "cudaLaunchKernel",
        "ts": at,
        "dur": 1,
        "args": {"correlation": correlation},
    }


def phase(name, begin, end):
    return {"ph": "X", "cat": "user_annotation", "name": name, "ts": begin, "dur": end - begin}


STEP = [
    *(phase(f"{name} 0", 0, 1) for name in trace.PHASES),
    *(phase("forward 1", 10, 20), phase("backward 1", 20, 40), phase("update 1", 40, 50)),
    *(launch(1, 12), kernel("gemm", 1000, 3000, 1)),
    *(launch(2, 22), kernel("gemm", 3000, 4000, 2)),
    *(launch(3, 25), kernel("gemm", 4010, 6000, 3)),
    # Begins under backward, ends 500 after it.
    *(launch(4, 26), kernel("ncclDevKernel_AllReduce", 5000, 6500, 4, stream=20)),
    *(launch(5, 27), kernel("Memcpy PtoP", 6500, 6700, 5, stream=21, category="gpu_memcpy")),
    *(launch(6, 45), kernel("adamw", 6800, 7800, 6)),
    # Of the next step.
    *(launch(7, 60), kernel("gemm", 9000, 9900, 7)),
]


def test_timeline():
    found = trace.timeline(STEP)
    assert found["lanes"] == {
        "forward": [[0.0, 2.0]],
        "backward": [[2.0, 5.0]],  # 10 µs between two kernels are no gap
        "update": [[5.8, 6.8]],
        "communication": [[4.0, 5.7]],
    }
    assert found["computing_ms"] == pytest.approx(5.99)
    assert found["communicating_ms"] == pytest.approx(1.7)
    assert found["exposed_ms"] == found["tail_ms"] == pytest.approx(0.7)


def setup(milliseconds, held=0.0, update=1.0):
    return {
        "seconds": [milliseconds / 1e3] * 3,
        "host_seconds": [0.01],
        "update_seconds": [update / 1e3],
        "held_bytes": held * 2**30,
        "loss": 1.0,
    }


def run_with(**setups):
    named = {name.replace("_", " "): found for name, found in setups.items()}
    return {
        "world_size": 4,
        "size": {"parameters": 2**28},
        "links": [],
        "parts": {"eager": {"setups": named, "timelines": {}, "phases": {}}},
    }


RUN = run_with(
    alone=setup(70.0),
    torch=setup(78.0),
    torch_static=setup(77.0),
    torch_100_MB=setup(79.0),
    bucketed=setup(75.0),
    bucketed_copy=setup(73.0),
    zero1=setup(72.5, held=2.6),
    zero1_copy=setup(72.0, held=2.55),
    torch_zero=setup(80.0, held=2.6),
)


@pytest.mark.parametrize(
    ("quantity", "ours", "value", "met"),
    [
        ("speed", results.OURS, 77 / 73, True),
        ("exposed", results.OURS, 3 / 73, True),
        ("arithmetic", ("zero1",), 2.6 / 2.5, False),
        ("memory", ("zero1",), 1.0, True),
    ],
)
def test_bars_take_the_best_of_each(quantity, ours, value, met):
    (bar,) = (
        bar
        for bar in results.BARS
        if (bar.part, bar.quantity, bar.ours) == ("eager", quantity, ours)
        and bar.beside != results.OURS
        and bar.world_size in (0, 4)
        and (quantity, bar.beside) != ("speed", ("torch zero",))
    )
    assert bar.value(RUN) == pytest.approx(value)
    assert bar.holds(value) == met
    assert not bar.holds(0.0 if quantity == "speed" else 9.0)


def test_what_is_missing_is_not_measured():
    table = results.bars_table([RUN])
    assert (
        "| DDP, eager | speed ≥ 1.03× torch's DDP at its best setting | 1.055× (copies) | yes |"
        in table
    )
    assert "| DDP, bf16 on the wire, eager" in table
    assert "not measured" in table
    without = run_with(alone=setup(70.0), torch=setup(78.0), bucketed=setup(75.0))
    assert "1.040×" not in results.bars_table([without])
    # A bar for another number of ranks has an empty cell.
    assert "speed ≥ 1.05× torch's DDP + ZeroRedundancyOptimizer |  |  |" in table
    assert "NO" not in results.text(RUN).splitlines()[-1]


def link(num_bytes, seconds):
    size = {"name": "all_reduce", "num_bytes": num_bytes, "seconds": seconds}
    return size | {"bus_gb_per_s": num_bytes / seconds / 1e9 * 1.5}


def run_on(world_size):
    """A run whose steps are what the simulator says of interference 1, on slow links."""
    size = asdict(SIZES["0.5b"]) | {"parameters": SIZES["0.5b"].parameters}
    setups = {"alone": setup(70.0, held=5.7)}
    run = {
        "world_size": world_size,
        "size": size,
        "links": [link(1024, 2e-5), link(2**28, 1e-3)],
        "machine_info": {"gpu": "a GPU", "driver": "1.2", "torch": "2.11"},
        "commit_info": {"id": "1234567890abc"},
        "parts": {
            "eager": {
                "setups": setups,
                "phases": {"forward": 0.021, "backward": 0.044, "optimizer": 0.004},
                "timelines": {"bucketed": trace.timeline(STEP)},
            }
        },
    }
    for name, scheme in (("bucketed", "ddp"), ("zero1", "zero1")):
        predicted = plan(
            prediction.workload(run, "eager"), prediction.cluster(run, 1.0), world_size, scheme
        )
        setups[name] = setup(predicted.step * 1e3, held=5.0)
    return run


def test_prediction_finds_what_disturbs_on_the_fewest_gpus():
    rows = list(prediction.compare([run_on(2), run_on(4)]))
    assert [(row.setup, row.world_size) for row in rows] == [
        *(("bucketed", 2), ("zero1", 2), ("bucketed", 4), ("zero1", 4)),
    ]
    for row in rows:
        assert row.interference == pytest.approx(1.0)
        assert row.predicted == pytest.approx(row.measured)
    # Forward, backward and update of the clock's events, scaled to the step.
    alone = prediction.workload(run_on(2), "eager")
    assert alone.forward + alone.backward + alone.optimizer == pytest.approx(0.07)
    assert alone.parameters == SIZES["0.5b"].parameters


def test_pages():
    runs = [run_on(2), run_on(4)]
    steps = pages.text(runs, "steps")
    assert "| no communication | 70.0 |  | 1.0 | 5.70 | 70.0 |  | 1.0 | 5.70 |" in steps
    assert steps.endswith(
        "2 and 4 a GPU (driver 1.2), torch 2.11, commit `1234567890`: "
        "`packages/bench/baselines/parallel/h200-x2.json`, "
        "`packages/bench/baselines/parallel/h200-x4.json`."
    )
    assert "| bucketed, NCCL, eager | 2 | 1.00 |" in pages.text(runs, "plan")
    assert "| bucketed, NCCL, eager | 4 | 6.0 | 1.7 | 0.7 | 0.7 |" in pages.text(runs, "trace")
    assert "| ZeRO-1, eager | time ≤ 1.02× our DDP |" in pages.text(runs, "bars")
    drawn = pages.timeline(runs)
    assert drawn is not None
    assert drawn.title == "A step on 4 GPUs, eager, rank 0"
    assert dict(dict(drawn.rows)["bucketed, NCCL"])["communication"] == ((4.0, 5.7),)
    assert pages.timeline([]) is None


def transports_run():
    """A run of ways to send: no timelines, no links, backward's times from rest."""
    run = run_on(2) | {"file": "h200-x2-transports.json", "links": []}
    run["commit_info"] = {"id": "fedcba"}
    rest = {"from_rest": {"backward": {"host": 0.012, "device": 0.048}}}
    setups = {name: setup(ms) | rest for name, ms in (("alone", 70.0), ("bucketed copy", 80.0))}
    run["parts"] = {part: {"setups": setups, "timelines": {}} for part in ("eager", "compiled")}
    return run


def test_a_run_of_transports_has_a_table_and_a_column_of_bars_only():
    runs = [run_on(2), transports_run()]
    table = pages.text(runs, "transports")
    assert "| no communication | 70.0 |  | 12.0 | 48.0 | 70.0 |  | 12.0 | 48.0 |" in table
    assert "| bucketed, copies | 80.0 | 12.5 % | 12.0 | 48.0 |" in table
    assert table.endswith("`packages/bench/baselines/parallel/h200-x2-transports.json`.")
    bars = pages.text(runs, "bars")
    assert "| 2 GPUs | met | 2 GPUs, transports | met |" in bars
    assert "≤ 7 % of the step | not measured |  | 12.5 % (copies) | **no** |" in bars
    for item in ("steps", "plan", "trace"):
        assert pages.text(runs, item) == pages.text(runs[:1], item)
    assert pages.text(runs[:1], "transports") == ""


def test_saved_runs_are_sorted_and_know_their_files(tmp_path):
    folder = tmp_path / results.FOLDER
    folder.mkdir(parents=True)
    for name, run in (("x4", run_on(4)), ("x2-transports", run_on(2)), ("x2", run_on(2))):
        (folder / f"gpu-{name}.json").write_text(json.dumps(run))
    runs = results.load(tmp_path, "gpu")
    assert [results.title(run) for run in runs] == ["2 GPUs", "2 GPUs, transports", "4 GPUs"]
    assert results.file_name(runs[0]) == "gpu-x2.json"


def test_a_timeline_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    drawn = pages.timeline([run_on(4)])
    assert drawn is not None
    plots.draw(drawn, tmp_path / "timeline.svg")
    assert plots.digest_in(tmp_path / "timeline.svg") == plots.digest(drawn)
    assert "bucketed, NCCL" in (tmp_path / "timeline.svg").read_text()


def test_parameters_of_the_decoder():
    size = SIZES["nano"]
    model = Decoder(size)
    assert sum(p.numel() for p in model.parameters()) == size.parameters
    assert SIZES["0.5b"].parameters == 503_367_168
    tokens = torch.randint(size.vocabulary, (2, size.tokens))
    # Untrained: as likely as any other token.
    assert model(tokens, tokens).item() == pytest.approx(5.5, abs=0.3)


def test_without_torchrun_it_is_named(capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert main(["parallel", "--device=cpu"]) == 2
    assert "torchrun --nproc-per-node 2 -m tilewright_bench parallel" in capsys.readouterr().err


def test_two_processes(tmp_path):
    out = tmp_path / "x2.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2"]
    command += ["-m", "tilewright_bench", "parallel", "--device=cpu", "--size=nano"]
    command += [
        "--parts",
        "ladder",
        "links",
        "--rounds=1",
        "--steps=1",
        f"--out={out}",
        "--commit=1234567",
    ]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert printed.returncode == 0, printed.stderr
    assert "the ranks are not on GPUs" in printed.stdout
    saved = json.loads(out.read_text())
    assert saved["world_size"] == 2
    assert saved["commit_info"] == {"id": "1234567", "dirty": False}
    setups = saved["parts"]["ladder"]["setups"]
    assert list(setups) == ["naive", "per_parameter", "bucketed", "fsdp alone", "fsdp"]
    # The same numbers travel, whatever the way.
    losses = {name: setup["loss"] for name, setup in setups.items()}
    assert losses["naive"] == losses["per_parameter"] == losses["bucketed"]
    assert losses["fsdp"] == pytest.approx(losses["naive"], rel=1e-2)  # computes in bfloat16
    assert {link["name"] for link in saved["links"]} == {
        "all_reduce",
        "reduce_scatter",
        "all_gather",
    }
