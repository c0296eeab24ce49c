"""One direction of a function as a call, and how far its result is from float64's."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewright_bench.case import Case, Direction, Function
from tilewright_bench.timer import Call

Inputs = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the comparison with float64 says about a function.

    Attributes:
        error: ‖result − float64 result‖ / ‖float64 result‖, the largest over results or gradients;
            NaN where a result holds one.
        overwrites: whether the call left other values in its inputs.
    """

    error: float
    overwrites: bool


class Oracle:
    """A case's reference, evaluated once in float64, on the inputs that the case gives for it."""

    def __init__(self, case: Case, direction: Direction, device: torch.device) -> None:
        self._case, self._direction, self._device = case, direction, device
        self._inputs = self._fresh_inputs()
        wide = tuple(
            t.detach().double().requires_grad_(t.requires_grad) if _is_floating(t) else t
            for t in self._inputs
        )
        self._expected = _evaluate(case.reference, wide, direction)

    def judge(self, function: Function) -> Verdict:
        """Run the function once and compare."""
        inputs = self._fresh_inputs()
        ours = _evaluate(function, inputs, self._direction)
        tiny = torch.finfo(torch.float64).tiny
        errors = [
            (a.double() - b.double()).norm() / b.double().norm().clamp_min(tiny)
            for a, b in zip(ours, self._expected, strict=True)
        ]
        return Verdict(
            error=torch.stack(errors).max().item(),
            overwrites=any(
                isinstance(a, Tensor) and not torch.equal(a, b)
                for a, b in zip(inputs, self._inputs, strict=True)
            ),
        )

    def _fresh_inputs(self) -> Inputs:
        return self._case.inputs(self._device, seed=0, to_check=True)


def directed(function: Function, inputs: Inputs, direction: Direction) -> Call:
    """A call without arguments that runs one direction on one set of inputs.

    Returns the results (fwd) or the gradients (bwd, fwd+bwd) of all inputs that require grad, from
    all results that have one. For "bwd" the forward runs here, once, and its graph is kept.
    """
    if direction == "fwd":
        return lambda: function(*inputs)
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    if not wanted:
        raise ValueError(f"no input requires grad, so there is no {direction} to time")

    def forward() -> list[Tensor]:
        return [t for t in tensors(function(*inputs)) if t.requires_grad]

    results = forward()
    grads = [_output_gradient(t) for t in results]
    if direction == "fwd+bwd":
        results.clear()
        return lambda: torch.autograd.grad(forward(), wanted, grads)
    return lambda: torch.autograd.grad(results, wanted, grads, retain_graph=True)


def restoring(overwritten: Iterable[Inputs], kept: Iterable[Inputs]) -> Call:
    """A call that gives tensors the values of others again, unseen by autograd."""
    targets, sources = [], []
    for ours, theirs in zip(overwritten, kept, strict=True):
        for target, source in zip(ours, theirs, strict=True):
            if isinstance(target, Tensor):
                targets.append(target.data)  # shares the values, not the version counter
                sources.append(source.detach())
    return lambda: torch._foreach_copy_(targets, sources)


def error_limit(dtype: torch.dtype) -> float:
    """Largest relative error of a result that counts as right, TF32 products included."""
    return max(4 * torch.finfo(dtype).eps, 1e-3)


def tensors(outcome: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The results of a function as a tuple."""
    return (outcome,) if isinstance(outcome, Tensor) else tuple(outcome)


def _evaluate(function: Function, inputs: Inputs, direction: Direction) -> tuple[Tensor, ...]:
    """What errors are taken of: the results, the gradients, or for "fwd+bwd" both."""
    found = list(tensors(directed(function, inputs, direction)()))
    if direction == "fwd+bwd":  # after the gradients: it may write over its inputs
        found += tensors(function(*inputs))
    return tuple(t.detach() for t in found)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _output_gradient(result: Tensor) -> Tensor:
    """1 for a loss, as loss.backward() passes; else random, the same values in every dtype."""
    if result.dim() == 0:
        return torch.ones_like(result)
    generator = torch.Generator(result.device).manual_seed(1)
    # Drawn in bfloat16, which every dtype holds exactly: the float64 oracle gets the same values.
    values = torch.randn(
        result.shape, generator=generator, device=result.device, dtype=torch.bfloat16
    )
    return values.to(result.dtype)
