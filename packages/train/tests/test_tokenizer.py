"""A byte-level BPE: every text comes back, the same sample gives the same bytes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tilewright_train.errors import InputError
from tilewright_train.tokenizer import (
    END_OF_TEXT,
    decode,
    encode,
    load_tokenizer,
    pieces,
    sample,
    sample_budget,
    train_tokenizer,
)

TEXTS = ["def f(x):\n    return x + 1\n", "the cat sat on the mat. The cat sat.\n"] * 20
TOKENIZER = train_tokenizer(TEXTS, 300)


def test_training_twice_gives_the_same_bytes() -> None:
    assert train_tokenizer(TEXTS, 300).to_str() == TOKENIZER.to_str()


def test_the_vocabulary_is_the_end_token_the_bytes_and_merges() -> None:
    assert TOKENIZER.token_to_id(END_OF_TEXT) == 0
    assert train_tokenizer(TEXTS, 270).get_vocab_size() == 270
    assert train_tokenizer(["a"], 300).get_vocab_size() == 257  # nothing to merge


@settings(deadline=None, max_examples=50)
@given(text=st.text())
def test_every_text_comes_back(text: str) -> None:
    ((_, tokens, _),) = encode(TOKENIZER, [(False, text)])
    assert tokens[-1] == 0
    assert 0 not in tokens[:-1]
    assert decode(TOKENIZER, tokens[:-1]) == text


def test_a_text_that_spells_the_end_token_does_not_end(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZER.to_str())
    for tokenizer in (TOKENIZER, load_tokenizer(path)):
        ((_, tokens, _),) = encode(tokenizer, [(True, f"a{END_OF_TEXT}b")])
        assert tokens.count(0) == 1
        assert decode(tokenizer, tokens) == f"a{END_OF_TEXT}b{END_OF_TEXT}"


def test_documents_keep_their_order_and_their_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewright_train.tokenizer._BATCH", 40)  # several batches
    documents = [(i % 3 == 0, text) for i, text in enumerate(TEXTS)]
    encoded = encode(TOKENIZER, documents)
    assert [(mark, decode(TOKENIZER, tokens[:-1])) for mark, tokens, _ in encoded] == documents


def test_a_long_document_has_one_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewright_train.tokenizer._PIECE", 10)
    text = "".join(TEXTS)
    tokens = [token for _, part, _ in encode(TOKENIZER, [(False, text)]) for token in part]
    assert tokens.count(0) == 1
    assert decode(TOKENIZER, tokens[:-1]) == text


@pytest.mark.parametrize("prefix", ["prepend", "first", "always", "never", "byte level"])
def test_a_long_document_is_cut_without_a_trace(
    make_elsewhere: Callable[[str], Tokenizer], prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenizers made elsewhere put a space before a text, but not before each piece of one."""
    tokenizer = make_elsewhere(prefix)
    text = "".join(TEXTS)
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr("tilewright_train.tokenizer._PIECE", 100)
    parts = list(encode(tokenizer, [(True, text)]))
    assert len(parts) > 5
    assert [token for _, part, _ in parts for token in part] == [
        *whole,
        tokenizer.token_to_id("</s>"),
    ]


def test_pieces_end_behind_lines_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewright_train.tokenizer._PIECE", 8)
    assert list(pieces("ab\ncdef\nghijklmnopqr\n")) == ["ab\ncdef\n", "ghijklmn", "opqr\n"]
    assert list(pieces("")) == [""]


def test_the_sample_is_bounded_and_spread_evenly() -> None:
    documents = [f"{i:09d}\n" for i in range(1000)]
    taken = list(sample(documents, 10_000, 1000))
    assert 1000 <= sum(map(len, taken)) < 1010
    assert sum(int(text) < 500 for text in taken) == pytest.approx(50, abs=2)
    assert list(sample(documents, 10_000, 10**9)) == documents
    assert sample_budget(4096) == 4_096_000
    assert sample_budget(10**6) == 16_000_000


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        load_tokenizer(path)
