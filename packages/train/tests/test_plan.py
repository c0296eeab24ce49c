"""`train-plan`: what it prints, what it suggests, how it ends."""

import dataclasses

import pytest

from tilewright_model import preset
from tilewright_train.hardware import ACCELERATORS, accelerator
from tilewright_train.memory_plan import MARGIN, StepShape
from tilewright_train.plan import make_plan, on_several, ways_to_fit
from tilewright_train.plan_command import main

H200 = ACCELERATORS["H200"]


def test_the_step_time_is_that_of_the_model_it_was_measured_with() -> None:
    # 198 ms without an update, in bf16 weights (docs/model.md).
    step = StepShape(rows=16, seq_len=2048, precision="bf16-weights")
    plan = make_plan(preset("0.5b"), step, H200)
    assert plan.time is not None
    assert plan.time.computation == pytest.approx(0.198, rel=0.05)
    # A small model waits for the host: 100m at 32 rows of 1024 took 62 ms.
    small = make_plan(preset("100m"), StepShape(rows=32, seq_len=1024), H200)
    assert small.time is not None
    assert small.time.step == pytest.approx(0.062, rel=0.1)


def test_several_gpus_divide_the_batch_and_are_less_than_so_many_times_as_fast() -> None:
    alone = make_plan(preset("0.5b"), StepShape(rows=16, seq_len=2048, parts=4), H200)
    plans = list(on_several(alone, (1, 2, 4, 128)))
    assert [(p.step.world_size, p.step.parallel) for p in plans] == [
        (1, "ddp"), (2, "ddp"), (2, "zero1"), (2, "fsdp"), (4, "ddp"), (4, "zero1"), (4, "fsdp"),
    ]  # fmt: skip
    assert {p.tokens_a_step for p in plans} == {64 * 2048}
    rates = [p.tokens_per_second or 0 for p in plans if p.step.parallel == "ddp"]
    assert rates == sorted(rates)
    assert rates[1] < 2 * rates[0]
    assert rates[2] < 4 * rates[0]


def test_under_fsdp_each_part_of_a_step_communicates() -> None:
    step = StepShape(rows=4, seq_len=2048, world_size=16, parallel="fsdp")
    one, four = (
        make_plan(preset("1.3b"), dataclasses.replace(step, parts=parts), H200).time
        for parts in (1, 4)
    )
    assert one is not None
    assert four is not None
    assert four.exposed == pytest.approx(4 * one.exposed, rel=0.1)


def test_every_way_that_is_named_fits() -> None:
    step = StepShape(rows=32, seq_len=2048, precision="fp32", world_size=2)
    plan = make_plan(preset("1.3b"), step, accelerator("h100"))
    assert not plan.fits
    ways = ways_to_fit(plan)
    names = [flags for flags, _ in ways]
    assert names[0].startswith("--micro-batch-size ")
    assert sum(flags.split()[::2] == ["--micro-batch-size"] for flags in names) == 1
    assert "--recompute full" in names
    assert all(memory.total <= (1 - MARGIN) * accelerator("h100").memory for _, memory in ways)
    unknown = ways_to_fit(dataclasses.replace(plan, gpu=None))
    assert all(memory.total < plan.memory.total for _, memory in unknown)
    schemes = {"--parallel zero1", "--parallel fsdp"}
    assert {*schemes, "--precision bf16"} <= {flags for flags, _ in unknown}
    muon = make_plan(plan.config, dataclasses.replace(step, optim="muon"), None)
    assert schemes & {flags for flags, _ in ways_to_fit(muon)} == {"--parallel zero1"}


def test_the_command_prints_memory_speed_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "0.5b", "--gpu", "h200", "--gpus", "2", "--batch-size", "64"]
    assert main(words) == 0
    out = capsys.readouterr().out
    for wanted in (
        "0.5b: 503.4 M parameters; 3.32 GFLOP a token to train, at 2048 tokens",
        "1 x 32 rows of 2048 on each of 2 GPUs (ddp), bf16, adamw, recompute none",
        "of 139.80 GiB, H200; highest in the backward:",
        "  activations",
        "fits         at most ",
        "tokens/s,",
        " GPUs  scheme      rows      memory",
        "   64   zero1     1 x 1",
        "   64    fsdp     1 x 1",
    ):
        assert wanted in out, wanted
    table = out.split("highest in the backward:")[1].split("fits")[0].splitlines()
    kinds = [float(line.split()[1]) for line in table if "GiB" in line]
    total = float(out.split("memory       ")[1].split()[0])
    assert sum(kinds) == pytest.approx(total, abs=0.05)


def test_fsdp_holds_a_model_that_no_gpu_does(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "llama3-8b", "--gpu", "L4", "--gpus", "64", "--batch-size", "64"]
    for parallel, fits in (("zero1", False), ("fsdp", True)):
        flags = ["--parallel", parallel, "--micro-batch-size", "1", "--recompute", "full"]
        assert main([*words, *flags]) == 0
        out = capsys.readouterr().out
        assert ("it does not fit; it would with" in out) != fits, out
        assert ("  gathered" in out) == (parallel == "fsdp")


def test_under_fsdp_the_host_memory_of_a_process_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--preset", "0.5b", "--gpu", "H200", "--gpus", "2", "--parallel"]
    assert main([*flags, "fsdp"]) == 0
    # 503.4 M parameters: 8 and 12 bytes each.
    told = "begins up to 3.75 GiB in each process, while it saves up to 5.63 GiB in the first"
    assert told in capsys.readouterr().out
    assert main([*flags, "ddp"]) == 0
    assert "host memory" not in capsys.readouterr().out


def test_what_does_not_fit_is_told_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "1.3b", "--gpu", "L4", "--batch-size", "8", "--micro-batch-size", "8"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "it does not fit; it would with" in out
    assert "--precision bf16-weights" not in out.split("GPUs  scheme")[0] or "GiB" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h300"], "gpu 'h300' is not known (did you mean 'H200'?): choose one of"),
        (["--gpu", "H200", "--gpus", "3"], "is not a multiple of 3 gpus"),
        (["--gpus", "0"], "gpus 0 is out of range"),
        (
            ["--parallel", "fsdp", "--optim", "muon"],
            "use --parallel zero1 or ddp, or --optim adamw",
        ),
        (["--gpu", "H200", "--micro-batch-size", "7"], "micro_batch_size 7 does not divide"),
        (["--stepz", "3"], "unknown flag '--stepz' (did you mean '--steps'?)"),
        (["--preset", "nanoo"], "no preset 'nanoo'"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_without_a_gpu_memory_is_told_and_speed_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "not predicted: name a GPU with --gpu" in out
    assert "plain torch keeps more" in out
