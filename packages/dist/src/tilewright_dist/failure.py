"""Failures that name their rank: one that died, hangs, makes infinities or has other weights.

A collective that a rank does not join ends, on gloo, with a closed connection or a timeout, neither
of which says who is missing. `naming_the_missing` holds a roll call then: every rank that is alive
signs in the group's store, which does not depend on the broken connections, and whoever has not
signed after some seconds is named. NCCL reports in its watchdog, which ends the process after the
group's timeout; torchrun then ends the others and starts all again.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from tilewright_dist.agreement import gather_objects
from tilewright_dist.channel import CollectiveError

ROLL_CALL_SECONDS = 5.0
"""How long ranks wait for each other's signatures. They fail at about the same time: a closed
connection is seen at once, and timeouts began with the same collective."""


_OPEN = "a roll call is open"
"""Key in the store."""

_DIGEST_BYTES = 2**22
"""Looked at together, as 8 bytes for each."""


class RankFailure(RuntimeError):
    """A collective failed; the message names the ranks that do not answer."""


class NonFiniteGradientError(RuntimeError):
    """A gradient is infinite or NaN; the message names parameters and ranks."""


class DivergenceError(RuntimeError):
    """Replicas are no longer equal; the message names tensors and ranks."""


@contextlib.contextmanager
def naming_the_missing(process_group: dist.ProcessGroup, what: str) -> Iterator[None]:
    """Turn an error of the backend into one that names the ranks that no longer answer.

    Args:
        process_group: The group whose collectives run inside.
        what: What failed, for the message.

    Raises:
        RankFailure: From the backend's error.
    """
    try:
        yield
    except (CollectiveError, dist.DistError) as error:
        missing = absent_ranks(process_group)
        who = (
            f"rank(s) {', '.join(map(str, missing))} died or hang" if missing else "all ranks live"
        )
        raise RankFailure(
            f"rank {dist.get_rank()}: {what} failed, {who}. Restart from the last checkpoint "
            "(torchrun --max-restarts does)"
        ) from error


def absent_ranks(process_group: dist.ProcessGroup, seconds: float = ROLL_CALL_SECONDS) -> list[int]:
    """The ranks that do not sign within some seconds; all others call this too, once.

    Ranks may fail in different collectives, so there is one roll call for all. A group whose
    collective failed is of no use afterwards, so there is no second one.

    Args:
        process_group: The ranks asked.
        seconds: How long to wait.

    Returns:
        Global ranks. When the store itself is gone, with the process that held it, that is rank 0,
        unless torchrun holds it.
    """
    ranks = dist.get_process_group_ranks(process_group)
    try:
        store = process_group.get_group_store()
        store.set(_OPEN, "")
        store.set(_signature_of(dist.get_rank()), "")
    except RuntimeError:
        return [0]
    if dist.get_backend(process_group) == "gloo":
        # Closes connections. In a ring only the neighbours of a rank that died see it: this tells
        # theirs, which would sign too late and be named with it.
        process_group._get_backend(torch.device("cpu")).abort()
    absent = set(ranks) - {dist.get_rank()}
    deadline = time.monotonic() + seconds
    while absent and time.monotonic() < deadline:
        for rank in sorted(absent):
            with contextlib.suppress(RuntimeError):
                store.wait([_signature_of(rank)], timedelta(milliseconds=100))
                absent.remove(rank)
    return sorted(absent)


def sign_if_called(process_group: dist.ProcessGroup) -> bool:
    """Sign a roll call that another rank has opened, without one of its own.

    For ranks that wait as well, but began to later: they live, and would say so too late.

    Returns:
        Whether there is nothing left to sign.
    """
    try:
        store = process_group.get_group_store()
        if not store.check([_OPEN]):
            return False
        store.set(_signature_of(dist.get_rank()), "")
    except RuntimeError:
        pass  # the store is gone, and with it whoever asked
    return True


def _signature_of(rank: int) -> str:
    return f"alive after a failure: {rank}"


def verify_replicas(module: nn.Module, process_group: dist.ProcessGroup) -> None:
    """Check that all ranks hold the same parameters and buffers, to the bit.

    Replicas drift apart when a rank's hardware errs, when something updates a parameter on one rank
    only, or when a buffer changes with the data. Reads everything once and waits for the device.
    Collective.

    Raises:
        DivergenceError: On every rank alike, with the tensors and the ranks that differ from most.
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    digests = {name: _digest(tensor) for name, tensor in tensors.items()}
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    stacked = torch.stack([d.to(device) for d in digests.values()])
    everyone = gather_objects(stacked.tolist(), process_group, device)
    ranks = dist.get_process_group_ranks(process_group)
    found = []
    for index, name in enumerate(digests):
        held = [tuple(digest[index]) for digest in everyone]
        usual, _ = Counter(held).most_common(1)[0]
        found += [f"{name!r} on rank {r}" for r, d in zip(ranks, held, strict=True) if d != usual]
    if found:
        more = f" and {len(found) - 10} more" if len(found) > 10 else ""
        raise DivergenceError(
            f"replicas differ from the usual value: {', '.join(found[:10])}{more}. Restart from "
            "the last checkpoint"
        )


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    """[2] int64: the sum of a tensor's bytes as numbers, and the same weighted by their place."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    sums = torch.zeros(2, dtype=torch.int64, device=data.device)
    for number, part in enumerate(data.split(_DIGEST_BYTES)):
        values = part.to(torch.int64)
        places = torch.arange(1, len(part) + 1, device=data.device)
        sums += torch.stack([values.sum(), (values * (places + number)).sum()])
    return sums


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
