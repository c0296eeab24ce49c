"""A profile of some steps: torch.profiler's trace, and tables of ranges and of top kernels.

Ranges are named in the trace and for NVTX (Nsight Systems shows them): «attention», «mlp» and
«loss», each forward and backward, «optimizer» and «communication». Hooks on the modules open and
close them, so a step is a little slower while it is profiled.

A block that torch.compile has compiled is one piece of code, in which no hook runs: it is one
range, «block», and the table says so.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import set_checkpoint_early_stop

_TOP = 20
RANGES = ("attention", "mlp", "block", "loss", "optimizer", "communication")
_BLOCK = "block"
COMPILED = (
    "(compiled blocks are one piece of code: block is attention, mlp and norms; without --compile"
    " they have ranges of their own)"
)


class Row(Protocol):
    """One row of torch.profiler's averages."""

    key: str
    count: int
    self_device_time_total: float
    device_time_total: float
    self_cpu_time_total: float
    cpu_time_total: float


class StepProfiler:
    """Profiles from now on, until it is closed.

    Args:
        model: Without wrappers; its blocks' attention and MLP become ranges, or compiled blocks.
        folder: Takes `trace.json.gz` and `kernels.txt`.
        steps: The first, and the one behind the last; for the text.
    """

    def __init__(self, model: nn.Module, folder: Path, steps: tuple[int, int]) -> None:
        self._folder = folder
        self._steps = steps
        self._on_gpu = next(model.parameters()).is_cuda
        self._open: list[tuple[str, Any]] = []
        self._compiled = [m for m in model.modules() if m._compiled_call_impl is not None]
        self._hooks = [*self._add_hooks(model), *map(self._surround, self._compiled)]
        activities = [ProfilerActivity.CPU]
        if self._on_gpu:
            torch.cuda.synchronize()
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities, acc_events=True)
        self._profile.__enter__()
        # What is computed again in backward otherwise ends before its hooks close their ranges.
        self._whole = set_checkpoint_early_stop(False)
        self._whole.__enter__()

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        """A named range."""
        self._begin(name)
        try:
            yield
        finally:
            self._end()

    def close(self, last: int) -> list[str]:
        """Write trace and tables; the lines that a person is told.

        Args:
            last: Step that was done; a run may end before all were that it was asked for.
        """
        if self._on_gpu:
            torch.cuda.synchronize()
        while self._open:  # what a hook opened and none closed
            self._end()
        self._profile.__exit__(None, None, None)
        self._whole.__exit__(None, None, None)
        for hook in self._hooks:
            hook.remove()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / "trace.json.gz"
        self._profile.export_chrome_trace(str(trace))
        rows: Any = self._profile.key_averages()
        steps = self._steps[0], max(self._steps[0], last) + 1
        text = tables(rows, steps, on_gpu=self._on_gpu, compiled=bool(self._compiled))
        (self._folder / "kernels.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
        return [f"profile      {trace}", *(f"  {line}" for line in text)]

    def _begin(self, name: str) -> None:
        if self._on_gpu:
            torch.cuda.nvtx.range_push(name)
        entered = record_function(name)
        entered.__enter__()
        self._open.append((name, entered))

    def _end(self) -> None:
        if self._open:
            self._open.pop()[1].__exit__(None, None, None)
            if self._on_gpu:
                torch.cuda.nvtx.range_pop()

    def _add_hooks(self, model: nn.Module) -> Iterator[Any]:
        inside = {id(part) for block in self._compiled for part in block.modules()}
        for name, module in model.named_modules():
            if id(module) in inside:
                continue
            kind = {"self_attn": "attention", "mlp": "mlp"}.get(name.rpartition(".")[2])
            if kind is not None:
                yield module.register_forward_pre_hook(self._opener(kind))
                yield module.register_forward_hook(self._closer())
                yield module.register_full_backward_pre_hook(self._opener(f"{kind} backward"))
                yield module.register_full_backward_hook(self._closer())
        norm = getattr(model, "norm", None)
        if isinstance(norm, nn.Module):
            # What follows the last norm is the loss, until the model returns.
            yield norm.register_forward_hook(self._opener("loss"))
            yield model.register_forward_hook(self._closer())

    def _surround(self, block: Any) -> "_Restored":
        """Make a range of a compiled block, from outside: what is compiled stays as it is."""
        compiled = block._compiled_call_impl

        def called(*inputs: Any, **named: Any) -> Any:
            x = inputs[0]
            if x.requires_grad:
                x.register_hook(lambda _: self._end_block())
            self._begin(_BLOCK)
            outputs = compiled(*inputs, **named)
            self._end()
            for output in outputs if isinstance(outputs, tuple) else (outputs,):
                if isinstance(output, torch.Tensor) and output.requires_grad:
                    output.register_hook(lambda _: self._begin_block())
                    break
            return outputs

        block._compiled_call_impl = called
        return _Restored(block, compiled)

    def _begin_block(self) -> None:
        """The gradient of a block's output is there: the block behind it is through."""
        self._end_block()
        self._begin(f"{_BLOCK} backward")

    def _end_block(self) -> None:
        """The gradient of a block's input is there; its hook may run behind that of an output."""
        if self._open and self._open[-1][0] == f"{_BLOCK} backward":
            self._end()

    def _opener(self, name: str) -> Callable[..., None]:
        def begin(*_: Any) -> None:
            self._begin(name)

        return begin

    def _closer(self) -> Callable[..., None]:
        def end(*_: Any) -> None:
            self._end()

        return end


@dataclass(frozen=True)
class _Restored:
    """A compiled block and how it is called without a range."""

    block: Any
    compiled: Callable[..., Any]

    def remove(self) -> None:
        """Have it called so again."""
        self.block._compiled_call_impl = self.compiled


def tables(
    rows: Sequence[Row], steps: tuple[int, int], *, on_gpu: bool, compiled: bool = False
) -> list[str]:
    """Time by range, and the kernels (on a CPU: operators) that take most, as text.

    Args:
        rows: Averages of torch.profiler.
        steps: The first, and the one behind the last.
        on_gpu: Whether times are the device's.
        compiled: Whether blocks are compiled.
    """
    count = steps[1] - steps[0]
    named = {f"{name}{end}" for name in RANGES for end in ("", " backward")}
    ranges = [row for row in rows if row.key in named and _total(row, on_gpu) > 0]
    kernels = [
        row
        for row in rows
        if row.key not in named and _own(row, on_gpu) > 0 and _is_kernel(row, on_gpu)
    ]
    kernels.sort(key=lambda row: -_own(row, on_gpu))
    whole = sum(_own(row, on_gpu) for row in kernels) or 1.0
    what = "kernel" if on_gpu else "operator"
    lines = [
        f"steps {steps[0]} to {steps[1] - 1}: {whole / 1e3 / count:.2f} ms of {what}s a step",
        f"{'range':<24}{'calls/step':>12}{'ms/step':>10}",
    ]
    for row in sorted(_merged(ranges, on_gpu).items(), key=lambda item: -item[1][1]):
        name, (calls, microseconds) = row
        lines.append(f"{name:<24}{calls / count:>12.0f}{microseconds / 1e3 / count:>10.2f}")
    if compiled:
        lines.append(COMPILED)
    lines.append(f"{what:<56}{'calls/step':>12}{'ms/step':>10}{'share':>8}")
    for row in kernels[:_TOP]:
        own = _own(row, on_gpu)
        name = row.key if len(row.key) <= 54 else row.key[:51] + "..."
        lines.append(
            f"{name:<56}{row.count / count:>12.0f}{own / 1e3 / count:>10.3f}{own / whole:>8.1%}"
        )
    return lines


def _merged(ranges: Sequence[Row], on_gpu: bool) -> dict[str, tuple[int, float]]:
    """Calls and microseconds by name: the trace may list a range for the host and the device."""
    merged: dict[str, tuple[int, float]] = {}
    for row in ranges:
        calls, microseconds = merged.get(row.key, (0, 0.0))
        merged[row.key] = max(calls, row.count), max(microseconds, _total(row, on_gpu))
    return merged


def _own(row: Row, on_gpu: bool) -> float:
    return row.self_device_time_total if on_gpu else row.self_cpu_time_total


def _total(row: Row, on_gpu: bool) -> float:
    return row.device_time_total if on_gpu else row.cpu_time_total


def _is_kernel(row: Row, on_gpu: bool) -> bool:
    """Neither a range nor, on a GPU, an operator of the host, which has its kernels' time too."""
    if getattr(row, "is_user_annotation", False) or row.key.startswith("Optimizer."):
        return False
    return not on_gpu or row.self_cpu_time_total == 0
