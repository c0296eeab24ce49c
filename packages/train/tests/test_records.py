"""Every way to write a record, and every way to write one wrongly."""

from typing import Any

import pytest

from tilewright_train.errors import InputError
from tilewright_train.records import (
    Conversation,
    Kind,
    Message,
    Preference,
    Record,
    parse_record,
    text_of,
)

HI, HELLO = Message("user", "hi"), Message("assistant", "hello")
BRIEF = {"role": "system", "content": "be brief"}
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    "value",
    [
        {"messages": TURNS},
        {"conversations": TURNS},
        {"text": "beside it", "id": 3, "messages": TURNS},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"messages": [{"from": "user", "value": "hi"}, TURNS[1] | {"tool_calls": None}]},
    ],
)
def test_conversations_may_be_written_in_several_ways(value: Any) -> None:
    assert parse_record(value, "conversation") == Conversation((HI, HELLO))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
            Preference("2+2=", "4", "5"),
        ),
        (
            {"prompt": "hi", "chosen": TURNS[1:], "rejected": TURNS[:1]},
            Preference((HI,), (HELLO,), (HI,)),
        ),
        (
            {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[:1]},
            Preference((HI,), (HELLO,), (HI,)),
        ),
        (  # no prompt: what both begin with, and each keeps a turn of its own
            {"chosen": TURNS, "rejected": [TURNS[0], TURNS[0]]},
            Preference((HI,), (HELLO,), (HI,)),
        ),
        ({"chosen": TURNS, "rejected": TURNS}, Preference((HI,), (HELLO,), (HELLO,))),
        ({"chosen": TURNS, "rejected": TURNS[:1]}, Preference((), (HI, HELLO), (HI,))),
        (  # a space belongs to the word behind it
            {"chosen": "The cat sat", "rejected": "The dog sat"},
            Preference("The", " cat sat", " dog sat"),
        ),
        ({"chosen": "The cat", "rejected": "The car"}, Preference("The ca", "t", "r")),
        ({"chosen": "same", "rejected": "same"}, Preference("", "same", "same")),
        (
            {"prompt": [], "chosen": TURNS, "rejected": TURNS[:1]},
            Preference((), (HI, HELLO), (HI,)),
        ),
        (  # the prompt once more in both sides
            {"prompt": "hi", "chosen": TURNS, "rejected": [TURNS[0], TURNS[0]]},
            Preference((HI,), (HELLO,), (HI,)),
        ),
        (
            {"prompt": "hi", "chosen": [BRIEF, *TURNS], "rejected": [BRIEF, *TURNS]},
            Preference((Message("system", "be brief"), HI), (HELLO,), (HELLO,)),
        ),
        (  # in one of them it is a turn like any other
            {"prompt": "hi", "chosen": TURNS, "rejected": TURNS[1:]},
            Preference((HI,), (HI, HELLO), (HELLO,)),
        ),
    ],
)
def test_preferences_may_leave_their_prompt_to_be_found(value: Any, expected: Record) -> None:
    assert parse_record(value, "preference") == expected


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("text", ["x"], 'is JSON, but not an object with a "text"'),
        ("text", {"text": 3}, 'has a "text" that is not a string but a number'),
        ("text", {"messages": TURNS}, r'no "text" \(its keys: messages; train-sft reads its "mess'),
        ("conversation", {"text": "x"}, r'no "messages" .*its keys: text; train-pretrain reads'),
        ("conversation", {"messages": []}, 'has "messages" without a message'),
        ("conversation", {"messages": "hi"}, 'has "messages" that is not a list .* but a string'),
        ("conversation", {"messages": None}, "that is not a list of messages but null"),
        ("conversation", {"messages": ["hi"]}, 'message 1 of "messages" that is not an object'),
        (
            "conversation",
            {"messages": [TURNS[0], {"role": "asistant", "content": "x"}]},
            r"message 2 .* the unknown role 'asistant' \(did you mean 'assistant'\?\): use system,",
        ),
        (
            "conversation",
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            '"content" of message 1 of "messages" that is not a string but a list',
        ),
        ("conversation", {"messages": [{"role": "user"}]}, r'without "content" \(its keys: role\)'),
        ("conversation", {"messages": [{"from": "human"}]}, 'without "value"'),
        ("preference", {"chosen": "a"}, r'has no "chosen" and "rejected" \(its keys: chosen\)'),
        ("preference", {"chosen": "a", "rejected": TURNS}, r'mixes text and messages \("chosen" a'),
        ("preference", {"chosen": "a", "rejected": 4}, "mixes text and messages"),
        ("preference", {"chosen": TURNS, "rejected": []}, '"rejected" without a message'),
    ],
)
def test_what_is_wrong_is_said(kind: Kind, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_record(value, kind)


def test_half_a_surrogate_pair_becomes_a_character_that_utf8_has() -> None:
    value = {"messages": [{"role": "user", "content": "a\ud800b"}]}
    record = parse_record(value, "conversation")
    assert record == Conversation((Message("user", "a\ufffdb"),))
    text_of(record).encode()


def test_records_that_say_something_else_have_other_texts() -> None:
    swapped = Preference((HI,), (HI,), (HELLO,))
    records: list[Record] = [
        "user: hi", Conversation((HI, HELLO)), Conversation((HELLO, HI)),
        Preference((HI,), (HELLO,), (HI,)), swapped,
    ]  # fmt: skip
    assert len({text_of(record) for record in records}) == len(records)
