"""What successive steps have in common, so that a step of a thousand tensors costs little Python.

A `Launch` holds the tensors of one kind as the lists that a kernel's tables are made of. Each step
asks it whether they still hold: the same parameters, where they were, and gradients of the same
dtype. That is a few passes over lists in C, 0.2 µs a tensor, where making the lists takes 3 µs. If
something changed, the group is planned anew. That other tensors were put into states is known
without a look (`_watched`). One thing is taken for granted: where states are moved by an assignment
to `.data`, which leaves the tensor object in place, it is not one of many alone.

A plan keeps states alive from step to step, and gradients until `zero_grad`, also those that their
owner has dropped meanwhile. So only small groups' plans are kept, `KEPT` elements at most; the
steps of others wait for the device anyway.
"""

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, is_, is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright_optim._arguments import obstacle
from tilewright_optim._kinds import Kind
from tilewright_optim._states import as_one
from tilewright_optim._tables import addresses, lie_at

_GRAD, _DTYPE = attrgetter("grad"), attrgetter("dtype")

KEPT = 2**25
"""Elements of a group whose plan is kept: 128 MiB of float32 gradients."""

_SAMPLE = 512
"""Of so many states one is asked for its address, for they move together if at all."""

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


def are_same(ours: list[Any], theirs: list[Any], single: bool) -> bool:
    """Whether lists hold the same objects, of which the second's are tensors.

    A list's own comparison asks for identity first, and so leaves the tensors' memory alone, which
    makes it 20 times as fast as a walk. Where others follow, tensors are compared by value, which
    raises, unless they have one element.

    Args:
        ours: tensors, or None.
        theirs: tensors.
        single: whether one of theirs has a single element.
    """
    if len(ours) != len(theirs) or any(map(is_not, ours[:1], theirs)):
        return False
    if single:
        return all(map(is_, ours, theirs))
    try:
        return ours == theirs
    except RuntimeError:
        return False


class Launch:
    """Parameters of one kind.

    Args:
        columns: their tensors now.
        capturable: whether step counts are on the device.
        kind: their devices and dtypes.

    Attributes:
        obstacle: why kernels cannot take them, or None if they can.
        columns: as given, with the gradients of the last `refresh`, if they are not forgotten.
        contiguous: whether all are, so that kernels can be given addresses as they are.
        sizes: elements of each parameter.
        places: addresses of parameters, then of the lists of states that are not empty.
        grad_places: addresses of gradients.
        flat_steps: the tensor whose elements the step counts are, or None.
    """

    def __init__(self, columns: Columns, capturable: bool, kind: Kind) -> None:
        self.columns = columns
        self.kind = kind
        self.obstacle = obstacle(columns.params)
        self.capturable = capturable
        sample = [tensor for tensors in columns[2:9] for tensor in tensors[::_SAMPLE]]
        self._sample = sample, addresses(sample)
        self._indices = list(range(len(columns.params)))
        walked = (columns.params, columns.grads, *columns[2:6])
        self.contiguous = all(all(map(Tensor.is_contiguous, column)) for column in walked)
        self.sizes = list(map(Tensor.numel, columns.params))
        self._single = 1 in self.sizes
        self.places = [addresses(tensors) for tensors in (columns.params, *columns[2:8]) if tensors]
        self.grad_places = addresses(columns.grads)
        self._grad_dtypes = set(map(_DTYPE, columns.grads))
        self.flat_steps = as_one(columns.steps)
        self._zeros = [0] * len(self.sizes)
        self._first: float | None = None
        self._version = -1

    def refresh(self) -> bool:
        """Take up the present gradients; False if anything else has changed."""
        params, grads = self.columns.params, self.columns.grads
        sample, sample_places = self._sample
        try:
            # The passes that are loops in C++ go first: they wait for the memory of several tensors
            # at once, and Python's then find it in the caches.
            stayed = bool(grads) and lie_at(grads, self.grad_places, self._indices)
            if not lie_at(params, self.places[0], self._indices):
                return False
            return self._take(list(map(_GRAD, params)), stayed) and (
                addresses(sample) == sample_places
            )
        except (TypeError, RuntimeError):  # a gradient of None, or one without an address
            return False

    def forget_gradients(self) -> None:
        """Keep none of them alive; the next `refresh` looks at its own as if they were new."""
        self.columns = self.columns._replace(grads=[])

    def _take(self, grads: list[Any], stayed: bool) -> bool:
        """Whether gradients are fit; `stayed`: the last ones are where they were."""
        if stayed and are_same(grads, self.columns.grads, self._single):
            return True
        places = addresses(grads)
        if places != self.grad_places:  # a list that is itself is not compared again
            self.grad_places = places
        self.columns = self.columns._replace(grads=grads)
        return (
            set(map(type, grads)) == {Tensor}
            and set(map(_DTYPE, grads)) == self._grad_dtypes
            and list(map(Tensor.numel, grads)) == self.sizes
            and all(map(Tensor.is_contiguous, grads))
        )

    def counts(self) -> tuple[float, list[int]]:
        """The first step count, on the host, and what each is ahead of it."""
        if self.flat_steps is not None:
            if self._first is not None and self.flat_steps._version == self._version:
                return self._first, self._zeros
            values = self.flat_steps.tolist()
        else:
            values = [step.item() for step in self.columns.steps]
        first = values[0]
        if values.count(first) == len(values):
            self._first = first
            return first, self._zeros
        self._first = None
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
            self._version = self.flat_steps._version
            if self._first is not None:
                self._first += 1
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
        self._single = any(param.numel() == 1 for param in self._members)
        self.small = sum(sum(launch.sizes) for launch in launches) <= KEPT

    def refresh(self, group: dict[str, Any]) -> bool:
        """Whether it still holds; `Launch.refresh` for each."""
        members = group["params"]
        return (
            _options(group) == self._options
            and all(launch.contiguous and launch.refresh() for launch in self.launches)
            and are_same(members, self._members, self._single)
            and all(map(is_, map(_GRAD, self._without), repeat(None)))
        )

    def forget_gradients(self) -> None:
        """`Launch.forget_gradients` for each."""
        for launch in self.launches:
            launch.forget_gradients()


def _options(group: dict[str, Any]) -> tuple[bool, bool]:
    return group["amsgrad"], group["capturable"]
