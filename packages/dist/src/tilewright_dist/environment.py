"""The process's place among the ranks, read from what torchrun sets.

A program calls `init_from_environment` once, at its entry, and hands the process group on to
whatever communicates. Nothing here is kept between calls.
"""

import os
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_ADDRESS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
_PATIENCE = timedelta(minutes=30)
"""How long ranks of one start wait for each other: torch's own for gloo."""


@dataclass(frozen=True, kw_only=True)
class DistributedEnvironment:
    """Where this process runs and whom it talks to.

    A context manager: leaving the block shuts the process group down.
    """

    rank: int = 0
    """Number of this process among all, from 0."""
    world_size: int = 1
    """Number of processes."""
    local_rank: int = 0
    """Number of this process among those of its host, from 0."""
    device: torch.device
    """Where this process computes; on CUDA with an index."""
    distributed: bool = False
    """Whether torchrun started this process, and so whether there is a process group."""

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """All ranks; None without torchrun and after the shutdown."""
        # Looked up, not held: see DistributedDataParallel on what a kept reference does at exit.
        return dist.group.WORLD if self.distributed else None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    def shutdown(self) -> None:
        """Wait for all ranks, then destroy the process group. A second call does nothing.

        Keep no reference to the group in a global variable: gloo's threads would run on until the
        interpreter shuts down, and can abort the process there.
        """
        if self.process_group is not None:
            # A rank that leaves early closes connections from which others may still be reading.
            dist.barrier()
            dist.destroy_process_group()

    def __enter__(self) -> "DistributedEnvironment":
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exception_type is None:
            self.shutdown()
        elif self.process_group is not None and not self._waits_for_peers:
            # The other ranks are not coming to a barrier. Closed connections end their waiting.
            dist.destroy_process_group()

    @property
    def _waits_for_peers(self) -> bool:
        # NCCL tears communicators down together: a rank that failed would hang in it until the
        # timeout, where its exit lets torchrun stop the others at once.
        return self.device.type == "cuda" and self.world_size > 1


def init_from_environment(
    device: str | torch.device | None = None, *, timeout: timedelta | None = None
) -> DistributedEnvironment:
    """Join the process group that torchrun describes, or none without torchrun.

    Under torchrun (RANK, WORLD_SIZE and LOCAL_RANK are set) the default process group of
    torch.distributed is initialised, NCCL for CUDA and gloo for the CPU, also for one rank. A CUDA
    device becomes the current one.

    Args:
        device: "cuda" or "cpu"; None takes CUDA where there is one. Under torchrun each rank of a
            host gets the CUDA device numbered LOCAL_RANK; a single process may name an index.
        timeout: How long a collective waits for the other ranks; None is torch's default
            (10 minutes for NCCL, 30 for gloo).

    Returns:
        The environment of this process; close it with `with` or `shutdown()`.

    Raises:
        ValueError: Variables of torchrun that are incomplete, no integers or out of range; a device
            that is not there; a process group that exists already.
    """
    if dist.is_initialized():
        raise ValueError(
            "a process group is initialised already: call init_from_environment once, at the "
            "program's entry, and pass its result on"
        )
    places = _read_places()
    if places is None:
        return DistributedEnvironment(device=_select_device(device, local_rank=None))

    rank, world_size, local_rank = places
    selected = _select_device(device, local_rank)
    dist.init_process_group(
        "nccl" if selected.type == "cuda" else "gloo",
        store=_store_after_a_restart(rank, world_size, timeout),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=selected if selected.type == "cuda" else None,
    )
    return DistributedEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        device=selected,
        distributed=True,
    )


def _store_after_a_restart(
    rank: int, world_size: int, timeout: timedelta | None
) -> dist.Store | None:
    """Where ranks find each other, without what ranks of an earlier start have left there.

    torchrun keeps one store over its restarts: ranks that start again would read addresses of those
    that died, and wait for them. So all keys of a start get a name before them that it alone has.

    Returns:
        None where nothing is kept, and torch may make the store.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout or _PATIENCE))
    return dist.PrefixStore(agree_on_name(store, rank, world_size, timeout or _PATIENCE), store)


def agree_on_name(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that rank 0 draws and all ranks of this start learn, whatever the store holds.

    Every other rank asks under a key with its rank, which one that died may have done before it; it
    is answered, and says that it knows, under keys that nobody has had.

    Raises:
        RuntimeError: A rank does not come in time.
    """
    mine = uuid.uuid4().hex
    if rank != 0:
        store.set(f"start/ask/{rank}", mine)
        store.wait([f"start/answer/{mine}"], timeout)
        name = store.get(f"start/answer/{mine}").decode()
        store.set(f"start/known/{name}/{rank}", "")
        return name
    absent = set(range(1, world_size))
    deadline = time.monotonic() + timeout.total_seconds()
    while absent:
        for other in sorted(absent):
            if store.check([f"start/known/{mine}/{other}"]):
                absent.remove(other)
            elif store.check([f"start/ask/{other}"]):
                asker = store.get(f"start/ask/{other}").decode()
                store.set(f"start/answer/{asker}", mine)
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank(s) {', '.join(map(str, sorted(absent)))} did not start")
        time.sleep(0.01)
    return mine


def _read_places() -> tuple[int, int, int] | None:
    """Rank, world size and local rank; None where torchrun set none of them."""
    if not any(name in os.environ for name in _RANK_VARIABLES):
        return None
    missing = [n for n in _RANK_VARIABLES + _ADDRESS_VARIABLES if not os.environ.get(n)]
    if missing:
        present = [name for name in _RANK_VARIABLES if name in os.environ]
        raise ValueError(
            f"{', '.join(present)} set but not {', '.join(missing)}: start the program with "
            "torchrun, which sets them all, or unset all of them for a single process"
        )
    values = []
    for name in _RANK_VARIABLES:
        text = os.environ[name]
        if not text.isdecimal():
            raise ValueError(f"{name}={text!r} is not a non-negative integer: torchrun sets it")
        values.append(int(text))
    rank, world_size, local_rank = values
    if rank >= world_size or local_rank >= world_size:
        raise ValueError(
            f"RANK={rank} and LOCAL_RANK={local_rank} must be below WORLD_SIZE={world_size}"
        )
    return rank, world_size, local_rank


def _select_device(device: str | torch.device | None, local_rank: int | None) -> torch.device:
    """The device to compute on, made current if it is a CUDA device."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"device {str(device)!r} is not supported; valid: 'cuda', 'cpu'")
    if device.index is not None and local_rank is not None:
        raise ValueError(
            f"device {str(device)!r} names one GPU for all ranks: pass 'cuda', and each rank takes "
            "the one numbered LOCAL_RANK"
        )
    index = device.index if local_rank is None else local_rank
    index = index or 0
    count = torch.cuda.device_count()
    if index >= count:
        remedy = "pass device='cpu'"
        if local_rank is not None and count > 0:
            remedy = f"start torchrun with --nproc-per-node {count}, or {remedy}"
        raise ValueError(f"CUDA device {index} is not there ({count} seen): {remedy}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
