"""Run a function on several ranks of one host, for tests.

Each rank is a process of its own, forked from a server that has imported torch, so that a group of
two is up within a second. A rank that fails or hangs takes the others with it: no process is left.
"""

import importlib.util
import io
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from importlib.machinery import SourceFileLoader
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist


def run_ranks(
    function: Callable[..., Any],
    *args: Any,
    world_size: int = 2,
    backend: Literal["gloo", "nccl"] = "gloo",
    timeout: float = 60.0,
    may_die: Collection[int] = (),
) -> list[Any]:
    """Call `function(rank, *args)` on every rank of a fresh default process group.

    The function is loaded anew from its source file in each process, as test modules need not be
    importable by name. It runs with one CPU thread; with NCCL the current device is cuda:rank.

    Args:
        function: Defined at the top level of a file.
        *args: Passed on, pickled.
        world_size: Number of ranks.
        backend: "gloo" or "nccl".
        timeout: Seconds until all ranks must have returned.
        may_die: Ranks whose death is no failure, for tests of what the others do; they return None.

    Returns:
        What the ranks returned, by rank. Results travel pickled: return tensors on the CPU.

    Raises:
        ValueError: function is nested or a lambda.
        RuntimeError: A rank raised or died; carries its traceback.
        TimeoutError: Ranks had not returned in time; names them.
    """
    if "<" in function.__qualname__:
        raise ValueError(f"{function.__qualname__} is not defined at the top level of a file")
    # Spawning would import torch once a rank; forking a process that has run autograd is unsafe.
    context = multiprocessing.get_context("forkserver")
    # torch._dynamo (3 s) because the first optimizer that is built imports it.
    context.set_forkserver_preload(["torch", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder:
        receivers: list[Connection] = []
        processes = []
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                call = (function.__code__.co_filename, function.__qualname__, _encode(args))
                place = (
                    rank,
                    world_size,
                    backend,
                    f"file://{folder}/store",
                    timeout,
                    bool(may_die),
                )
                process = context.Process(target=_run_rank, args=(call, place, sender), daemon=True)
                process.start()
                sender.close()
                receivers.append(receiver)
                processes.append(process)
            return _collect(receivers, time.monotonic() + timeout, may_die)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _run_rank(
    call: tuple[str, str, bytes],
    place: tuple[int, int, str, str, float, bool],
    sender: Connection,
) -> None:
    """Body of a rank's process: sends (True, result) or (False, traceback)."""
    path, name, encoded_args = call
    rank, world_size, backend, init_method, timeout, some_die = place
    try:
        torch.set_num_threads(1)
        device = torch.device("cuda", rank) if backend == "nccl" else None
        if device is not None:
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend,
            init_method=init_method,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
            device_id=device,
        )
        outcome = _encode((True, getattr(_load(path), name)(rank, *_decode(encoded_args))))
        # A rank that leaves early closes connections from which others may still be reading.
        if not some_die:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        outcome = _encode((False, traceback.format_exc()))
    sender.send_bytes(outcome)


def _encode(value: Any) -> bytes:
    # multiprocessing would share a tensor's memory, which ends with the process that made it.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _decode(encoded: bytes) -> Any:
    return torch.load(io.BytesIO(encoded), weights_only=False)


def _load(path: str) -> Any:
    # By path: under importlib mode, pytest's names for test modules mean nothing to import.
    loader = SourceFileLoader(Path(path).stem, path)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _collect(receivers: list[Connection], deadline: float, may_die: Collection[int]) -> list[Any]:
    """Results by rank; raises at the first rank that failed."""
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = [rank for rank in range(len(receivers)) if rank not in results]
        ready = wait([receivers[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"rank(s) {', '.join(map(str, waiting))} had not returned in time")
        for rank in waiting:
            if receivers[rank] in ready:
                results[rank] = _receive(receivers[rank], rank, rank in may_die)
    return [results[rank] for rank in range(len(receivers))]


def _receive(receiver: Connection, rank: int, may_die: bool) -> Any:
    try:
        succeeded, result = _decode(receiver.recv_bytes())
    except EOFError:
        if may_die:
            return None
        raise RuntimeError(f"rank {rank} died without a word: look at its stderr") from None
    if not succeeded:
        raise RuntimeError(f"rank {rank} failed:\n{result}")
    return result
