"""Which parameter and which batch made a step's numbers no numbers: named, and kept.

A step that was left out is computed once more, part by part, with hooks that look at every module's
output. The weights may be one update further by then, as the host learns of a step late; what is
found is said to be of those weights.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tilewright_train.batches import Batch
from tilewright_train.replicas import own_rows

MOST_KEPT = 20
"""Batches that a run keeps; later ones are only named."""


@dataclass(frozen=True)
class LeftOut:
    """A step whose update was not made."""

    step: int
    """Its number, the first is 1."""
    why: str
    """«not finite» or «spike»."""
    loss: float
    """Of all processes."""
    norm: float
    """Of the gradients."""
    lr: float
    """That it would have been made with."""
    in_a_row: int
    """Updates left out one after another, this one included."""
    scale: float
    """What the loss was multiplied by."""
    own_loss: float = 0.0
    """This process's part of the loss, as it was in the step."""

    @property
    def is_overflow(self) -> bool:
        """Whether only the loss scale was too large, which the next steps mend."""
        finite = self.loss == self.loss and abs(self.loss) != float("inf")
        return self.why == "not finite" and finite and self.scale > 1


@torch.no_grad()
def broken_parameter(model: nn.Module) -> str | None:
    """The first parameter with a value that is not finite, and how many this process has of it."""
    parameters = {name: own_rows(p) for name, p in model.named_parameters()}
    if torch.stack([p.isfinite().all() for p in parameters.values()]).all():  # one wait for the GPU
        return None
    for name, parameter in parameters.items():
        finite = parameter.isfinite()
        if not finite.all():
            return f"{name} ({int((~finite).sum())} of {parameter.numel()} values not finite)"
    return None


def find_guilty(model: nn.Module, compute_loss: Callable[[], Tensor]) -> str | None:
    """What is first to be not finite: a parameter, an output, or a gradient.

    No gradient is stored and the random generators are as they were afterwards.

    Args:
        model: Whose parameters and modules are looked at.
        compute_loss: Runs it on the batch in question.

    Returns:
        One of «parameter NAME …», «output of NAME», «gradient of NAME», «loss»; None where
        everything is finite.
    """
    if broken := broken_parameter(model):
        return f"parameter {broken}"
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    # Compiled blocks run as they are written: a compiler would trace what looks at their outputs.
    eagerly = torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng(devices), eagerly, _watching(model) as seen:
        loss = compute_loss()
        if seen:
            return f"output of {seen[0]}"
        if not loss.isfinite().all():
            return "loss"
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    # Backward goes from the last parameter to the first; a tied embedding is met at both ends.
    ordered = [*named[1:], named[0]]
    of = dict(zip((name for name, _ in named), gradients, strict=True))
    for name, _ in reversed(ordered[:-1] or ordered):
        gradient = of[name]
        if gradient is not None and not gradient.isfinite().all():
            return f"gradient of {name}"
    first = of[ordered[-1][0]]
    if first is not None and not first.isfinite().all():
        return f"gradient of {ordered[-1][0]}"
    return None


def find_guilty_together(
    model: nn.Module, compute_loss: Callable[[], Tensor], anyone: Callable[[str | None], bool]
) -> str | None:
    """`find_guilty` under FSDP, where all processes compute together, and stop together.

    Gradients of parameters are there as averages over all processes; what tells whose they were is
    the gradients of outputs, which are looked at first.

    Args:
        model: Its parameters are divided at the moment.
        compute_loss: Runs it on this process's batch.
        anyone: Whether any process has found something; called by all together.

    Returns:
        As `find_guilty`, or «gradient of the output of NAME»; None where others found something.
    """
    broken = broken_parameter(model)
    found = f"parameter {broken}" if broken else None
    if anyone(found):
        return found
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    eagerly = torch.compiler.set_stance("force_eager")
    named = dict(model.named_parameters())
    backwards: list[str] = []
    with torch.random.fork_rng(devices), eagerly, _watching(model, backwards) as seen:
        loss = compute_loss()
        found = f"output of {seen[0]}" if seen else None
        if found is None and not loss.isfinite().all():
            found = "loss"
        if anyone(found):
            return found
        loss.backward()
    found = f"gradient of the output of {backwards[0]}" if backwards else None
    if not anyone(found):
        grads = {name: own_rows(p.grad) for name, p in named.items() if p.grad is not None}
        bad = [name for name, grad in grads.items() if not grad.isfinite().all()]
        found = f"gradient of {bad[-1]}" if bad else None
    for parameter in named.values():
        parameter.grad = None
    return found


@contextmanager
def _watching(model: nn.Module, backwards: list[str] | None = None) -> Iterator[list[str]]:
    """Names of modules, in the order in which they return something that is not finite.

    Args:
        model: Whose modules.
        backwards: Gets those whose outputs have gradients that are not finite, as they come.
    """
    seen: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look_back(grad: Tensor) -> None:
            if backwards is not None and not backwards and not grad.isfinite().all():
                backwards.append(name)

        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not seen and not all(t.isfinite().all() for t in _tensors(output)):
                seen.append(name)
            for tensor in _tensors(output):
                if backwards is not None and tensor.requires_grad:
                    tensor.register_hook(look_back)

        return look

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                stack.callback(module.register_forward_hook(watch(name)).remove)
        yield seen


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)


def keep_batch(
    folder: Path, left_out: LeftOut, guilty: str | None, part: int, batch: Batch
) -> Path | None:
    """Write a batch and what is known of its step; None where enough have been kept.

    Args:
        folder: Of all of them.
        left_out: The step.
        guilty: Of `find_guilty`.
        part: Number of the batch among those of the step in this process.
        batch: What was computed.
    """
    place = folder / f"step-{left_out.step:06d}"
    if not place.exists() and len(list(folder.glob("step-*"))) >= MOST_KEPT:
        return None
    place.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.cpu().clone() for k, v in vars(batch).items() if isinstance(v, Tensor)}
    save_file(tensors, place / "batch.safetensors")
    facts = {**{k: _json(v) for k, v in asdict(left_out).items()}, "guilty": guilty, "part": part}
    (place / "step.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return place


def _json(value: Any) -> Any:
    """JSON has no word for numbers that are not finite."""
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return str(value)
    return value
