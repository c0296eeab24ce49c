"""A split that depends on the records alone."""

import pytest

from tilewright_train.errors import InputError
from tilewright_train.records import Conversation, Message, Record
from tilewright_train.split import is_validation, split

MANY = [f"document {i} " * (i % 7 + 1) for i in range(1000)]


def test_a_large_corpus_is_split_by_the_hash_of_each_document() -> None:
    marked = list(split(MANY, 0.1))
    assert [text for _, text in marked] == MANY
    assert marked == [(is_validation(text, 0.1), text) for text in MANY]
    assert 60 < sum(side for side, _ in marked) < 140
    # Neither order nor company matters.
    assert {t: s for s, t in split(reversed(MANY[:500]), 0.1)} == {
        text: side for side, text in marked[:500]
    }


def test_the_hash_does_not_depend_on_the_process() -> None:
    assert [i for i in range(60) if is_validation(f"document {i}", 0.1)] == [21, 22, 51, 55, 59]


@pytest.mark.parametrize("documents", [["a" * 95 + "\n" + "b" * 104], ["x" * 100] * 20])
def test_a_small_corpus_gives_its_last_part(documents: list[str]) -> None:
    marked = [(side, str(text)) for side, text in split(documents, 0.5)]
    assert "".join(text for _, text in marked) == "".join(documents)
    sides = [side for side, _ in marked]
    assert sides == sorted(sides)
    held_out = "".join(text for side, text in marked if side)
    assert held_out == ("b" * 104 if len(documents) == 1 else "x" * 1000)


def test_few_conversations_give_their_last_ones() -> None:
    records: list[Record] = [Conversation((Message("user", str(n)),)) for n in range(10)]
    assert list(split(records, 0.2)) == [(n >= 8, r) for n, r in enumerate(records)]
    assert [side for side, _ in split(records, 0.01)] == [False] * 9 + [True]


def test_a_side_without_text_is_an_error() -> None:
    with pytest.raises(InputError, match="no text is left for training"):
        list(split(["a"], 0.5))
    with pytest.raises(InputError, match="holds no text"):
        list(split([], 0.5))
    with pytest.raises(InputError, match="no text is left for validation"):
        list(split(["alike"] * 300, 0.1))
