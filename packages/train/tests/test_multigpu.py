"""Runs on two GPUs over NCCL: trained, saved, gone on with in another mode, killed and restarted.

All runs of the first test are made one after another by the same two processes, which import torch
once. Operators are torch's there but for the optimizer, so that little is compiled.
"""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tilewright_dist import DistributedEnvironment, FullyShardedOptimizer
from tilewright_dist.testing import run_ranks
from tilewright_model import CausalLM, ModelConfig
from tilewright_optim import AdamW
from tilewright_train import checkpoint
from tilewright_train.metrics import Record, read_metrics
from tilewright_train.precision import arithmetic
from tilewright_train.replicas import replicate

MODES = {"ddp": "fsdp", "zero1": "ddp", "fsdp": "zero1"}
"""In which a run is begun, and in which it goes on."""

OWN = "torch,adamw=triton,clip_grad_norm_=triton"

RUNS = """
import os, shutil, sys
from pathlib import Path
import tilewright_optim  # makes its operators known to --backend
from tilewright_train import cli

runs, modes, flags = Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3:]
is_first = os.environ["RANK"] == "0"

def train(*flags):
    if status := cli.main(flags):
        sys.exit(status)

if is_first:  # the other one waits for it
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"
    place = {name: os.environ.pop(name) for name in names}
    train(*flags, "--name", "alone")
    os.environ |= place
for parallel, then in zip(modes[::2], modes[1::2]):
    train(*flags, "--name", parallel, "--parallel", parallel)
    again = runs / f"{parallel}-{then}"
    if is_first:
        shutil.copytree(runs / parallel, again)
        (again / "summary.json").unlink()
        shutil.rmtree(again / "checkpoints" / "step-000008")
    train("--resume", str(again), "--parallel", then)
"""

LOST = """
import os, signal, sys
import tilewright_optim
from tilewright_train import cli, loop

step = loop.TrainingLoop._start_step

def killed(self, number):
    place = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    if number == 6 and place == ("1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 6 and place == ("0", "0"):
        # It will wait inside NCCL, where no handler of Python's runs: 30 s until torchrun kills it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    step(self, number)

loop.TrainingLoop._start_step = killed
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of runs of eight steps with a checkpoint at the fourth; heads and rows divide unevenly."""
    folder = tmp_path_factory.mktemp("runs")
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "red", "mat", "today"]
    documents = [
        " ".join(draw.choice(words) for _ in range(draw.randint(10, 40))) for _ in range(300)
    ]
    (folder / "corpus.txt").write_text("\n".join(documents))
    sizes = {
        "--vocab-size": 301, "--hidden-size": 48, "--num-hidden-layers": 2,
        "--num-attention-heads": 3, "--num-key-value-heads": 3, "--intermediate-size": 64,
        "--seq-len": 32, "--batch-size": 8, "--micro-batch-size": 2, "--steps": 8, "--lr": 0.01,
        "--save-every": 4, "--eval-every": 8, "--eval-tokens": 300, "--sample-tokens": 4,
        "--threads": 1, "--device": "cuda", "--precision": "fp32", "--backend": OWN, "--keep": 3,
        "--data": folder / "corpus.txt", "--out": folder, "--cache-dir": folder / "cache",
    }  # fmt: skip
    return [str(word) for pair in sizes.items() for word in pair]


def runs_of(flags: list[str]) -> Path:
    return Path(flags[flags.index("--out") + 1])


def torchrun(*words: object, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--max-restarts", str(restarts), "--nproc-per-node", "2", *map(str, words)),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def assert_close(run: Path, alone: Path) -> None:
    """Every step's loss, the validation losses and the weights, up to the order of sums."""
    records, expected = (read_metrics(folder / "metrics.jsonl") for folder in (run, alone))
    assert [r.step for r in records] == [r.step for r in expected]
    for name in ("loss", "val_loss", "grad_norm", "lr"):
        for mine, theirs in zip(records, expected, strict=True):
            value = getattr(theirs, name)
            if value is not None:
                value = pytest.approx(value, rel=1e-3)
            assert getattr(mine, name) == value, (run.name, theirs.step, name)
    assert not any(record.skipped_steps for record in records)
    weights, whole = (load_file(last(folder) / "model.safetensors") for folder in (run, alone))
    for name, tensor in whole.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-2, atol=1e-3, msg=run.name)


def last(run: Path) -> Path:
    return checkpoint.all_checkpoints(run / "checkpoints")[-1]


@pytest.mark.multigpu(2)
def test_two_gpus_train_as_one_and_go_on_in_another_mode(flags: list[str], tmp_path: Path) -> None:
    runs, script = runs_of(flags), tmp_path / "runs.py"
    script.write_text(RUNS)
    modes = " ".join(f"{parallel} {then}" for parallel, then in MODES.items())
    done = torchrun(script, runs, modes, *flags)
    assert done.returncode == 0, done.stderr
    for parallel, then in MODES.items():
        assert_close(runs / parallel, runs / "alone")
        again = runs / f"{parallel}-{then}"
        assert f"resume       {again} after step 4" in done.stdout
        assert_close(again, runs / "alone")
        names = {file.name for file in last(runs / "alone").iterdir()}
        assert {file.name for file in last(again).iterdir()} == names


@pytest.mark.multigpu(2)
def test_a_process_that_is_killed_is_named_and_all_start_again(
    flags: list[str], tmp_path: Path
) -> None:
    script, lost = tmp_path / "lost.py", runs_of(flags) / "lost"
    script.write_text(LOST)
    named = "--name", "lost", "--parallel", "fsdp", "--resume", "auto"
    done = torchrun(script, *flags, *named, restarts=1)
    assert done.returncode == 0, done.stderr
    # The other one waits inside NCCL: torchrun, whose child it was, names it and ends both.
    assert "failed (exitcode: -9) local_rank: 1" in done.stderr
    assert f"resume       {lost} after step 4" in done.stdout
    records: list[Record] = read_metrics(lost / "metrics.jsonl")
    assert [record.step for record in records] == list(range(9))
    assert (lost / "summary.json").exists()


# Sizes that every Triton operator takes.
CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=128,
    max_position_embeddings=64,
)


def losses_of(here: DistributedEnvironment) -> tuple[list[float], list[int]]:
    """Of four steps in bf16 over four rows; elements of which this process has states."""
    torch.manual_seed(0)
    model = CausalLM(CONFIG)  # FSDP takes it from the host, block by block
    if here.process_group is None:
        model.to(here.device)
    module, made = replicate(
        model,
        lambda _: AdamW(model.parameters(), 3e-3, capturable=True),
        parallel="fsdp",
        precision="bf16",
        environment=here,
        max_grad_norm=1.0,
    )
    optimizer: Any = made
    losses = []
    for step in range(4):
        ids = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(step))
        mine = ids[here.rank :: here.world_size].to(here.device)
        with arithmetic("bf16").autocast("cuda"):
            loss = module(mine, labels=mine, num_items=4 * 63).loss
        (loss * here.world_size).backward()
        optimizer.step()
        optimizer.zero_grad()
        if here.process_group is not None:
            dist.all_reduce(loss := loss.detach())
        losses.append(loss.item())
    held = optimizer.inner if isinstance(optimizer, FullyShardedOptimizer) else optimizer
    return losses, [state["exp_avg"].numel() for state in held.state.values()]


def in_bf16(rank: int) -> tuple[Any, Any]:
    device = torch.device("cuda", rank)
    place = {"rank": rank, "world_size": 2, "distributed": True}
    return losses_of(DistributedEnvironment(device=device, **place)), losses_of(
        DistributedEnvironment(device=device)
    )


@pytest.mark.multigpu(2)
def test_triton_operators_take_gathered_weights_in_bf16() -> None:
    for (losses, held), (alone, whole) in run_ranks(in_bf16, backend="nccl", timeout=120):
        assert losses == pytest.approx(alone, rel=1e-2)
        assert alone[-1] != alone[0]
        assert [2 * n for n in held] == whole
