"""Dicts for an optimizer's states that take note of being changed, and of being read.

Before a kernel is given the addresses of the step before, it must be certain that nobody has put
other tensors into the states since, nor moved those that are there. To look at a thousand dicts and
all that is in them would take longer than all the rest of a step on the host. These say it of
themselves: every change of any of them moves a clock, and so does every reading of what is in one,
without which nobody can move it (`_sole_owner`).

Copies and pickles of them are plain dicts. What goes past a dict's own methods,
`dict.__setitem__(state, …)` or C's PyDict_SetItem, stays unknown; who does so must keep the old
tensors or call `load_state_dict`.
"""

from collections import defaultdict
from collections.abc import Callable, ItemsView, Mapping, ValuesView
from functools import wraps
from typing import Any


class Clock:
    """How often the dicts of one optimizer were changed, and its states read."""

    __slots__ = ("changes", "readings")

    def __init__(self) -> None:
        self.changes = self.readings = 0

    @property
    def now(self) -> tuple[int, int]:
        """(changes, readings)."""
        return self.changes, self.readings


def _noted(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    @wraps(method)
    def change(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.clock.changes += 1
        return method(self, *args, **kwargs)

    return change


def _told(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    @wraps(method)
    def read(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.clock.readings += 1
        return method(self, *args, **kwargs)

    return read


entry: Callable[[Mapping[str, Any], str], Any] = dict.__getitem__  # pyrefly: ignore[bad-assignment]
"""What is in a state, without a note: for who forgets it, or keeps it from all others."""


class _Watched:
    """Overrides all methods of a dict that change it."""

    __slots__ = ()
    __setitem__: Any = _noted("__setitem__")
    __delitem__: Any = _noted("__delitem__")
    __ior__: Any = _noted("__ior__")
    clear: Any = _noted("clear")
    pop: Any = _noted("pop")
    popitem: Any = _noted("popitem")
    setdefault: Any = _noted("setdefault")
    update: Any = _noted("update")


class WatchedState(_Watched, dict[str, Any]):
    """The state of one parameter.

    It also overrides all methods that give what is in it. With an `__iter__` of its own it is
    copied into other dicts through them, too; and views ask it anew for each value, when it is
    needed.

    Attributes:
        clock: of the optimizer.
    """

    __slots__ = ("clock",)
    __iter__: Any = _told("__iter__")
    __getitem__: Any = _told("__getitem__")
    __or__: Any = _told("__or__")
    __ror__: Any = _told("__ror__")
    __eq__: Any = _told("__eq__")
    __ne__: Any = _told("__ne__")
    __hash__: Any = None
    copy: Any = _told("copy")
    get: Any = _told("get")

    def __init__(self, content: Mapping[str, Any], clock: Clock) -> None:
        self.clock = clock
        super().__init__(content)

    def items(self) -> Any:
        """Pairs of keys and values."""
        return ItemsView(self)

    def values(self) -> Any:
        """Values."""
        return ValuesView(self)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


class WatchedStates(_Watched, defaultdict[Any, Any]):
    """The states of all parameters, `Optimizer.state`; those it makes itself are watched.

    Attributes:
        clock: moved by these dicts.
    """

    __slots__ = ("clock",)

    def __init__(self, *args: Any) -> None:
        self.clock = Clock()
        super().__init__(*args)

    def __missing__(self, key: Any) -> WatchedState:
        self[key] = state = WatchedState({}, self.clock)
        return state

    def __reduce__(self) -> Any:
        return defaultdict, (dict, dict(self))


def watched(states: Mapping[Any, Any]) -> WatchedStates:
    """The same states, watched; those that are stay the objects that they are."""
    if isinstance(states, WatchedStates) and is_watched(states):
        return states
    made = WatchedStates(dict)
    if isinstance(states, WatchedStates):
        made.clock = states.clock
    for param, state in states.items():
        plain = type(state) is dict or (
            type(state) is WatchedState and state.clock is not made.clock
        )
        made[param] = WatchedState(state, made.clock) if plain else state
    return made


def is_watched(states: Mapping[Any, Any]) -> bool:
    """Whether no change of these states can stay unknown.

    It can if a user has put a dict of another kind, or of another optimizer, among them.
    """
    return type(states) is WatchedStates and all(
        type(state) is WatchedState and state.clock is states.clock for state in states.values()
    )
