"""bench-parallel: measure training steps on the ranks that torchrun starts, ours beside torch's.

    torchrun --nproc-per-node 4 -m tilewright_bench parallel --out h200-x4.json

The file is written anew after every part, so that a late failure loses nothing that was measured.
"""

import argparse
import json
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytest_benchmark.utils import get_commit_info

from tilewright_bench import collectives
from tilewright_bench.environment import describe
from tilewright_bench.parallel import results, trace
from tilewright_bench.parallel.decoder import SIZES
from tilewright_bench.parallel.ladder import Ladder, Schedule, Trained
from tilewright_bench.parallel.setups import ALONE, PARTS, TRACED
from tilewright_bench.saved import SavedRunError
from tilewright_dist import DistributedEnvironment, copies, init_from_environment
from tilewright_dist.peers import GPUPeers, can_copy

LINK_SIZES = (2**10, 2**20, 25 * 2**20, 2**28)
"""Bytes of the collectives whose latency and bandwidth `plan` predicts from."""

ORDER = ("eager", "compiled", "ladder", "links", "traces of eager", "muon", "traces of compiled")
"""Parts: the most important first, in case that time runs out."""

PATIENCE = 15.0
"""Seconds that a first copy between GPUs may take."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of bench-parallel."""
    schedule = Schedule()
    parser.add_argument("--size", choices=SIZES, default="0.5b", help="[%(default)s]")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="[cuda where there is one]")
    parser.add_argument("--parts", nargs="+", choices=ORDER, default=ORDER, help="[all]")
    parser.add_argument("--rounds", type=int, default=schedule.rounds, help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=schedule.steps, help="a round [%(default)s]")
    parser.add_argument("--collectives-only", action="store_true", help="no copies between GPUs")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--commit", help="what is measured, outside a git checkout")
    parser.add_argument("--limit", type=float, help="seconds after which to stop, whatever is left")


def run(options: argparse.Namespace) -> int:
    """Measure on every rank, say and save it on the first.

    Raises:
        SavedRunError: Without torchrun.
    """
    # A program that uses NVLink multicast can put a host's GPUs out of service for all.
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    with init_from_environment(options.device) as environment:
        if environment.process_group is None:
            raise SavedRunError(
                "parallel training needs several processes: "
                "torchrun --nproc-per-node 2 -m tilewright_bench parallel"
            )
        measurement = Measurement(options, environment)
        measurement.all_parts()
    return int(measurement.failed)


class Measurement:
    """One run of the command.

    Args:
        options: Of the command line.
        environment: Of this rank, with a process group.
    """

    def __init__(self, options: argparse.Namespace, environment: DistributedEnvironment) -> None:
        assert environment.process_group is not None
        self._options, self._group = options, environment.process_group
        self._device, self._is_main = environment.device, environment.is_main
        self._began = time.perf_counter()
        size = SIZES[options.size]
        schedule = Schedule(rounds=options.rounds, steps=options.steps)
        self._ladder = Ladder(size, self._group, self._device, schedule, self._say)
        self.failed = False
        commit = get_commit_info()
        if options.commit is not None:
            commit = {"id": options.commit, "dirty": False}
        self._content: dict[str, Any] = {
            "machine_info": describe(),
            "commit_info": commit,
            "world_size": self._group.size(),
            "size": asdict(size) | {"parameters": size.parameters},
            "schedule": asdict(schedule),
            "links": [],
            "parts": {},
        }

    def all_parts(self) -> None:
        """Measure what was asked for, print it."""
        # Compiled kinds of blocks are one code object's, more than the usual limit.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.accumulated_recompile_limit = 512
        self._stop_in_time()
        copying = not self._options.collectives_only and self._copies_work()
        for name in self._options.parts:
            if name == "links":
                self._links()
            elif name in PARTS:
                self._part(name, copying)
            elif self._device.type == "cuda":
                self._traces(name.removeprefix("traces of "), copying)
            self._save()
        if self._is_main:
            print(results.text(self._content), flush=True)

    def _part(self, name: str, copying: bool) -> None:
        compile_blocks, setups = PARTS[name]
        setups = [s for s in setups if copying or s.transport != "copy"]
        self._say(f"{name}:")
        part = _empty_part()
        self._content["parts"][name] = part
        for progress in self._ladder.measure(setups, compile_blocks=compile_blocks):
            part["errors"] = dict(progress.errors)
            part["setups"] = {trained.setup.name: _figures(trained) for trained in progress.running}
            self._save()
            for trained in progress.running if progress.is_over else ():
                found = self._ladder.from_rest(trained)
                part["setups"][trained.setup.name]["from_rest"] = found
                if trained.setup == ALONE:
                    part["phases"] = self._ladder.phases(trained)
        self.failed |= bool(part["errors"])

    def _traces(self, name: str, copying: bool) -> None:
        """Timelines of the first rank, while all take the same steps."""
        compile_blocks, setups = TRACED[name]
        setups = [s for s in setups if copying or s.transport != "copy"]
        self._say(f"traces, {name}:")
        timelines = self._content["parts"].setdefault(name, _empty_part())["timelines"]
        measured = self._ladder.measure(setups, compile_blocks=compile_blocks, rounds=0)
        for progress in measured:
            for trained in progress.running:
                events = trace.take(trained, self._device, self._meet)
                if not self._is_main:
                    continue
                try:
                    timelines[trained.setup.name] = trace.timeline(events)
                except (KeyError, ValueError) as error:
                    self._say(f"  {trained.setup.name}: {type(error).__name__}: {error}")

    def _meet(self) -> None:
        dist.barrier(group=self._group)

    def _links(self) -> None:
        sizes = LINK_SIZES if self._device.type == "cuda" else LINK_SIZES[:2]
        measured = collectives.measure(
            self._group,
            self._device,
            names=("all_reduce", "reduce_scatter", "all_gather"),
            sizes=sizes,
            dtypes=("float32",),
            batch_seconds=0.01,
        )
        self._content["links"] = [asdict(collective) for collective in measured]

    def _copies_work(self) -> bool:
        """Try a copy between GPUs: where it cannot be had, the rest is measured all the same."""
        message = ""
        try:
            self._try_copies()
        except (ValueError, RuntimeError, OSError, AttributeError) as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        messages: list[str | None] = [None] * self._group.size()
        dist.all_gather_object(messages, message, group=self._group)
        for rank, text in enumerate(messages):
            if text:
                self._say(f"no copies between GPUs: rank {rank}: {text}")
        return not any(messages)

    def _try_copies(self) -> None:
        obstacle = can_copy(self._group, self._device)
        if obstacle:
            raise RuntimeError(obstacle)
        peers = GPUPeers(self._group, self._device)
        (landing,) = peers.allocate([copies.landing_bytes(peers)], [torch.uint8])
        values = torch.full((1000,), float(peers.rank), device=self._device)
        averaging = copies.Averaging([values.numel()], values.dtype, landing, peers)
        for _ in averaging.run([values]):
            pass
        done = torch.cuda.Event()
        done.record()
        deadline = time.perf_counter() + PATIENCE
        while not done.query():
            if time.perf_counter() > deadline:
                # The device waits for ever: no other work could follow.
                print("copies between GPUs hang: use --collectives-only", file=sys.stderr)
                os._exit(3)
            time.sleep(0.01)
        expected = (peers.world_size - 1) / 2
        if not bool((values == expected).all()):
            raise RuntimeError(f"copies gave {values[:4].tolist()}, not {expected}")

    def _stop_in_time(self) -> None:
        if self._options.limit is None:
            return

        def stop() -> None:
            print(f"stopped after {self._options.limit:.0f} s", file=sys.stderr, flush=True)
            if self._is_main:
                print(results.text(self._content), flush=True)
            os._exit(4)

        timer = threading.Timer(self._options.limit, stop)
        timer.daemon = True
        timer.start()

    def _save(self) -> None:
        out = self._options.out
        if self._is_main and out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")

    def _say(self, text: str) -> None:
        if self._is_main:
            print(f"{time.perf_counter() - self._began:6.1f} s  {text}", flush=True)


def _empty_part() -> dict[str, Any]:
    return {"setups": {}, "phases": {}, "timelines": {}}


def _figures(trained: Trained) -> dict[str, Any]:
    return {
        "seconds": trained.seconds,
        "host_seconds": trained.host_seconds,
        "update_seconds": trained.update_seconds,
        "held_bytes": trained.held_bytes,
        "loss": trained.loss,
    }
