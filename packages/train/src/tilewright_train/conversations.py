"""Conversations as tokens, and which of them are to be predicted: the encoding of SFT.

A conversation is encoded whole, so its tokens are those that `transformers` gives; the template's
pieces say which of them are the assistant's. Special tokens are single tokens where the template
writes them; where a message spells one it stays text.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer

from tilewright_train import cache as caching
from tilewright_train.chat_template import IM_END, IM_START, ChatTemplate
from tilewright_train.errors import InputError, writing
from tilewright_train.record_groups import groups
from tilewright_train.records import Conversation, Message, Record
from tilewright_train.samples import Encoded
from tilewright_train.stand_ins import (
    encode_whole,
    special_tokens,
    stand_ins,
    unused_characters,
)
from tilewright_train.tokenizer import TOKENIZER_FILE, load_tokenizer
from tilewright_train.tokens import Encoding

WITHOUT_ASSISTANT = "without_assistant"
"""Counts conversations that were skipped because the assistant says nothing in them."""


class Tokenized(NamedTuple):
    """A conversation, or its beginning."""

    tokens: list[int]
    targets: list[int]
    """1 for the assistant's tokens, its end of turn included; 0 for the others."""


def tokenize(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    conversations: Sequence[Sequence[Message]],
    *,
    add_generation_prompt: bool = False,
) -> list[Tokenized]:
    """Encode conversations.

    Args:
        tokenizer: With the template's special tokens, see `chat_tokenizer`.
        template: Conversations to text.
        conversations: Turns of each.
        add_generation_prompt: End with what the assistant's next turn begins with.

    Raises:
        InputError: The template raises; the message quotes the conversation's beginning.
    """
    contents = (message.content for messages in conversations for message in messages)
    unused = unused_characters((template.source, *contents))
    guard = next(unused)
    known = stand_ins(tokenizer, unused)
    special = known.characters
    split = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
    texts, kinds = [], []
    for messages in conversations:
        guarded = [Message(m.role, _guarded(m.content, special, guard)) for m in messages]
        try:
            pieces = template.render(guarded, add_generation_prompt=add_generation_prompt)
        except InputError as error:
            raise InputError(f"{error} (in {_quoted(messages)})") from None
        text, marks = "", bytearray()
        for piece in pieces:
            part = split.sub(lambda match: special[match.group()], piece.text).replace(guard, "")
            text += part
            answer = len(part)
            if piece.is_generated and not template.marks:
                answer = _end_of_answer(part, special)
            marks += bytes([piece.is_generated]) * answer + bytes(len(part) - answer)
        texts.append(text)
        kinds.append(marks)
    return [Tokenized(*made) for made in encode_whole(known, texts, kinds)]


def chat_encoding(template: ChatTemplate, *, skip_refused: bool = False) -> Encoding:
    """Conversations to samples of which the assistant's tokens are predicted.

    One without such a token is skipped and counted as `WITHOUT_ASSISTANT`.

    Args:
        template: Conversations to text.
        skip_refused: Skip what the template raises on, too, and count it.
    """

    def render(talk: Conversation) -> None:
        template.render(talk.messages)

    def encode(
        tokenizer: Tokenizer, records: Iterator[tuple[bool, Record]], counts: "Counter[str]"
    ) -> Iterator[Encoded]:
        talks = ((mark, r) for mark, r in records if isinstance(r, Conversation))
        for group in groups(talks, counts, render if skip_refused else None):
            made = tokenize(tokenizer, template, [talk.messages for _, talk in group])
            for (mark, _), (tokens, targets) in zip(group, made, strict=True):
                if any(targets):
                    yield Encoded(mark, tokens, targets)
                else:
                    counts[WITHOUT_ASSISTANT] += 1

    return Encoding(kind="conversation", encoder=encode, settings={"template": template.source})


def chat_tokenizer(file: Path, template: ChatTemplate, cache: Path) -> Path:
    """A tokenizer.json with ChatML's two special tokens, where the template writes them.

    Args:
        file: A tokenizer.json; the answer, if it lacks neither.
        template: Conversations to text.
        cache: Keeps the one that is made.
    """
    tokenizer = load_tokenizer(file)
    missing = missing_chat_tokens(special_tokens(tokenizer), template)
    if not missing:
        return file
    depends_on = {"tokenizer": tokenizer.to_str(), "added": missing}
    add_chat_tokens(tokenizer, missing)

    def build(folder: Path) -> None:
        with writing(folder.parent, caching.REMEDY):
            (folder / TOKENIZER_FILE).write_text(tokenizer.to_str(), encoding="utf-8")

    def is_whole(folder: Path) -> bool:
        try:
            return special_tokens(load_tokenizer(folder / TOKENIZER_FILE)).keys() >= set(missing)
        except (InputError, OSError):
            return False

    folder, _ = caching.entry(cache, "tokenizer-chat", depends_on, build, is_whole)
    return folder / TOKENIZER_FILE


def missing_chat_tokens(known: Collection[str], template: ChatTemplate) -> list[str]:
    """ChatML's two, if the template writes them and they are not among the known."""
    return [t for t in (IM_START, IM_END) if t in template.source and t not in known]


def add_chat_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Make `texts` special tokens, with the next free numbers."""
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in texts])


def end_of_turn(tokenizer: Tokenizer, template: ChatTemplate) -> int:
    """The special token with which the assistant's turns end.

    Raises:
        InputError: They end with text, which no generation could tell from an answer.
    """
    turns = [Message("user", "question"), Message("assistant", "answer")]
    ((tokens, targets),) = tokenize(tokenizer, template, [turns])
    last = max(place for place, target in enumerate(targets) if target)
    if tokens[last] not in special_tokens(tokenizer).values():
        known = ", ".join(special_tokens(tokenizer)) or "none"
        raise InputError(
            "the chat template ends the assistant's turns with text: end them, before"
            f" {{% endgeneration %}}, with a special token of the tokenizer ({known})"
        )
    return tokens[last]


def _quoted(messages: Sequence[Message]) -> str:
    """Words by which to find a conversation in the data."""
    if not messages:
        return "an empty conversation"
    role, content = messages[0]
    start = " ".join(content.split())
    return f"the conversation that begins {role}: {start[:40]!r}{'…' * (len(start) > 40)}"


def _guarded(content: str, special: Iterable[str], guard: str) -> str:
    """`content` with every special token that it spells broken up by `guard`."""
    for text in special:
        content = content.replace(text, text[0] + guard + text[1:])
    return content


def _end_of_answer(text: str, special: dict[str, str]) -> int:
    """Where a turn ends: with its last special token, if spaces are all that stands behind it.

    Those separate it from the next.
    """
    end = len(text.rstrip())
    return end if text[end - 1 : end] in special.values() else len(text)
