"""Joining what torchrun describes, with one and two processes; refusing what is incomplete."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tilewright_dist import DistributedEnvironment, init_from_environment
from tilewright_dist.environment import agree_on_name

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Port 0: the store of a single rank takes any free one.
ONE_RANK = dict(zip(VARIABLES, ("0", "1", "0", "127.0.0.1", "0"), strict=True))


@pytest.fixture
def set_variables(monkeypatch):
    """Sets exactly the given variables of torchrun; destroys a group that a test leaves."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def set_only(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    yield set_only
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.smoke
def test_without_torchrun_there_is_no_process_group(set_variables):
    with init_from_environment("cpu") as environment:
        assert environment == DistributedEnvironment(device=torch.device("cpu"))
        assert environment.is_main
        assert not dist.is_initialized()


def test_one_rank_of_torchrun_gets_a_group_that_shutdown_ends(set_variables):
    set_variables(**ONE_RANK)
    environment = init_from_environment("cpu")
    assert environment.process_group is dist.group.WORLD
    assert dist.get_backend(environment.process_group) == "gloo"
    with pytest.raises(ValueError, match="initialised already"):
        init_from_environment("cpu")
    environment.shutdown()
    assert not dist.is_initialized()
    assert environment.process_group is None
    environment.shutdown()


@pytest.mark.gpu
def test_one_rank_of_torchrun_on_cuda_uses_nccl(set_variables):
    set_variables(**ONE_RANK)
    with init_from_environment() as environment:
        assert environment.device == torch.device("cuda", 0)
        assert dist.get_backend(environment.process_group) == "nccl"


def test_an_exception_ends_the_group_and_passes_on(set_variables, monkeypatch):
    set_variables(**ONE_RANK)

    def barrier(*args, **kwargs):
        raise AssertionError("the other ranks are not coming")

    monkeypatch.setattr(dist, "barrier", barrier)
    with pytest.raises(KeyError, match="planted"), init_from_environment("cpu"):
        raise KeyError("planted")
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"LOCAL_RANK": ""},
            "RANK, WORLD_SIZE, LOCAL_RANK set but not LOCAL_RANK: start .*torchrun",
        ),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "but not MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "first"}, "RANK='first' is not a non-negative integer"),
        ({"RANK": "1"}, "RANK=1 and LOCAL_RANK=0 must be below WORLD_SIZE=1"),
    ],
)
def test_incomplete_or_wrong_variables_are_named(set_variables, changed, message):
    set_variables(**{**ONE_RANK, **changed})
    with pytest.raises(ValueError, match=message):
        init_from_environment("cpu")
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("device", "variables", "seen", "message"),
    [
        ("cuda", {}, 0, r"CUDA device 0 is not there \(0 seen\): pass device='cpu'$"),
        ("cuda:3", {}, 2, r"CUDA device 3 is not there \(2 seen\): pass device='cpu'$"),
        (
            "cuda",
            {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2"},
            2,
            r"CUDA device 2 is not there \(2 seen\): start torchrun with --nproc-per-node 2",
        ),
        ("cuda:1", ONE_RANK, 2, "names one GPU for all ranks"),
        ("meta", {}, 0, "device 'meta' is not supported; valid: 'cuda', 'cpu'"),
    ],
)
def test_device_that_cannot_be_had(set_variables, monkeypatch, device, variables, seen, message):
    set_variables(**({**ONE_RANK, **variables} if variables else {}))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    with pytest.raises(ValueError, match=message):
        init_from_environment(device)


PROGRAM = """
import json, pathlib, sys, time, torch
from tilewright_dist import DistributedDataParallel, init_from_environment

with init_from_environment("cpu") as environment:
    torch.manual_seed(environment.rank)
    model = DistributedDataParallel(torch.nn.Linear(2, 1, bias=False))
    model(torch.full((1, 2), environment.rank + 1.0)).backward()
    seen = {
        "world_size": environment.world_size,
        "is_main": environment.is_main,
        "weight": model.module.weight.tolist(),
        "gradient": model.module.weight.grad.tolist(),
    }
    if environment.is_main:
        time.sleep(0.5)
    pathlib.Path(sys.argv[1], f"{environment.rank}.json").write_text(json.dumps(seen))
assert pathlib.Path(sys.argv[1], "0.json").exists(), "did not wait for rank 0"
"""


def test_two_processes_of_torchrun(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(tmp_path / "program.py"), str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr

    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [s["is_main"] for s in seen] == [True, False]
    assert [s["world_size"] for s in seen] == [2, 2]
    assert [s["gradient"] for s in seen] == [[[1.5, 1.5]]] * 2
    assert seen[0]["weight"] == seen[1]["weight"]


def test_ranks_that_start_again_in_the_same_store_agree_on_a_new_name():
    """Of the start before, rank 1 had asked and was not answered, and rank 2 had been answered."""
    store = dist.HashStore()
    store.set("start/ask/1", "of the one that died")
    seconds = timedelta(seconds=20)
    names = []
    with ThreadPoolExecutor(3) as ranks:
        for _ in range(3):
            starts = [ranks.submit(agree_on_name, store, rank, 3, seconds) for rank in (0, 2, 1)]
            (name,) = {start.result() for start in starts}
            names.append(name)
    assert len(set(names)) == 3


def test_a_rank_that_does_not_start_is_named():
    store = dist.HashStore()
    store.set("start/ask/2", "of the one that died")
    with ThreadPoolExecutor(1) as ranks:
        one = ranks.submit(agree_on_name, store, 1, 3, timedelta(seconds=20))
        with pytest.raises(RuntimeError, match=r"rank\(s\) 2 did not start"):
            agree_on_name(store, 0, 3, timedelta(seconds=0.5))
        assert one.result()
