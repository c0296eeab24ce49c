"""Failures that name their rank: one that died, one that hangs, one that makes infinities.

A collective that a rank does not join ends, on gloo, with a closed connection or a timeout, neither
of which says who is missing. `naming_the_missing` holds a roll call then: every rank that is alive
signs in the group's store, which does not depend on the broken connections, and whoever has not
signed after some seconds is named. NCCL reports in its watchdog, which ends the process after the
group's timeout; torchrun then ends the others and starts all again.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

ROLL_CALL_SECONDS = 5.0
"""How long ranks wait for each other's signatures. They fail at about the same time: a closed
connection is seen at once, and timeouts began with the same collective."""


class RankFailure(RuntimeError):
    """A collective failed; the message names the ranks that do not answer."""


class NonFiniteGradientError(RuntimeError):
    """A gradient is infinite or NaN; the message names parameters and ranks."""


@contextlib.contextmanager
def naming_the_missing(process_group: dist.ProcessGroup, step: int) -> Iterator[None]:
    """Turn an error of the backend into one that names the ranks that no longer answer.

    Args:
        process_group: The group whose collectives run inside.
        step: Number of the synchronization, the same on all ranks.

    Raises:
        RankFailure: From the backend's error.
    """
    try:
        yield
    except RuntimeError as error:
        # Of gloo's errors most are plain RuntimeErrors; ours begin otherwise.
        if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        missing = absent_ranks(process_group, f"synchronization {step}")
        who = (
            f"rank(s) {', '.join(map(str, missing))} died or hang" if missing else "all ranks live"
        )
        raise RankFailure(
            f"rank {dist.get_rank()}: gradient synchronization {step} failed, {who}. Restart from "
            "the last checkpoint (torchrun --max-restarts does)"
        ) from error


def absent_ranks(
    process_group: dist.ProcessGroup, occasion: str, seconds: float = ROLL_CALL_SECONDS
) -> list[int]:
    """The ranks that do not sign within some seconds; all others call this too.

    Args:
        process_group: The ranks asked.
        occasion: A text that all of them give, new for each roll call.
        seconds: How long to wait.

    Returns:
        Global ranks. When the store itself is gone, with the process that held it, that is rank 0,
        unless torchrun holds it.
    """
    ranks = dist.get_process_group_ranks(process_group)
    try:
        store = process_group.get_group_store()
        store.set(f"{occasion}: alive {dist.get_rank()}", "")
    except RuntimeError:
        return [0]
    absent = set(ranks) - {dist.get_rank()}
    deadline = time.monotonic() + seconds
    while absent and time.monotonic() < deadline:
        for rank in sorted(absent):
            with contextlib.suppress(RuntimeError):
                store.wait([f"{occasion}: alive {rank}"], timedelta(milliseconds=100))
                absent.remove(rank)
    return sorted(absent)


class NonFiniteGradients:
    """Notes, on the device, which of this rank's own gradients are not finite.

    Args:
        names: Of all parameters, the same on every rank.
        device: Where the gradients are.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._index = {name: index for index, name in enumerate(names)}
        self._found = torch.zeros(len(names), dtype=torch.uint8, device=device)

    def inspect(self, name: str, gradient: torch.Tensor | None) -> None:
        """Note a gradient that arrived, before it is averaged."""
        if gradient is not None:
            self._found[self._index[name]] |= ~gradient.isfinite().all()

    def report(self, process_group: dist.ProcessGroup) -> None:
        """Compare notes. Collective; waits for the device.

        Raises:
            NonFiniteGradientError: On every rank alike.
        """
        everyone = self._found.new_empty(process_group.size(), len(self._found))
        dist.all_gather_into_tensor(everyone.view(-1), self._found, group=process_group)
        self._found.zero_()
        found = everyone.cpu().nonzero().tolist()
        if not found:
            return
        names = list(self._index)
        ranks = dist.get_process_group_ranks(process_group)
        listed = [f"{names[index]!r} on rank {ranks[rank]}" for rank, index in found]
        more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
        raise NonFiniteGradientError(
            f"gradients are infinite or NaN before averaging: {', '.join(listed[:10])}{more}"
        )
