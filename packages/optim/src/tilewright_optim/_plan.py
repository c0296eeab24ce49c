"""What successive steps have in common, so that a step of a thousand tensors costs little Python.

A `Launch` holds the tensors of one kind as the lists that a kernel's tables are made of. Each step
asks it whether they still hold: the same parameters, states and gradients' dtypes, all where they
were. That is a few passes over lists in C, 0.4 µs a tensor, where making the lists takes 2 µs. If
something changed, the group is planned anew; nothing is assumed that was not looked at.
"""

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright_optim._kinds import Kind
from tilewright_optim._states import State, as_one
from tilewright_optim._tables import addresses

_GRAD, _DTYPE = attrgetter("grad"), attrgetter("dtype")

STATES = (
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "master_low",
    "exp_avg_scale",
    "exp_avg_sq_scale",
)
"""Keys of a state that kernels read by address, in the order of `Columns`."""


class Columns(NamedTuple):
    """Tensors of the parameters of one launch; lists of what they have none of are empty."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    master_lows: list[Tensor]
    exp_avg_scales: list[Tensor]
    exp_avg_sq_scales: list[Tensor]
    steps: list[Tensor]
    seeds: list[int]


class Launch:
    """Parameters of one kind.

    Args:
        columns: their tensors now.
        states: their states, whose entries `columns` holds.
        capturable: whether step counts are on the device.
        kind: their devices and dtypes.

    Attributes:
        obstacle: why kernels cannot take them, or None if they can.
        columns: as given, with the gradients of the last `refresh`.
        contiguous: whether all are, so that kernels can be given addresses as they are.
        sizes: elements of each parameter.
        places: addresses of parameters, then of the lists of states that are not empty.
        grad_places: addresses of gradients.
        flat_steps: the tensor whose elements the step counts are, or None.
    """

    def __init__(self, columns: Columns, states: list[State], capturable: bool, kind: Kind) -> None:
        self.columns = columns
        self.kind = kind
        self.obstacle = _obstacle(columns.params)
        self._states = states
        self.capturable = capturable
        self._watched = [
            (itemgetter(name), tensors)
            for name, tensors in zip(STATES, columns[2:8], strict=True)
            if tensors
        ]
        walked = (columns.params, columns.grads, *columns[2:6])
        self.contiguous = all(all(map(Tensor.is_contiguous, column)) for column in walked)
        self.sizes = list(map(Tensor.numel, columns.params))
        self.places = [addresses(tensors) for tensors in (columns.params, *columns[2:8]) if tensors]
        self.grad_places = addresses(columns.grads)
        self.flat_steps = as_one(columns.steps)
        self._get_step = itemgetter("step")
        self._zeros = [0] * len(self.sizes)
        self.seeds = columns.seeds

    def refresh(self) -> bool:
        """Take up the present gradients; False if anything else has changed."""
        params, before = self.columns.params, self.columns.grads
        grads: list[Any] = list(map(_GRAD, params))
        try:
            grad_places = addresses(grads)
            places = [addresses(params)]
            for get, tensors in self._watched:
                if not all(map(is_, map(get, self._states), tensors)):
                    return False
                places.append(addresses(tensors))
            if not all(map(is_, map(self._get_step, self._states), self.columns.steps)):
                return False
        except (TypeError, KeyError, RuntimeError):  # a gradient of None, a state that is gone
            return False
        if places != self.places or list(map(Tensor.numel, params)) != self.sizes:
            return False
        if not all(map(is_, grads, before)):
            if set(map(type, grads)) != {Tensor} or set(map(_DTYPE, grads)) != {before[0].dtype}:
                return False
            if not all(map(Tensor.is_contiguous, grads)):
                return False
            self.columns = self.columns._replace(grads=grads)
        if grad_places != self.grad_places:
            self.grad_places = grad_places
        return True

    def counts(self) -> tuple[float, list[int]]:
        """The first step count, on the host, and what each is ahead of it."""
        if self.flat_steps is not None:
            values = self.flat_steps.tolist()
        else:
            values = [step.item() for step in self.columns.steps]
        first = values[0]
        if values.count(first) == len(values):
            return first, self._zeros
        return first, [int(value - first) for value in values]

    def count(self, found_inf: Tensor | None) -> None:
        """Add 1 to every step, after the launch, all of whose programs read them.

        In the kernel it would need a counter of programs, which costs 5 to 15 % of the step.
        """
        steps = self.columns.steps
        if self.flat_steps is not None:
            self.flat_steps.add_(1 if found_inf is None else found_inf == 0)
            return
        done = torch.ones_like(steps[0]) if found_inf is None else (found_inf == 0).to(steps[0])
        # One tensor for all of them: a Python number is five times as slow on the CPU.
        torch._foreach_add_(steps, [done] * len(steps))


class Plan:
    """A group's launches.

    Args:
        group: as it is now.
        launches: of those of its parameters that have a gradient.
    """

    def __init__(self, group: dict[str, Any], launches: Sequence[Launch]) -> None:
        self.launches = launches
        self._members = list(group["params"])
        self._without = [param for param in self._members if param.grad is None]
        self._options = _options(group)

    def refresh(self, group: dict[str, Any]) -> bool:
        """Whether it still holds; `Launch.refresh` for each."""
        members = group["params"]
        return (
            _options(group) == self._options
            and len(members) == len(self._members)
            and all(map(is_, members, self._members))
            and all(map(is_, map(_GRAD, self._without), repeat(None)))
            and all(launch.contiguous and launch.refresh() for launch in self.launches)
        )


def _options(group: dict[str, Any]) -> tuple[bool, bool]:
    return group["amsgrad"], group["capturable"]


def _obstacle(params: list[Tensor]) -> str | None:
    """Why the kernel cannot take these parameters, or None if it can."""
    subclasses = set(map(type, params)) - {Tensor, torch.nn.Parameter}
    if not subclasses:
        return None
    return f"a parameter is a {subclasses.pop().__name__}, which may not lie at one address"
