"""Dicts of states: every way to change one is noticed, and nothing else; copies are plain."""

import copy
import io
import pickle
from collections import defaultdict

import pytest
import torch

from tilewright_optim import Adam, Muon, MuonW
from tilewright_optim._watched import (
    Clock,
    WatchedState,
    WatchedStates,
    entry,
    is_watched,
    watched,
)
from tilewright_optim.testing import random_parameters, set_random_grads

CHANGES = {
    "assign": lambda d: d.__setitem__("a", 2),
    "delete": lambda d: d.__delitem__("a"),
    "or": lambda d: d.__ior__({"b": 2}),
    "clear": lambda d: d.clear(),
    "pop": lambda d: d.pop("a"),
    "popitem": lambda d: d.popitem(),
    "setdefault": lambda d: d.setdefault("b", 2),
    "update": lambda d: d.update(b=2),
}


@pytest.mark.parametrize(
    "make", [lambda d: WatchedState(d, Clock()), lambda d: WatchedStates(None, d)]
)
@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_noticed(name, make):
    plain = {"a": 1}
    kept = make(plain)
    before = kept.clock.changes
    CHANGES[name](plain)
    CHANGES[name](kept)
    assert kept.clock.changes != before
    assert kept == plain


def test_every_method_that_changes_a_dict_is_overridden():
    reading = {
        "__class_getitem__", "__contains__", "__getitem__", "__iter__", "__len__", "__or__",
        "__reversed__", "__ror__", "copy", "fromkeys", "get", "items", "keys", "values",
    }  # fmt: skip
    changing = set(dir(dict)) - set(dir(object)) - reading
    assert changing == {
        name for name in changing if getattr(WatchedState, name) is not getattr(dict, name)
    }
    assert len(changing) == len(CHANGES)


def test_reading_is_no_change():
    states = watched({1: {"a": 2}})
    before = states.clock.changes
    assert states[1]["a"] == 2
    assert states.get(3) is None
    assert dict(states[1]) == {"a": 2}
    assert states.clock.changes == before


READINGS = {
    "item": lambda s: [s["a"]],
    "get": lambda s: [s.get("a")],
    "values": lambda s: list(s.values()),
    "items": lambda s: [value for _, value in s.items()],
    "iterate": lambda s: [s[key] for key in s],
    "copy": lambda s: list(s.copy().values()),
    "copy.copy": lambda s: list(copy.copy(s).values()),
    "dict": lambda s: list(dict(s).values()),
    "update": lambda s: list(updated(s).values()),
    "unpack": lambda s: list({**s}.values()),
    "arguments": lambda s: list((lambda **given: given)(**s).values()),
    "or": lambda s: list((s | {}).values()),
    "or its reverse": lambda s: list(({} | s).values()),
    "in place or": lambda s: list(merged(s).values()),
    "match": lambda s: [matched(s)],
    "compare": lambda s: s == {"a": 1} and [1],
    "pickle": lambda s: list(pickle.loads(pickle.dumps(s)).values()),
}


def updated(state):
    plain = {}
    plain.update(state)
    return plain


def merged(state):
    plain = {}
    plain |= state
    return plain


def matched(state):
    match state:
        case {"a": value}:
            return value


@pytest.mark.parametrize("name", READINGS)
def test_readings_of_a_state_are_noticed(name):
    clock = Clock()
    state = WatchedState({"a": 1}, clock)
    assert READINGS[name](state) == [1]
    assert clock.readings > 0
    assert clock.changes == 0


@pytest.mark.parametrize("view", ["values", "items"])
def test_views_tell_of_each_reading(view):
    clock = Clock()
    iterator = iter(getattr(WatchedState({"a": 1, "b": 2}, clock), view)())
    next(iterator)
    before = clock.readings
    assert next(iterator) in (2, ("b", 2))
    assert clock.readings != before


def test_every_method_that_gives_values_is_overridden():
    # The others give keys, sizes and text, or are changes, which are noticed as such.
    others = {
        "__class_getitem__", "__contains__", "__len__", "__reversed__", "fromkeys", "keys",
        *("__delitem__", "__ior__", "__setitem__", "clear", "pop", "popitem", "setdefault"),
        "update",
    }  # fmt: skip
    reading = set(dir(dict)) - set(dir(object)) - others
    assert reading == {
        name for name in reading if getattr(WatchedState, name) is not getattr(dict, name)
    }


def test_looking_at_states_from_outside_is_no_reading():
    states = watched({1: {"a": 2}})
    state = states[1]
    before = states.clock.now
    assert states.get(1) is state
    assert "a" in state
    assert len(state) == 1
    assert entry(state, "a") == 2
    assert list(states) == [1]
    assert states.clock.now == before


def test_a_missing_state_is_made_watched():
    states = watched({})
    before = states.clock.changes
    assert type(states["new"]) is WatchedState
    assert states.clock.changes != before
    before = states.clock.changes
    states["new"]["a"] = 1
    assert states.clock.changes != before


def test_what_is_watched_stays():
    states = watched(defaultdict(dict, {1: {}, 2: {}}))
    assert is_watched(states)
    assert watched(states) is states
    states[1] = {}
    assert not is_watched(states)
    second = states[2]
    assert is_watched(watched(states))
    assert watched(states)[2] is second


def test_a_state_of_two_optimizers_tells_one_of_them():
    ours, theirs = watched({1: {"a": 2}}), watched({})
    theirs[1] = ours[1]
    assert is_watched(ours)
    assert not is_watched(theirs)
    again = watched(theirs)
    assert is_watched(again)
    assert again[1] == {"a": 2}
    assert ours[1].clock is ours.clock


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_copies_are_plain(clone):
    states = clone(watched({1: {"a": 2}}))
    assert states == {1: {"a": 2}}
    assert type(states) is defaultdict
    assert type(states[1]) is dict
    assert states[5] == {}


@pytest.mark.parametrize("kind", [Adam, Muon, MuonW])
def test_checkpoints_hold_plain_dicts(kind):
    params = random_parameters(torch.device("cpu"), torch.float32, [(4, 4)])
    groups = [{"params": params, "kind": "adamw"}] if kind is MuonW else params
    optimizer = kind(groups)
    set_random_grads(params, 0)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert type(torch.load(file, weights_only=True)["state"][0]) is dict
