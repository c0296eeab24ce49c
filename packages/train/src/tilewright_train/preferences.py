"""Preference pairs as tokens: the encoding of DPO.

A pair becomes two samples, prompt and chosen, then prompt and rejected. The completion begins where
the tokens of the prompt and those of the two samples part: BPE may merge across the boundary, and
then the last token of the prompt counts as the completion's. Of messages, the targets are what the
template marks as the assistant's behind that place; of strings, everything behind it, the end token
included.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from tilewright_train.chat_template import ChatTemplate
from tilewright_train.conversations import Tokenized, tokenize
from tilewright_train.record_groups import groups
from tilewright_train.records import Message, Preference, Record
from tilewright_train.samples import Encoded
from tilewright_train.tokenizer import end_token
from tilewright_train.tokens import Encoding

WITHOUT_COMPLETION = "without_completion"
"""Counts pairs that were skipped because the assistant says nothing on one side."""
EQUAL = "equal"
"""Counts pairs with equal sides; they are kept, with a margin of 0."""
MERGED = "merged"
"""Counts pairs whose completion merges with the end of the prompt into one token."""


class TokenizedPair(NamedTuple):
    """Both sides of a pair, each with its prompt."""

    chosen: Tokenized
    rejected: Tokenized
    merged: bool
    """Whether the prompt's tokens are no beginning of both sides'."""


def tokenize_pairs(
    tokenizer: Tokenizer, template: ChatTemplate, pairs: Sequence[Preference]
) -> list[TokenizedPair]:
    """Encode pairs; those of messages through the template, those of strings as they stand.

    Args:
        tokenizer: With the template's special tokens, see `chat_tokenizer`.
        template: Conversations to text.
        pairs: Of either kind.

    Raises:
        InputError: The template raises.
    """
    made: list[TokenizedPair | None] = [None] * len(pairs)
    for is_text in (False, True):
        numbers = [n for n, pair in enumerate(pairs) if isinstance(pair.prompt, str) == is_text]
        chosen_kind = [pairs[n] for n in numbers]
        encode = _encode_texts if is_text else _encode_turns
        sides = encode(tokenizer, template, chosen_kind)
        for number, (prompt, chosen, rejected) in zip(numbers, sides, strict=True):
            made[number] = _split(prompt, chosen, rejected)
    return [pair for pair in made if pair is not None]


def pair_encoding(template: ChatTemplate, *, skip_refused: bool = False) -> Encoding:
    """Pairs to samples, two for each.

    A pair with a side in which nothing is to be predicted is skipped and counted.

    Args:
        template: Conversations to text.
        skip_refused: Skip what the template raises on, too, and count it.
    """

    def render(pair: Preference) -> None:
        if isinstance(pair.prompt, str):  # strings the template does not see
            return
        template.render(pair.prompt, add_generation_prompt=True)
        for side in (pair.chosen, pair.rejected):
            template.render(pair.prompt + _turns(side))

    def encode(
        tokenizer: Tokenizer, records: Iterator[tuple[bool, Record]], counts: "Counter[str]"
    ) -> Iterator[Encoded]:
        pairs = ((mark, r) for mark, r in records if isinstance(r, Preference))
        for group in groups(pairs, counts, render if skip_refused else None):
            made = tokenize_pairs(tokenizer, template, [pair for _, pair in group])
            for (mark, _), (chosen, rejected, merged) in zip(group, made, strict=True):
                if not (any(chosen.targets) and any(rejected.targets)):
                    counts[WITHOUT_COMPLETION] += 1
                    continue
                counts[EQUAL] += chosen.tokens == rejected.tokens
                counts[MERGED] += merged
                yield Encoded(mark, *chosen)
                yield Encoded(mark, *rejected)

    return Encoding(kind="preference", encoder=encode, settings={"template": template.source})


def _encode_turns(
    tokenizer: Tokenizer, template: ChatTemplate, pairs: Sequence[Preference]
) -> Iterator[tuple[Tokenized, Tokenized, Tokenized]]:
    """Prompt, chosen and rejected of each pair of messages; the latter two hold the prompt."""
    prompts = [_turns(pair.prompt) for pair in pairs]
    sides = [
        [turns + _turns(getattr(pair, side)) for turns, pair in zip(prompts, pairs, strict=True)]
        for side in ("chosen", "rejected")
    ]
    return zip(
        tokenize(tokenizer, template, prompts, add_generation_prompt=True),
        *(tokenize(tokenizer, template, side) for side in sides),
        strict=True,
    )


def _encode_texts(
    tokenizer: Tokenizer, _: ChatTemplate, pairs: Sequence[Preference]
) -> Iterator[tuple[Tokenized, Tokenized, Tokenized]]:
    """The same of strings, behind an end token as a text is in pretraining."""
    end = end_token(tokenizer)

    def encoded(texts: list[str], last: list[int]) -> list[Tokenized]:
        made = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        tokens = [[end, *part.ids, *last] for part in made]
        return [Tokenized(ids, [0, *[1] * (len(ids) - 1)]) for ids in tokens]

    prompts = [str(pair.prompt) for pair in pairs]
    sides = [
        [text + str(getattr(pair, side)) for text, pair in zip(prompts, pairs, strict=True)]
        for side in ("chosen", "rejected")
    ]
    return zip(encoded(prompts, []), *(encoded(side, [end]) for side in sides), strict=True)


def _split(prompt: Tokenized, chosen: Tokenized, rejected: Tokenized) -> TokenizedPair:
    """Take the targets out of what both sides share with the prompt."""
    length = len(prompt.tokens)
    shared = min(_shared(prompt.tokens, side.tokens) for side in (chosen, rejected))
    sides = (
        Tokenized(side.tokens, [0] * shared + side.targets[shared:]) for side in (chosen, rejected)
    )
    return TokenizedPair(*sides, merged=shared < length)


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _turns(part: str | tuple[Message, ...]) -> tuple[Message, ...]:
    assert not isinstance(part, str)
    return part
