"""What is looked at on demand: profile, memory at the peak, norms by layer, samples, events."""

import gzip
import io
import itertools
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from tilewright_model import CausalLM, ModelConfig, preset
from tilewright_train.cli import main
from tilewright_train.config import RunOptions
from tilewright_train.errors import InputError
from tilewright_train.layers import parse
from tilewright_train.memory_snapshot import BEFORE, NO_FRAME, held_at_the_peak, summary_lines
from tilewright_train.metrics import Record, read_metrics
from tilewright_train.pretraining import run
from tilewright_train.profiling import COMPILED, StepProfiler, tables
from tilewright_train.tensorboard_log import scalars
from tilewright_train.watching import layer_of, norms_by_layer


def test_a_profile_has_a_trace_ranges_and_a_table(tiny_flags: list[str]) -> None:
    printed = io.StringIO()
    folder = run(parse([*tiny_flags, "--profile", "3:5"]), printed)
    with gzip.open(folder / "profile" / "trace.json.gz", "rt") as stream:
        trace = json.load(stream)
    names = [event.get("name") for event in trace["traceEvents"]]
    # One block, two steps.
    for name in ("attention", "attention backward", "mlp", "mlp backward", "loss", "optimizer"):
        assert names.count(name) == 2, name
    assert names.count("communication") == 2
    table = (folder / "profile" / "kernels.txt").read_text().splitlines()
    assert table[0].startswith("steps 3 to 4: ")
    assert table[0].endswith(" ms of operators a step")
    assert any(line.startswith("optimizer") for line in table)
    shares = [float(line.split()[-1].rstrip("%")) for line in table if line.endswith("%")]
    assert shares == sorted(shares, reverse=True)
    assert 50 < sum(shares) <= 100.1
    assert "profile      " in printed.getvalue()


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_computed_again_closes_its_ranges(tiny_flags: list[str], recompute: str) -> None:
    folder = run(parse([*tiny_flags, "--profile", "3:5", "--recompute", recompute]), io.StringIO())
    with gzip.open(folder / "profile" / "trace.json.gz", "rt") as stream:
        events = json.load(stream)["traceEvents"]
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if event.get("ph") == "X" and event.get("cat") == "user_annotation":
            span = event["ts"], event["ts"] + event["dur"]
            spans.setdefault(event["name"], []).append(span)
    assert len(spans["mlp backward"]) == len(spans["optimizer"]) == 2
    for name in ("mlp", "mlp backward", "attention", "attention backward"):
        for first, end in spans[name]:
            assert not any(first < at < end for at, _ in spans["optimizer"]), name


def test_a_profile_that_the_run_ends_within_counts_its_own_steps(tiny_flags: list[str]) -> None:
    folder = run(parse([*tiny_flags, "--profile", "10:20"]), io.StringIO())
    table = (folder / "profile" / "kernels.txt").read_text().splitlines()
    assert table[0].startswith("steps 10 to 12: ")
    (optimizer,) = [line for line in table if line.startswith("optimizer")]
    assert optimizer.split()[1] == "1"  # a call a step
    printed = io.StringIO()
    (folder / "summary.json").unlink()
    run(parse(["--resume", str(folder), "--profile", "3:5"]), printed)
    assert "profile      none: the steps 3:5 are done already" in printed.getvalue()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--profile", "13:15"], "profile 13:15 begins behind the last of the 12 steps: give"),
        (["--memory-snapshot"], "memory_snapshot records a GPU's allocator: leave it out"),
        (["--tensorboard"], "pip install 'tilewright-train[tensorboard]'"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_before_the_run_has_its_name(
    tiny_flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main([*tiny_flags, "--name", "mine", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (Path(tiny_flags[tiny_flags.index("--out") + 1]) / "mine").exists()


def test_norms_of_steps_that_are_done_again_stand_once(tiny_flags: list[str]) -> None:
    folder = run(parse([*tiny_flags, "--grad-norms-every", "2"]), io.StringIO())
    file = folder / "grad_norms.jsonl"
    whole = file.read_text()
    with file.open("a") as stream:
        stream.write('{"step": 14, "no')  # killed there
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-000012")
    run(parse(["--resume", str(folder)]), io.StringIO())
    assert file.read_text() == whole


def test_looking_changes_no_number(tiny_flags: list[str]) -> None:
    flags = ["--profile", "3:5", "--grad-norms-every", "2", "--sample-every", "5"]
    one, other = (
        [(r.step, r.loss, r.val_loss, r.grad_norm) for r in read_metrics(f / "metrics.jsonl")]
        for f in (run(parse([*tiny_flags, *more]), io.StringIO()) for more in ([], flags))
    )
    assert one == other


def test_norms_by_layer_add_up_to_the_norm(tiny_flags: list[str]) -> None:
    folder = run(parse([*tiny_flags, "--grad-norms-every", "4"]), io.StringIO())
    lines = [json.loads(line) for line in (folder / "grad_norms.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert set(lines[0]["norms"]) == {"embed_tokens", "layers.0", "norm"}
    records = {record.step: record.grad_norm for record in read_metrics(folder / "metrics.jsonl")}
    for line in lines:
        whole = sum(norm**2 for norm in line["norms"].values()) ** 0.5
        assert whole == pytest.approx(records[line["step"]], rel=1e-4)


def test_norms_are_without_the_loss_scale_and_none_where_not_finite() -> None:
    model = CausalLM(
        ModelConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
            max_position_embeddings=16,
        )
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weight = model.get_parameter("layers.1.mlp.down_proj.weight")
    weight.grad = torch.full_like(weight, 8.0)
    norms = norms_by_layer(model, torch.tensor(4.0))
    assert norms["layers.1"] == pytest.approx(2.0 * weight.numel() ** 0.5)
    assert norms["layers.0"] == 0.0
    weight.grad[0, 0] = float("nan")
    assert norms_by_layer(model)["layers.1"] is None
    assert layer_of("layers.11.self_attn.o_proj.weight") == "layers.11"


def test_samples_are_drawn_on_the_way(tiny_flags: list[str]) -> None:
    printed = io.StringIO()
    folder = run(parse([*tiny_flags, "--sample-every", "5"]), printed)
    drawn = sorted(p.name for p in (folder / "samples").iterdir())
    assert drawn == [f"step-{step:06d}.txt" for step in (0, 5, 10, 12)]
    assert printed.getvalue().count("\nsample       ") == 3
    assert printed.getvalue().count("\nsample       before training: ") == 1


@pytest.mark.parametrize("text", ["10", "13:10", "0:3", "5:5", "a:b"])
def test_a_range_of_steps_is_checked(text: str) -> None:
    with pytest.raises(InputError, match=r"is no range of steps: give it as in 10:13"):
        RunOptions(profile=text)
    assert RunOptions(profile="10:13").profiled_steps == (10, 13)


def test_a_snapshot_needs_a_gpu(tiny_flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*tiny_flags, "--memory-snapshot"]) == 2
    assert "records a GPU's allocator: leave it out on a CPU" in capsys.readouterr().err


def event(action: str, address: int, size: int, *frames: tuple[str, str]) -> dict[str, Any]:
    listed = [{"filename": file, "name": name, "line": 1} for file, name in frames]
    return {"action": action, "addr": address, "size": size, "frames": listed}


def test_the_summary_is_of_the_highest_moment() -> None:
    torch_file, ours = "/x/torch/nn/functional.py", "/x/tilewright_model/attention.py"
    events = [
        event("alloc", 1, 100, (torch_file, "linear"), (ours, "forward")),
        event("alloc", 2, 50, (torch_file, "linear")),
        event("free_requested", 2, 50),
        event("free_completed", 2, 50),
        event("free_completed", 900, 30),  # from before the recording
        event("alloc", 3, 70, (torch_file, "linear"), (ours, "forward")),
        event("alloc", 4, 20),
        event("free_completed", 1, 100),
        event("alloc", 5, 10, (torch_file, "relu")),
    ]
    held = held_at_the_peak(events, before=1000)
    assert [(row.where, row.size, row.blocks) for row in held] == [
        (BEFORE, 970, 1),
        ("tilewright_model.attention:forward", 170, 2),
        (NO_FRAME, 20, 1),
    ]
    text = summary_lines(held, (3, 5))
    assert text[0] == "steps 3 to 4: 0.00 GiB at the highest"
    assert text[2].split()[-3:] == ["0.000", "83.6%", "1"]


def test_kernels_are_told_from_the_operators_that_launch_them() -> None:
    def row(key: str, own: float, host: float, count: int = 2) -> Any:
        return SimpleNamespace(
            key=key,
            count=count,
            self_device_time_total=own,
            device_time_total=own,
            self_cpu_time_total=host,
            cpu_time_total=host,
        )

    rows = [row("aten::mm", 900.0, 50.0), row("gemm", 900.0, 0.0), row("copy", 100.0, 0.0)]
    rows += [row("optimizer", 300.0, 10.0), row("optimizer", 300.0, 0.0)]
    rows += [row("Optimizer.step#AdamW.step", 290.0, 0.0)]  # torch's own range
    text = tables(rows, (10, 12), on_gpu=True)
    assert text[0] == "steps 10 to 11: 0.50 ms of kernels a step"
    assert text[2].split() == ["optimizer", "1", "0.15"]
    assert [line.split()[0] for line in text[4:]] == ["gemm", "copy"]
    assert text[4].endswith("90.0%")


def test_records_have_tags() -> None:
    record = Record(step=3, loss=2.0, lr=0.1, metrics={"rewards/margins": 0.5, "val_a/b": 0.25})
    tags = scalars(record)
    assert tags["loss/train"] == 2.0
    assert (tags["rewards/margins"], tags["validation/a/b"]) == (0.5, 0.25)
    assert "loss/validation" not in tags


def test_tensorboard_reads_what_a_run_wrote(tiny_flags: list[str]) -> None:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    folder = run(parse([*tiny_flags, "--tensorboard"]), io.StringIO())
    events = reader.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    losses = {r.step: r.loss for r in read_metrics(folder / "metrics.jsonl") if r.loss}
    written = {event.step: event.value for event in events.Scalars("loss/train")}
    assert written == pytest.approx(losses, rel=1e-6)


@pytest.mark.gpu
def test_a_gpus_profile_and_snapshot_name_our_kernels_and_lines(
    tiny_flags: list[str], tmp_path: Path
) -> None:
    flags = [*tiny_flags, "--device", "cuda", "--profile", "5:7", "--memory-snapshot"]
    folder = run(parse(flags), io.StringIO())
    table = (folder / "profile" / "kernels.txt").read_text()
    assert "adam" in table
    assert "attention backward" in table
    summary = (folder / "memory" / "summary.txt").read_text()
    assert BEFORE in summary
    assert "tilewright_" in summary
    assert (folder / "memory" / "snapshot.pickle").stat().st_size > 1000


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_blocks_are_ranges_and_the_table_says_so(
    tmp_path: Path, recompute: Literal["none", "full"]
) -> None:
    torch.compiler.reset()  # a block has been compiled for other models before
    model = CausalLM(preset("nano", vocab_size=64, num_hidden_layers=2))
    model.recompute = recompute
    for block in model.layers:
        block.compile(fullgraph=True, backend="eager")
    ids = torch.arange(8).view(1, 8)

    def step() -> None:
        loss = model(ids, labels=ids).loss
        assert loss is not None
        loss.backward()

    step()
    compiled = [block._compiled_call_impl for block in model.layers]
    profiler = StepProfiler(model, tmp_path, (2, 4))
    for _ in range(2):
        step()
        with profiler.range("optimizer"):
            torch.ones(8).sum()
    lines = profiler.close(3)
    assert [block._compiled_call_impl for block in model.layers] == compiled
    assert any(COMPILED in line for line in lines)
    with gzip.open(tmp_path / "trace.json.gz", "rt") as stream:
        events = json.load(stream)["traceEvents"]
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if event.get("ph") == "X" and event.get("cat") == "user_annotation":
            spans.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    again = 2 if recompute == "full" else 1
    assert len(spans["block"]) == 4 * again
    assert "mlp" not in spans
    # One behind the other, after the loss and before the update.
    marks = sorted((*spans["block backward"], *spans["loss"], *spans["optimizer"]))
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(marks))
    order = sorted(
        (at, name) for name in ("loss", "block backward", "optimizer") for at, _ in spans[name]
    )
    assert [name for _, name in order] == ["loss", *["block backward"] * 2, "optimizer"] * 2
