"""What is measured: a Case (one operator at one shape) and a Variant (whose code, which direction).

A Case counts the least work that any implementation must do: each input read once, each output
written once, intermediate results free. GB/s of different implementations are then comparable, and
their ratio to a copy of the same bytes says how far from the memory's speed they are.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Direction = Literal["fwd", "bwd", "fwd+bwd"]
Function = Callable[..., Tensor | tuple[Tensor, ...]]

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)

_SHORT = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """The least work of one call.

    Attributes:
        bytes: device memory read and written.
        flops: floating-point operations, an exponential or a division counted as one.
    """

    bytes: int
    flops: int

    def __post_init__(self) -> None:
        if self.bytes < 1 or self.flops < 0:
            raise ValueError(f"{self}: bytes must be at least 1 and flops at least 0")

    def __add__(self, other: "Work") -> "Work":
        return Work(bytes=self.bytes + other.bytes, flops=self.flops + other.flops)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operator at one shape and dtype.

    Attributes:
        operator: the public function's name.
        shape: the sizes that vary between cases, in the operator's own order.
        dtype: of the large tensors.
        make_inputs: (device, generator) -> the arguments of every provider's function, filled with
            random data; tensors with requires_grad are the ones backward differentiates.
        reference: the operator in plain torch, of the same arguments; run in float64 it is what
            errors are measured against.
        forward: least work of the forward.
        backward: least work of the backward alone, its output gradient read.
        forward_backward: of both together, where an implementation may save something by knowing
            that both come; None takes the sum.
        check_inputs: inputs for the comparison with float64 alone, as make_inputs but smaller, for
            cases whose reference would take minutes or more memory than there is.
        products: dtype of the matrix products, where it is not that of the large tensors.
        sets: of inputs to rotate among; None for as many as the L2 cache does not hold. 1 where the
            host's time is the question and each call finds its tensors as the last one left them.
    """

    operator: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make_inputs: Callable[[torch.device, torch.Generator], tuple[Any, ...]]
    reference: Function
    forward: Work
    backward: Work
    forward_backward: Work | None = None
    check_inputs: Callable[[torch.device, torch.Generator], tuple[Any, ...]] | None = None
    products: torch.dtype | None = None
    sets: int | None = None

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape {self.shape} of {self.operator} must hold sizes of 1 or more")
        if self.dtype not in _SHORT:
            raise ValueError(f"dtype {self.dtype} is none of {', '.join(map(str, _SHORT))}")

    def __str__(self) -> str:
        """Shape and dtype as benchmark names have them: 16384x4096-bf16."""
        return f"{'x'.join(map(str, self.shape))}-{_SHORT[self.dtype]}"

    @property
    def numel(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)

    def work(self, direction: Direction) -> Work:
        """Least work of one direction."""
        if direction == "fwd":
            return self.forward
        if direction == "bwd":
            return self.backward
        return self.forward_backward or self.forward + self.backward

    def inputs(self, device: torch.device, seed: int, *, to_check: bool = False) -> tuple[Any, ...]:
        """One set of inputs; the same seed gives the same values on the same device.

        Args:
            device: where to make them.
            seed: of their values.
            to_check: give those for the comparison with float64.
        """
        make = self.check_inputs if to_check and self.check_inputs else self.make_inputs
        return make(device, torch.Generator(device).manual_seed(seed))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One provider's implementation in one direction.

    Attributes:
        provider: whose code: "tilewright", "torch", "compile", "liger" or any other name.
        direction: "fwd" is a training step's forward (gradients enabled); "bwd" is the backward
            alone; "fwd+bwd" is both in one timed call.
        build: returns the function to time. Called when the variant's turn comes, so it is the
            place for imports of packages that may be missing (pytest.importorskip) and for
            torch.compile.
    """

    provider: str
    direction: Direction
    build: Callable[[], Function]

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(
                f"direction {self.direction!r} is none of {', '.join(map(repr, DIRECTIONS))}"
            )

    def __str__(self) -> str:
        """Direction and provider as benchmark names have them: bwd-liger."""
        return f"{self.direction}-{self.provider}"


def variants(
    providers: Mapping[str, Callable[[], Function]],
    directions: tuple[Direction, ...] = ("fwd", "bwd"),
) -> list[Variant]:
    """Every provider in every direction; providers of one direction stand side by side."""
    return [
        Variant(provider=name, direction=direction, build=build)
        for direction in directions
        for name, build in providers.items()
    ]
