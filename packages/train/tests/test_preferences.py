"""Pairs as tokens: where completions begin, and what is skipped, kept and counted."""

from collections import Counter

import pytest
from tokenizers import Tokenizer

from tilewright_train.chat_template import CHATML, ChatTemplate
from tilewright_train.conversations import chat_tokenizer
from tilewright_train.errors import InputError
from tilewright_train.preferences import (
    EQUAL,
    MERGED,
    WITHOUT_COMPLETION,
    pair_encoding,
    tokenize_pairs,
)
from tilewright_train.record_groups import REFUSED
from tilewright_train.records import Message, Preference, parse_record
from tilewright_train.tokenizer import decode, end_token, load_tokenizer, train_tokenizer

TEMPLATE = ChatTemplate(CHATML)
ASK = (Message("user", "the cat"),)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    file = folder / "tokenizer.json"
    file.write_text(train_tokenizer(["the cat sat on a red mat today"] * 9, 300).to_str())
    return load_tokenizer(chat_tokenizer(file, TEMPLATE, folder / "cache"))


def completion(tokenizer: Tokenizer, tokens: list[int], targets: list[int]) -> str:
    return decode(tokenizer, [t for t, target in zip(tokens, targets, strict=True) if target])


def test_of_messages_the_assistants_tokens_behind_the_prompt_count(tokenizer: Tokenizer) -> None:
    chosen = (Message("assistant", "sat on"), Message("user", "why"), Message("assistant", "today"))
    rejected = (Message("assistant", "a mat"),)
    (pair,) = tokenize_pairs(tokenizer, TEMPLATE, [Preference(ASK, chosen, rejected)])
    assert completion(tokenizer, *pair.chosen) == "sat on<|im_end|>today<|im_end|>"
    assert completion(tokenizer, *pair.rejected) == "a mat<|im_end|>"
    assert decode(tokenizer, pair.rejected.tokens) == (
        "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\na mat<|im_end|>\n"
    )
    assert not pair.merged


def test_what_the_assistant_says_in_the_prompt_does_not_count(tokenizer: Tokenizer) -> None:
    prompt = (*ASK, Message("assistant", "sat"), Message("user", "on"))
    sides = ((Message("assistant", "a mat"),), (Message("assistant", "today"),))
    (pair,) = tokenize_pairs(tokenizer, TEMPLATE, [Preference(prompt, *sides)])
    assert completion(tokenizer, *pair.chosen) == "a mat<|im_end|>"


def test_of_strings_everything_behind_the_prompt_counts_with_an_end(tokenizer: Tokenizer) -> None:
    (pair,) = tokenize_pairs(tokenizer, TEMPLATE, [Preference("the cat", " sat", " on a mat")])
    end = end_token(tokenizer)
    assert pair.chosen.tokens[0] == pair.chosen.tokens[-1] == end
    assert completion(tokenizer, *pair.chosen) == " sat<|endoftext|>"
    assert completion(tokenizer, *pair.rejected) == " on a mat<|endoftext|>"
    (pair,) = tokenize_pairs(tokenizer, TEMPLATE, [Preference("", "sat", "")])
    assert completion(tokenizer, *pair.chosen) == "sat<|endoftext|>"
    assert completion(tokenizer, *pair.rejected) == "<|endoftext|>"


def test_a_merge_across_the_boundary_moves_it_forward_on_both_sides(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("the cat", add_special_tokens=False).ids
    parts = tokenizer.encode("the ca", add_special_tokens=False).ids
    assert whole[: len(parts)] != parts  # «cat» is one token
    (pair,) = tokenize_pairs(tokenizer, TEMPLATE, [Preference("the ca", "t", " mat")])
    assert pair.merged
    assert completion(tokenizer, *pair.chosen) == " cat<|endoftext|>"
    # The boundary is the earlier one of both sides: they condition on the same tokens.
    assert completion(tokenizer, *pair.rejected).endswith(" mat<|endoftext|>")
    first = [side.targets.index(1) for side in (pair.chosen, pair.rejected)]
    assert first[0] == first[1]
    assert pair.chosen.tokens[: first[0]] == pair.rejected.tokens[: first[1]]


def test_implicit_prompts_are_what_both_sides_begin_with(tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "the cat"}]
    sides = [[*turns, {"role": "assistant", "content": text}] for text in ("sat", "today")]
    record = parse_record({"chosen": sides[0], "rejected": sides[1]}, "preference")
    assert isinstance(record, Preference)
    explicit = Preference(ASK, (Message("assistant", "sat"),), (Message("assistant", "today"),))
    assert tokenize_pairs(tokenizer, TEMPLATE, [record]) == tokenize_pairs(
        tokenizer, TEMPLATE, [explicit]
    )
    texts = parse_record({"chosen": "the cat sat", "rejected": "the cat on"}, "preference")
    assert texts == Preference("the cat", " sat", " on")


def test_pairs_are_two_samples_and_what_is_odd_is_counted(tokenizer: Tokenizer) -> None:
    def pair(chosen: str, rejected: str, role: str = "assistant") -> Preference:
        return Preference(ASK, (Message("assistant", chosen),), (Message(role, rejected),))

    records = [
        (False, pair("sat", "on")),
        (True, pair("sat", "sat")),
        (False, pair("sat", "on", "user")),
        (False, Preference("the ca", "t", "n")),
    ]
    counts: Counter[str] = Counter()
    encoded = list(pair_encoding(TEMPLATE).encoder(tokenizer, iter(records), counts))
    assert [e.validation for e in encoded] == [False, False, True, True, False, False]
    assert encoded[2].tokens == encoded[3].tokens
    assert counts == {EQUAL: 1, MERGED: 1, WITHOUT_COMPLETION: 1}


def test_a_template_that_raises_is_an_error_or_is_skipped(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(
        "{% if messages | length > 2 %}{{ raise_exception('x') }}{% endif %}" + CHATML
    )
    good = Preference(ASK, (Message("assistant", "sat"),), (Message("assistant", "on"),))
    bad = Preference(ASK, (Message("assistant", "a"), Message("user", "b")), good.rejected)
    records = [(False, good), (False, bad), (True, Preference("the", " cat", " mat"))]
    with pytest.raises(InputError, match="the chat template raises"):
        list(pair_encoding(template).encoder(tokenizer, iter(records), Counter()))
    counts: Counter[str] = Counter()
    encoding = pair_encoding(template, skip_refused=True)
    assert len(list(encoding.encoder(tokenizer, iter(records), counts))) == 4
    assert counts[REFUSED] == 1


def test_the_template_decides_on_the_cache() -> None:
    encoding = pair_encoding(TEMPLATE)
    assert (encoding.kind, encoding.settings) == ("preference", {"template": CHATML})
