"""What a checkpoint will hold, copied away from the training that goes on meanwhile.

The copy is all that a save keeps the training waiting for: from a GPU it is queued behind the step
into page-locked memory (6 GB of a 0.5 B model in about 0.15 s), and whoever writes it waits for
its event. The memory is kept from one snapshot to the next, so only one may be in use at a time.
The system takes seconds to lock it (4.2 for those 6 GB on an H200's host), so a thread has it done
during the first steps.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tilewright_model import CausalLM, ModelConfig
from tilewright_train import optimizer_state as optimizer_states

Copy = Callable[[str, torch.Tensor], torch.Tensor]
"""Takes a name and a tensor, gives one that later steps leave alone."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The state of a run after a step."""

    step: int
    """Steps that are done."""
    config: ModelConfig
    """Of the model."""
    weights: Mapping[str, torch.Tensor]
    """Its state_dict."""
    optimizer: Mapping[str, torch.Tensor]
    """States by «parameter.state», whole, however many processes hold them."""
    optimizer_record: Mapping[str, Any]
    """JSON: the optimizer's class, its groups, states that are no tensors."""
    scheduler: Mapping[str, Any]
    """JSON: the schedule's state."""
    random: Mapping[str, torch.Tensor]
    """Random generators of every process."""
    tokenizer: str
    """Text of tokenizer.json."""
    chat_template: str | None
    """Text of chat_template.jinja, where the model chats."""
    facts: Mapping[str, Any]
    """JSON; comes back when the checkpoint is loaded."""
    reference: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Of DPO with a moving reference: its weights."""
    arrived: torch.cuda.Event | None = None
    """What to wait for before anything is read."""

    def wait(self) -> None:
        """Return when all copies have arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()


class HostMemory:
    """Memory on the host for copies of tensors, by name."""

    def __init__(self, device: torch.device) -> None:
        """Nothing is allocated before the first copy, or `reserve`.

        Args:
            device: Where the tensors are; from a GPU they are copied to page-locked memory.
        """
        self._pin = device.type == "cuda"
        self._held: dict[str, torch.Tensor] = {}
        self._reserving: threading.Thread | None = None

    def reserve(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Have a thread allocate page-locked memory for copies of these tensors, by name."""
        if not self._pin or self._reserving is not None:
            return
        empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}

        def allocate() -> None:
            for name, tensor in empty.items():
                self._held[name] = self._empty(tensor)

        self._reserving = threading.Thread(target=allocate, daemon=True)
        self._reserving.start()

    def copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Start copying `tensor` over what was copied under this name before."""
        if self._reserving is not None:
            self._reserving.join()
        held = self._held.get(name)
        if held is None or (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
            held = self._held[name] = self._empty(tensor)
        return held.copy_(tensor.detach(), non_blocking=True)

    def _empty(self, tensor: torch.Tensor) -> torch.Tensor:
        """Memory for a copy: page-locked while the system gives any, then plain."""
        if self._pin:
            try:
                return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            except RuntimeError:  # the host keeps waiting for the copies to plain memory
                self._pin = False
        return torch.empty(tensor.shape, dtype=tensor.dtype)


def reserve(
    memory: HostMemory,
    *,
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    reference: Mapping[str, torch.Tensor],
) -> None:
    """Have memory made ready for what `take` will copy.

    Args:
        memory: Where copies will go.
        model: Without wrappers, whole in this process.
        optimizer: Of the model's parameters, which has made an update.
        reference: Weights of a moving reference.
    """
    memory.reserve(
        _by_name(model.state_dict(), optimizer_states.flatten(optimizer, model)[0], reference)
    )


def _by_name(
    weights: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """All tensors of a snapshot, by the names of their copies."""
    return {
        **weights,
        **{f"optimizer {name}": tensor for name, tensor in optimizer.items()},
        **{f"reference {name}": tensor for name, tensor in reference.items()},
    }


def take(
    step: int,
    *,
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    optimizer_state: Mapping[str, Any] | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    random_states: Mapping[str, torch.Tensor],
    tokenizer: str,
    chat_template: str | None = None,
    reference: Mapping[str, torch.Tensor] | None = None,
    facts: Mapping[str, Any],
    memory: HostMemory | None = None,
    fresh: bool = False,
) -> Snapshot:
    """The state after `step`.

    Args:
        step: Steps that are done.
        model: Without wrappers.
        optimizer: Of the model's parameters.
        optimizer_state: Its whole state_dict, where it holds a part; None asks it.
        weights: Copies of all weights, where the model holds a part; None asks it.
        scheduler: Of the optimizer.
        random_states: Of every process.
        tokenizer: Text of tokenizer.json.
        chat_template: Text of chat_template.jinja, where the model chats.
        reference: Weights of a moving reference.
        facts: JSON.
        memory: Where copies go. None makes none: the snapshot is to be written before the next
            step.
        fresh: Whether `optimizer_state` is a copy already.
    """
    tensors, record = optimizer_states.flatten(optimizer, model, optimizer_state)
    held = model.state_dict() if weights is None else weights
    reference = reference or {}
    arrived = None
    if memory is not None:
        if weights is None:
            held = {name: memory.copy(name, tensor) for name, tensor in held.items()}
        reference = {k: memory.copy(f"reference {k}", t) for k, t in reference.items()}
        if not fresh:
            tensors = {name: memory.copy(f"optimizer {name}", t) for name, t in tensors.items()}
        device = next(model.parameters()).device
        if device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(device))
    return Snapshot(
        step=step,
        config=model.config,
        weights=held,
        optimizer=tensors,
        optimizer_record=record,
        scheduler=dict(scheduler.state_dict()),
        random=random_states,
        tokenizer=tokenizer,
        chat_template=chat_template,
        reference=reference,
        facts=facts,
        arrived=arrived,
    )
