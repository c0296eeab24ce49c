"""What is looked at while a run trains, on demand: a profile, a memory snapshot, norms by layer.

Nothing of it runs unless asked for, and only in the first process.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tilewright_train.memory_snapshot import MemoryRecorder
from tilewright_train.profiling import StepProfiler
from tilewright_train.whole_files import write_whole

_NORMS = "grad_norms.jsonl"


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """What to look at, and where to write it."""

    folder: Path
    """Of the run."""
    profile: tuple[int, int] | None = None
    """Steps to profile: the first, and the one behind the last."""
    memory: tuple[int, int] | None = None
    """Steps whose allocations are recorded, likewise."""
    norms_every: int | None = None
    """Steps between norms of the gradients by layer."""
    say: Callable[[str], None] = print
    """Takes what was found."""


class Watch:
    """Looks at the steps of one process.

    Args:
        model: Without wrappers.
        options: What is asked for; None for nothing at all.
    """

    def __init__(self, model: nn.Module, options: WatchOptions | None) -> None:
        self._model = model
        self._options = options
        self._profiler: StepProfiler | None = None
        self._recorder: MemoryRecorder | None = None
        self._done = 0

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Everything of step `number`, the first is 1."""
        options = self._options
        if options is None:
            yield
            return
        if options.profile and number == options.profile[0]:
            self._profiler = StepProfiler(self._model, options.folder / "profile", options.profile)
        if options.memory and number == options.memory[0]:
            self._recorder = MemoryRecorder(options.folder / "memory", options.memory)
        yield
        self._done = number
        if self._profiler is not None and options.profile and number + 1 == options.profile[1]:
            self.close_profile()
        if self._recorder is not None and options.memory and number + 1 == options.memory[1]:
            self.close_memory()

    def range(self, name: str) -> AbstractContextManager[object]:
        """A named part of a step, where it is profiled."""
        return contextlib.nullcontext() if self._profiler is None else self._profiler.range(name)

    def gradients(self, number: int, scale: Tensor | None) -> None:
        """Called with all gradients there, before the update.

        Args:
            number: Of the step.
            scale: What the loss was multiplied by.
        """
        options = self._options
        if options is None or not options.norms_every or number % options.norms_every:
            return
        norms = norms_by_layer(self._model, scale)
        with (options.folder / _NORMS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": number, "norms": norms}) + "\n")

    def resume(self, done: int) -> None:
        """Drop the norms behind the step with which the run goes on; they come again."""
        if self._options is not None:
            truncate_norms(self._options.folder / _NORMS, done)

    def close_profile(self) -> None:
        """Write the profile of the steps so far."""
        if self._profiler is not None and self._options is not None:
            profiler, self._profiler = self._profiler, None
            for line in profiler.close(self._done):
                self._options.say(line)

    def close_memory(self) -> None:
        """Write the snapshot of the steps so far."""
        if self._recorder is not None and self._options is not None:
            recorder, self._recorder = self._recorder, None
            for line in recorder.close():
                self._options.say(line)

    def close(self) -> None:
        """End what is under way; a run may be shorter than it was asked to be looked at."""
        self.close_profile()
        self.close_memory()


def truncate_norms(file: Path, done: int) -> None:
    """Keep the whole lines of steps up to `done`."""
    if not file.exists():
        return
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
    if kept != lines:
        write_whole(file, "".join(kept))


def norms_by_layer(model: nn.Module, scale: Tensor | None = None) -> dict[str, float | None]:
    """Norm of the gradients of each block and each other part; None where it is not finite.

    Args:
        model: After a backward.
        scale: What the loss was multiplied by.
    """
    layers: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            layers.setdefault(layer_of(name), []).append(parameter.grad)
    norms = {
        layer: torch.stack(torch._foreach_norm(grads, 2.0, dtype=torch.float32)).norm()
        for layer, grads in layers.items()
    }
    values = torch.stack(list(norms.values())) / (1.0 if scale is None else scale)
    return _finite(dict(zip(norms, values.tolist(), strict=True)))


def layer_of(name: str) -> str:
    """«layers.3» of «layers.3.mlp.down_proj.weight», «norm» of «norm.weight»."""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == "layers" else words[0]


def _finite(norms: Mapping[str, float]) -> dict[str, float | None]:
    return {k: v if v - v == 0 else None for k, v in norms.items()}
