"""Groups of records: in order, bounded by number and by length, without what is refused."""

from collections import Counter

import pytest

from tilewright_train import record_groups
from tilewright_train.errors import InputError
from tilewright_train.record_groups import REFUSED, groups
from tilewright_train.records import Conversation, Message


def talk(content: str) -> Conversation:
    return Conversation((Message("user", content),))


def test_a_group_has_a_bounded_number_of_records_and_of_characters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(record_groups, "_RECORDS", 3)
    monkeypatch.setattr(record_groups, "_CHARACTERS", 100)
    contents = ["a", "b", "c", "d" * 99, "e" * 60, "f" * 60, "g"]
    marked = [(i % 2 == 0, talk(text)) for i, text in enumerate(contents)]
    made = list(groups(iter(marked), Counter()))
    assert [len(group) for group in made] == [3, 1, 2, 1]
    assert [item for group in made for item in group] == marked


def test_what_is_refused_is_counted_and_fills_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_groups, "_RECORDS", 2)

    def render(record: Conversation) -> None:
        if record == talk("bad"):
            raise InputError("refused")

    marked = [(False, talk(text)) for text in ("bad", "a", "bad", "b", "c", "bad")]
    counts: Counter[str] = Counter()
    made = list(groups(iter(marked), counts, render))
    assert [[record for _, record in group] for group in made] == [
        [talk("a"), talk("b")],
        [talk("c")],
    ]
    assert counts == {REFUSED: 3}
