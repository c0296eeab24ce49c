"""Dicts for an optimizer's states that take note of being changed.

Before a kernel is given the addresses of the step before, it must be certain that nobody has put
other tensors into the states since. To look at a thousand dicts would take longer than all the rest
of a step on the host. These say it of themselves: every change of any of them moves one clock.

Copies and pickles of them are plain dicts. What goes past a dict's own methods,
`dict.__setitem__(state, …)` or C's PyDict_SetItem, stays unknown; who does so must keep the old
tensors or call `load_state_dict`.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import wraps
from itertools import count
from typing import Any

_TICKS = count(1)


class _Clock:
    """When a watched dict was last changed, as a number that never comes twice."""

    now = 0


def last_change() -> int:
    """A number that is another after every change of any watched dict."""
    return _Clock.now


def _noted(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    @wraps(method)
    def change(self: Any, *args: Any, **kwargs: Any) -> Any:
        _Clock.now = next(_TICKS)
        return method(self, *args, **kwargs)

    return change


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
    """The state of one parameter."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


class WatchedStates(_Watched, defaultdict[Any, Any]):
    """The states of all parameters, `Optimizer.state`; those it makes itself are watched."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        return defaultdict, (dict, dict(self))


def watched(states: Mapping[Any, Any]) -> WatchedStates:
    """The same states, watched; those that are stay the objects that they are."""
    if isinstance(states, WatchedStates) and is_watched(states):
        return states
    inner = {p: WatchedState(s) if type(s) is dict else s for p, s in states.items()}
    return WatchedStates(WatchedState, inner)


def is_watched(states: Mapping[Any, Any]) -> bool:
    """Whether no change of these states can stay unknown.

    It can if a user has put a dict of another kind among them.
    """
    return type(states) is WatchedStates and set(map(type, states.values())) <= {WatchedState}
