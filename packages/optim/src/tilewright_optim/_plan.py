"""What successive steps have in common, so that a step of a thousand tensors costs little Python.

A `Launch` holds the tensors of one kind as the lists that a kernel's tables are made of. Each step
asks it whether they still hold: parameters and gradients where they were and as they were, for
`.data`, `set_` and `swap_tensors` change a tensor and leave its object in place. These are a few
passes over lists in C, 0.3 µs a tensor, where making the lists takes 3 µs. If something changed,
the group is planned anew, which compares all shapes.

States are looked at like that, too, unless it is known without a look that they are the same: no
state was put in, none was read (`_watched`), and nobody had kept one before (`_sole_owner`).

A plan keeps states alive from step to step, and gradients until `zero_grad`, also those that their
owner has dropped meanwhile. So only small groups' plans are kept, `KEPT` elements at most; the
steps of others wait for the device anyway.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat
from operator import attrgetter, is_
from typing import Any, NamedTuple

from torch import Tensor

from tilewright_optim._arguments import obstacle
from tilewright_optim._checks import check_rows
from tilewright_optim._kinds import Kind
from tilewright_optim._layout import lies_plain
from tilewright_optim._snapshot import Check, lie_at, like
from tilewright_optim._sole_owner import held_by
from tilewright_optim._step_counts import StepCounts
from tilewright_optim._tables import addresses

_GRAD, _DTYPE = map(attrgetter, ("grad", "dtype"))

KEPT = 2**25
"""Elements of a group whose plan is kept: 128 MiB of float32 gradients."""

_SAMPLE = 128
"""Of so many states one is always looked at, in case of what walks all objects to move them."""

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
        counts: step counts.
    """

    def __init__(self, columns: Columns, capturable: bool, kind: Kind) -> None:
        check_rows(columns.params, dict(zip(("grad", *STATES), columns[1:8], strict=True)))
        self.columns = columns
        self.kind = kind
        self.obstacle = obstacle(columns.params)
        self.capturable = capturable
        walked = (columns.params, columns.grads, *columns[2:6])
        self.contiguous = all(all(map(lies_plain, column)) for column in walked)
        self.sizes = list(map(Tensor.numel, columns.params))
        self._range = min(self.sizes), max(self.sizes)
        self.places = [addresses(tensors) for tensors in (columns.params, *columns[2:8]) if tensors]
        self.grad_places = addresses(columns.grads)
        self.counts = StepCounts(columns.steps)
        self._indices = _indices(len(self.sizes))
        self._dtypes = columns.params[0].dtype, columns.grads[0].dtype
        self._like: list[Check | None] = [None, None]
        self._states = States(columns, self.places[1:], self.counts)

    def refresh(self, unread: bool, may_prove: bool) -> bool:
        """Take up the present gradients; False if anything else has changed.

        Args:
            unread: whether nobody has been given a state since the last step.
            may_prove: whether to prove, if need be, that states need no look from now on.
        """
        params = self.columns.params
        # To take references is so short a loop that it waits for many objects at once, where those
        # below wait for one or two: 6 % of the look with cold caches.
        _objects = [*params, *self.columns.grads]
        try:
            # What lies together is asked for together: gradients are first touched by the second.
            if not self._fits(0, params) or not lie_at(params, self.places[0], self._indices):
                return False
            grads = list(map(_GRAD, params))
            if not self._fits(1, grads):
                return False
            if not lie_at(grads, self.grad_places, self._indices):
                self.grad_places = addresses(grads)  # a list that stays is not sent again
        except (TypeError, RuntimeError):  # a gradient of None, or one without an address
            return False
        self.columns = self.columns._replace(grads=grads)
        return self._states.hold(unread, may_prove)

    def _fits(self, index: int, column: list[Any]) -> bool:
        """Whether this column of `columns` has the sizes and the dtype it had, without gaps.

        A guard or two answer that from the third step on, so that plans of one step do not pay for
        them.
        """
        check = self._like[index]
        if check is not None:
            return check(column)
        result = (
            (column is self.columns.params or set(map(type, column)) == {Tensor})
            and list(map(Tensor.numel, column)) == self.sizes
            and all(map(Tensor.is_contiguous, column))
            and set(map(_DTYPE, column)) == {self._dtypes[index]}
            and not any(map(Tensor.is_neg, column))
        )
        if result:
            self._like[index] = like(column)
        return result

    @property
    def states_proved(self) -> bool:
        """`States.proved`."""
        return self._states.proved

    def forget_gradients(self) -> None:
        """Keep none of them alive."""
        self.columns = self.columns._replace(grads=[])

    def counts_itself(self, chunk: int) -> bool:
        """Whether the kernel can add 1 to every step: each is read by one program alone.

        Where programs share a tensor, it would need a counter of those that have read, which costs
        5 to 15 % of the step.
        """
        least, most = self._range
        return self.capturable and least > 0 and most <= chunk


class Allowance:
    """When proofs are due, which take as long as some looks: two, then one in 16 steps at most."""

    def __init__(self) -> None:
        self._proofs = self._waited = 0

    def step(self, wanted: bool) -> bool:
        """Count a step; whether it may prove, if that is wanted."""
        self._waited += 1
        if not wanted or (self._proofs > 1 and self._waited < 16):
            return False
        self._proofs += 1
        self._waited = 0
        return True


class States:
    """A launch's states, and whether they are where they were and as they were.

    Args:
        columns: of the launch.
        places: of its states but step counts.
        counts: step counts.

    Attributes:
        proved: whether nobody else could get at them when they were last looked at.
    """

    def __init__(self, columns: Columns, places: list[list[int]], counts: StepCounts) -> None:
        self._columns = [column for column in columns[2:8] if column]
        self._places = [*places, counts.places]
        self._sizes = [list(map(Tensor.numel, column)) for column in self._columns]
        self._dtypes = [column[0].dtype for column in self._columns]
        self._counts = counts
        self._indices = _indices(len(columns.steps))
        self._sample = self._indices[::_SAMPLE]
        self._like: Check | None = None
        self._looks = 0
        self.proved = False

    def hold(self, unread: bool, may_prove: bool) -> bool:
        """Whether they do; `unread`: nobody has been given one of them since the last call."""
        if unread and self.proved:
            return self._lie(self._sample)
        self.proved = False
        if not self._lie(self._indices) or not self._fit():
            return False
        self.proved = unread and may_prove and self._prove()
        return True

    def _lie(self, indices: list[int]) -> bool:
        """Whether those of these indices are where they were."""
        columns = zip((*self._columns, self._counts.steps), self._places, strict=True)
        return self._counts.stay() and all(
            lie_at(column, places, indices) for column, places in columns
        )

    def _fit(self) -> bool:
        """Whether they are of the sizes and dtypes they were of, without gaps.

        One call answers that if it is asked again and again.
        """
        tensors = [tensor for column in self._columns for tensor in column]
        if self._like is not None:
            return self._like(tensors)
        result = all(
            list(map(Tensor.numel, column)) == sizes
            and all(map(Tensor.is_contiguous, column))
            and set(map(_DTYPE, column)) == {dtype}
            for column, sizes, dtype in zip(self._columns, self._sizes, self._dtypes, strict=True)
        )
        self._looks += 1
        if result and self._looks == 3:
            self._like = like(tensors)
        return result

    def _prove(self) -> bool:
        """Whether nobody else can get at them.

        Each is in a state and a column. Counts of steps share their memory, and its size and place
        are looked at each time.
        """
        return (
            self._counts.flat is not None
            and all(held_by(2, column) for column in self._columns)
            and held_by(2, self._counts.steps, with_memory=False)
        )


@lru_cache(maxsize=16)
def _indices(count: int) -> list[int]:
    """0 … count - 1, in one list for all plans, which is to be left as it is."""
    return list(range(count))


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

    def refresh(self, group: dict[str, Any], unread: bool, proofs: Allowance) -> bool:
        """Whether it still holds; `Launch.refresh` for each."""
        members = group["params"]
        may_prove = proofs.step(unread and not all(x.states_proved for x in self.launches))
        return (
            _options(group) == self._options
            and all(
                launch.contiguous and launch.refresh(unread, may_prove) for launch in self.launches
            )
            and are_same(members, self._members)
            and all(map(is_, map(_GRAD, self._without), repeat(None)))
        )

    def forget_gradients(self) -> None:
        """`Launch.forget_gradients` for each."""
        for launch in self.launches:
            launch.forget_gradients()


def _options(group: dict[str, Any]) -> tuple[bool, bool]:
    return group["amsgrad"], group["capturable"]
