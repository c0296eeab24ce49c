"""Whole texts in which a special token is one, and what merely spells one is text.

Tokenizers made elsewhere put a prefix before a text, or before each part between special tokens, or
take the space behind a special token with it. So a text is encoded whole, as `transformers` does,
or it would get prefixes that the model has never seen. Special tokens are then found by their
spelling, wherever it stands. Here each special token that is meant has a stand-in, a character that
no text holds, which a copy of the tokenizer knows as a token with the same rules.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer

_PRIVATE = range(0x100000, 0x10FFFE)  # the last plane of Unicode, 65,534 characters for private use
_RULES = ("single_word", "lstrip", "rstrip", "normalized")  # by which a token is found


class StandIns(NamedTuple):
    """A copy of a tokenizer, and what stands for its special tokens in texts."""

    tokenizer: Tokenizer
    """Knows the characters; takes special tokens that are spelled for text."""
    characters: dict[str, str]
    """Of each special token's text."""
    numbers: dict[int, int]
    """Of the copy's tokens for the characters: those of the special tokens."""


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Numbers of the special tokens by their text."""
    added = tokenizer.get_added_tokens_decoder().items()
    return {token.content: number for number, token in added if token.special}


def unused_characters(texts: Iterable[str]) -> Iterator[str]:
    """Characters for private use that are in none of the texts."""
    used = set[str]().union(*texts)
    return (character for character in map(chr, _PRIVATE) if character not in used)


def stand_ins(tokenizer: Tokenizer, characters: Iterator[str]) -> StandIns:
    """One character for each special token of `tokenizer`, taken from `characters`."""
    return _copy(tokenizer, tuple(zip(special_tokens(tokenizer), characters, strict=False)))


def encode_whole(
    known: StandIns, texts: Sequence[str], kinds: Sequence[bytes | bytearray]
) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens of each text, and the kind of each token.

    A token that reaches over characters of both kinds is of kind 1; a special token is of the kind
    that its stand-in has, whatever spaces it takes with it.

    Args:
        known: From `stand_ins`.
        texts: With stand-ins.
        kinds: 0 or 1 for each character of each text.
    """
    stands = set(known.characters.values())
    made = known.tokenizer.encode_batch(texts, add_special_tokens=False)
    for text, of_text, part in zip(texts, kinds, made, strict=True):
        tokens, marks = [], []
        for number, (begin, end) in zip(part.ids, part.offsets, strict=True):
            special = known.numbers.get(number)
            if special is None:
                tokens.append(number)
                marks.append(int(of_text.find(1, begin, max(end, begin + 1)) >= 0))
            else:
                tokens.append(special)
                marks.append(next(of_text[i] for i in range(begin, end) if text[i] in stands))
        yield tokens, marks


@functools.lru_cache(maxsize=4)  # a large vocabulary takes half a second to copy
def _copy(tokenizer: Tokenizer, pairs: tuple[tuple[str, str], ...]) -> StandIns:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    copy.post_processor = None  # it may shorten offsets by the spaces in a token
    characters = dict(pairs)
    added = tokenizer.get_added_tokens_decoder()
    tokens, specials = [], []
    for number, token in added.items():
        if token.content in characters:
            rules = {name: getattr(token, name) for name in _RULES}
            tokens.append(AddedToken(characters[token.content], special=False, **rules))
            specials.append(number)
    copy.add_tokens(tokens)
    known = copy.get_vocab(with_added_tokens=True)
    ids = [known[token.content] for token in tokens]
    return StandIns(copy, characters, dict(zip(ids, specials, strict=True)))
