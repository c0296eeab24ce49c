"""An exchange that a GPU never ends: the ranks that wait name the one that does not."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tilewright_dist.testing import run_ranks
from tilewright_dist.watchdog import Watchdog, watchdog_of

TIMEOUT = 2.0


class Exchange:
    """Ends at some time, or never."""

    def __init__(self, ends=float("inf")):
        self._ends = ends

    def query(self):
        return time.monotonic() >= self._ends


def wait_for_rank_1(rank):
    """What the watchdog says, and when it is asked about the exchanges before."""
    group: Any = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    said: list[str] = []
    watchdog = Watchdog(group, torch.device("cpu"), said.append)
    if rank == 1:
        time.sleep(9.0)  # the timeout, the roll call, and more
        return None
    for _ in range(5):
        watchdog.watch(Exchange(time.monotonic() + 0.05))
        time.sleep(0.1)
    assert not said
    began = time.monotonic()
    watchdog.watch(Exchange())
    while not said and time.monotonic() < began + 9.0:
        time.sleep(0.05)
    return said, time.monotonic() - began


def test_the_rank_that_does_not_answer_is_named():
    results = run_ranks(wait_for_rank_1, world_size=3)
    for rank in (0, 2):
        said, seconds = results[rank]
        assert said[0].startswith(f"rank {rank}: an exchange has been under way for 1 s, rank(s) 1")
        assert seconds > TIMEOUT / 2


def come_late(rank):
    """What the watchdogs say of rank 1, which hangs, and of rank 2, which comes later."""
    group: Any = dist.new_group(timeout=timedelta(seconds=6))
    said: list[str] = []
    watchdog = Watchdog(group, torch.device("cpu"), said.append)
    if rank == 1:
        time.sleep(14.0)
        return None
    time.sleep(3.0 * rank)  # rank 0 calls after 3 s, for 5 s; the timeout of rank 2 is at 9 s
    watchdog.watch(Exchange())
    until = time.monotonic() + 12.0
    while not said and rank == 0 and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(4.0 if rank == 2 else 2.0)
    return said


def test_a_rank_that_came_late_and_waits_is_not_named():
    said, _, later = run_ranks(come_late, world_size=3)
    assert "rank(s) 1 died or hang" in said[0]
    assert later in ([], [said[0].replace("rank 0:", "rank 2:")])


def test_no_thread_where_the_host_waits_itself(one_rank_group):
    assert watchdog_of(one_rank_group, torch.device("cpu")) is None


SCRIPT = """
import os, sys, time, torch
from datetime import timedelta
from tilewright_dist import DistributedDataParallel, init_from_environment
with init_from_environment("cuda", timeout=timedelta(seconds=16)) as environment:
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3))).cuda()
    wrapper = DistributedDataParallel(model, transport=sys.argv[1])
    for step in range(4):
        if step == 2 and environment.rank == 1:
            print("stops", flush=True)
            time.sleep(60)
        wrapper(torch.ones(2, 8, device="cuda")).sum().backward()
    torch.cuda.synchronize()
    print("never here", flush=True)
"""


@pytest.mark.multigpu(2)
@pytest.mark.parametrize("transport", ["collective", "copy"])
def test_a_hang_on_gpus_ends_and_is_named(transport, tmp_path):
    script = tmp_path / "hang.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(script)]
    path = os.pathsep.join([str(Path(__file__).parents[1] / "src"), *sys.path])
    began = time.monotonic()
    printed = subprocess.run(
        [*command, transport],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert printed.returncode != 0
    assert "rank 0: an exchange has been under way for 8 s, rank(s) 1 died" in printed.stderr
    assert "never here" not in printed.stdout
    assert time.monotonic() - began < 50
