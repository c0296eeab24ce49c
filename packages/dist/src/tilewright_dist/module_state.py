"""Equal modules on all ranks: what the ranks hold is compared, then rank 0's values are sent.

The comparison comes first and is itself safe: every rank describes its tensors, all ranks see all
descriptions and come to the same verdict. A broadcast between modules that differ would hang, or
fill tensors with each other's bytes.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from tilewright_dist.agreement import gather_objects

_BROADCAST_BYTES = 25 * 2**20
"""From here on, joining tensors costs more memory than the latency that it saves."""


class _TensorDescription(NamedTuple):
    """What has to agree between ranks for one parameter or buffer."""

    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    device_type: str
    trainable: bool

    def __str__(self) -> str:
        frozen = "" if self.trainable or self.kind == "buffer" else ", frozen"
        dtype = self.dtype.removeprefix("torch.")
        return f"{self.kind} {self.name!r} {dtype} {self.shape} on {self.device_type}{frozen}"


def verify_module_state(module: nn.Module, process_group: dist.ProcessGroup) -> None:
    """Check that all ranks hold the same parameters and buffers, apart from their values.

    Compared are names, order, dtypes, shapes, device types and which parameters are trainable.

    Args:
        module: The replica of this rank.
        process_group: The ranks to compare.

    Raises:
        ValueError: On every rank alike: the first tensor that differs, with what each rank holds
            in its place; or a tensor on the meta device, which has no values to send.
    """
    descriptions = gather_objects(_describe(module), process_group, _device_of(module))
    ranks = dist.get_process_group_ranks(process_group)
    for position in range(max(len(held) for held in descriptions)):
        holders: dict[_TensorDescription | None, list[int]] = {}
        for rank, held in zip(ranks, descriptions, strict=True):
            description = held[position] if position < len(held) else None
            holders.setdefault(description, []).append(rank)
        if len(holders) > 1:
            raise ValueError(_mismatch_message(holders))

    for description in descriptions[0]:
        if description.device_type == "meta":
            raise ValueError(f"{description} has no values yet: call to_empty() and initialise it")


def broadcast_module_state(
    module: nn.Module, process_group: dist.ProcessGroup, device: torch.device
) -> None:
    """Overwrite parameters and buffers with those of rank 0 of the group, bit for bit.

    Args:
        module: Verified by `verify_module_state`.
        process_group: The ranks to send to.
        device: Where the values travel. A buffer that lives elsewhere (a counter on the CPU of a
            module on the GPU) passes through it.
    """
    _broadcast([*module.parameters(), *module.buffers()], process_group, device)


def broadcast_buffers(
    module: nn.Module, process_group: dist.ProcessGroup, device: torch.device
) -> None:
    """Overwrite persistent buffers with those of rank 0 of the group, bit for bit."""
    # .data: a forward that runs before another one's backward (several passes, one loss) must not
    # count as a change of what that one saved; where buffers are constant it is none.
    _broadcast([buffer.data for buffer in persistent_buffers(module)], process_group, device)


def persistent_buffers(module: nn.Module) -> list[torch.Tensor]:
    """Buffers that a state dict holds, once each: others are computed (tables of angles)."""
    return list(
        {
            id(buffer): buffer
            for part in module.modules()
            for name, buffer in part.named_buffers(recurse=False)
            if name not in part._non_persistent_buffers_set
        }.values()
    )


def _broadcast(
    tensors: list[torch.Tensor], process_group: dist.ProcessGroup, device: torch.device
) -> None:
    """Send rank 0's values of tensors, up to 25 MiB of them in a collective."""
    waiting: list[torch.Tensor] = []
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        waiting.append(tensor.detach())
        if sum(t.nbytes for t in waiting) >= _BROADCAST_BYTES:
            _broadcast_together(waiting, process_group, device)
            waiting = []
    if waiting:
        _broadcast_together(waiting, process_group, device)


def _broadcast_together(
    tensors: list[torch.Tensor], process_group: dist.ProcessGroup, device: torch.device
) -> None:
    # As bytes: no backend moves every dtype (bool, float8, complex), all move uint8.
    values = [t.to(device).contiguous().view(-1).view(torch.uint8) for t in tensors]
    joined = values[0] if len(values) == 1 else torch.cat(values)
    dist.broadcast(joined, group=process_group, group_src=0)
    for tensor, part in zip(tensors, joined.split([len(v) for v in values]), strict=True):
        if part.data_ptr() != tensor.data_ptr():
            # A copy: a part of the joined bytes need not lie at a multiple of the element's size.
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))


def _device_of(module: nn.Module) -> torch.device:
    """The first CUDA device in use, the CPU without one."""
    devices = (tensor.device for tensor in [*module.parameters(), *module.buffers()])
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))


def _describe(module: nn.Module) -> list[_TensorDescription]:
    named = [("parameter", n, p) for n, p in module.named_parameters()]
    named += [("buffer", n, b) for n, b in module.named_buffers()]
    return [
        _TensorDescription(
            kind, name, str(tensor.dtype), tuple(tensor.shape), tensor.device.type,
            tensor.requires_grad,
        )
        for kind, name, tensor in named
    ]  # fmt: skip


def _mismatch_message(holders: dict[_TensorDescription | None, list[int]]) -> str:
    described = []
    for description, ranks in holders.items():
        who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        described.append(f"{description or 'nothing in its place'} on {who}")
    return (
        f"the module differs between ranks: {'; '.join(described)}. "
        "Build it from the same configuration on every rank"
    )
