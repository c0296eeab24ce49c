"""What successive steps have in common, so that a step of a thousand tensors costs little Python.

A `Launch` holds the tensors of one kind as the lists that a kernel's tables are made of. Each step
asks it whether they still hold: parameters and states where they were, for `.data`, `set_` and
`swap_tensors` move a tensor and leave its object in place, and parameters and gradients of the same
sizes, without gaps. These are passes over lists in C, 0.8 µs a tensor, where making the lists takes
3 µs. If something changed, the group is planned anew, which compares all shapes. That other tensors
were put into states is known without a look (`_watched`).

A plan keeps states alive from step to step, and gradients until `zero_grad`, also those that their
owner has dropped meanwhile. So only small groups' plans are kept, `KEPT` elements at most; the
steps of others wait for the device anyway.
"""

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright_optim._arguments import obstacle
from tilewright_optim._checks import check_rows
from tilewright_optim._kinds import Kind
from tilewright_optim._layout import lies_plain
from tilewright_optim._states import as_one
from tilewright_optim._tables import addresses, lie_at

_GRAD, _DTYPE, _NBYTES = map(attrgetter, ("grad", "dtype", "nbytes"))

KEPT = 2**25
"""Elements of a group whose plan is kept: 128 MiB of float32 gradients."""

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


def are_same(ours: list[Any], theirs: list[Any]) -> bool:
    """Whether lists hold the same objects; tensors' own comparison, by value, is never asked."""
    return len(ours) == len(theirs) and all(map(is_, ours, theirs))


class Launch:
    """Parameters of one kind.

    Args:
        columns: their tensors now.
        capturable: whether step counts are on the device.
        kind: their devices and dtypes.

    Raises:
        RuntimeError: a gradient or state that does not fit its parameter.

    Attributes:
        obstacle: why kernels cannot take them, or None if they can.
        columns: as given, with the gradients of the last `refresh`, if they are not forgotten.
        contiguous: whether all are, without a negative bit, so that kernels can be given addresses
            as they are.
        sizes: elements of each parameter.
        places: addresses of parameters, then of the lists of states that are not empty.
        grad_places: addresses of gradients.
        flat_steps: the tensor whose elements the step counts are, or None.
    """

    def __init__(self, columns: Columns, capturable: bool, kind: Kind) -> None:
        check_rows(columns.params, dict(zip(("grad", *STATES), columns[1:8], strict=True)))
        self.columns = columns
        self.kind = kind
        self.obstacle = obstacle(columns.params)
        self.capturable = capturable
        self._indices = list(range(len(columns.params)))
        self._states = [tensor for tensors in columns[2:9] for tensor in tensors]
        self._state_places = addresses(self._states)
        self._state_indices = list(range(len(self._states)))
        walked = (columns.params, columns.grads, *columns[2:6])
        self.contiguous = all(all(map(lies_plain, column)) for column in walked)
        self.sizes = list(map(Tensor.numel, columns.params))
        self._param_bytes, self._grad_bytes = (list(map(_NBYTES, c)) for c in columns[:2])
        self.places = [addresses(tensors) for tensors in (columns.params, *columns[2:8]) if tensors]
        self.grad_places = addresses(columns.grads)
        self._grad_dtypes = set(map(_DTYPE, columns.grads))
        self.flat_steps = as_one(columns.steps)
        self._zeros = [0] * len(self.sizes)

    def refresh(self) -> bool:
        """Take up the present gradients; False if anything else has changed."""
        params, grads = self.columns.params, self.columns.grads
        try:
            # The passes that are loops in C++ go first: they wait for the memory of several tensors
            # at once, and Python's then find it in the caches.
            stayed = bool(grads) and lie_at(grads, self.grad_places, self._indices)
            return (
                lie_at(params, self.places[0], self._indices)
                and lie_at(self._states, self._state_places, self._state_indices)
                and list(map(_NBYTES, params)) == self._param_bytes
                and all(map(Tensor.is_contiguous, params))
                and self._take(list(map(_GRAD, params)), stayed)
            )
        except (TypeError, RuntimeError):  # a gradient of None, or one without an address
            return False

    def forget_gradients(self) -> None:
        """Keep none of them alive; the next `refresh` looks at its own as if they were new."""
        self.columns = self.columns._replace(grads=[])

    def _take(self, grads: list[Any], stayed: bool) -> bool:
        """Whether gradients are fit; `stayed`: the last ones are where they were."""
        if stayed and are_same(grads, self.columns.grads):
            return self._fit(grads)
        places = addresses(grads)
        if places != self.grad_places:  # a list that is itself is not compared again
            self.grad_places = places
        self.columns = self.columns._replace(grads=grads)
        return (
            set(map(type, grads)) == {Tensor}
            and set(map(_DTYPE, grads)) == self._grad_dtypes
            and self._fit(grads)
            and not any(map(Tensor.is_neg, grads))
        )

    def _fit(self, grads: list[Any]) -> bool:
        sizes = list(map(_NBYTES, grads))
        return sizes == self._grad_bytes and all(map(Tensor.is_contiguous, grads))

    def counts(self) -> tuple[float, list[int]]:
        """The first step count, on the host, and what each is ahead of it.

        They are read each time, 0.02 µs each: what is written through `.data` or NumPy moves no
        version.
        """
        if self.flat_steps is not None:
            values = self.flat_steps.tolist()
        else:
            values = [step.item() for step in self.columns.steps]
        first = values[0]
        if values.count(first) == len(values):
            return first, self._zeros
        return first, [int(value - first) for value in values]

    def counts_itself(self, chunk: int) -> bool:
        """Whether the kernel can add 1 to every step: each is read by one program alone.

        Where programs share a tensor, it would need a counter of those that have read, which costs
        5 to 15 % of the step.
        """
        return self.capturable and min(self.sizes) > 0 and max(self.sizes) <= chunk

    def count(self, found_inf: Tensor | None) -> None:
        """Add 1 to every step, after the launch, all of whose programs read them."""
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

    Attributes:
        small: whether it may be kept until the next step.
    """

    def __init__(self, group: dict[str, Any], launches: Sequence[Launch]) -> None:
        self.launches = launches
        self._members = list(group["params"])
        self._without = [param for param in self._members if param.grad is None]
        self._options = _options(group)
        self.small = sum(sum(launch.sizes) for launch in launches) <= KEPT

    def refresh(self, group: dict[str, Any]) -> bool:
        """Whether it still holds; `Launch.refresh` for each."""
        members = group["params"]
        return (
            _options(group) == self._options
            and all(launch.contiguous and launch.refresh() for launch in self.launches)
            and are_same(members, self._members)
            and all(map(is_, map(_GRAD, self._without), repeat(None)))
        )

    def forget_gradients(self) -> None:
        """`Launch.forget_gradients` for each."""
        for launch in self.launches:
            launch.forget_gradients()


def _options(group: dict[str, Any]) -> tuple[bool, bool]:
    return group["amsgrad"], group["capturable"]
