"""What one sample of the data is: a text, a conversation or a preference pair.

    {"text": "…"}
    {"messages": [{"role": "user", "content": "…"}, …]}
    {"prompt": …, "chosen": …, "rejected": …}

"conversations" says the same as "messages", and ShareGPT's "from" and "value" the same as "role"
and "content". The parts of a pair are strings or lists of messages, and without a prompt it is what
the two begin with. The reader of one objective asks for one of the three and an object may hold
more keys than that. What does not fit is an `InputError` without a place; `record_files` adds file
and line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from tilewright_train.errors import InputError, suggest

Kind = Literal["text", "conversation", "preference"]

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)

SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "function_response": "tool", "observation": "tool",
}  # fmt: skip
"""Names that ShareGPT's files use, beside those of `ROLES`."""

_CONVERSATION_KEYS = ("messages", "conversations")


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """One of `ROLES`."""
    content: str
    """May be empty."""


@dataclass(frozen=True)
class Conversation:
    """Turns of one or more speakers."""

    messages: tuple[Message, ...]
    """At least one."""


@dataclass(frozen=True)
class Preference:
    """Two continuations of one prompt, the first better than the second.

    All three are texts, or all three are turns; chosen and rejected do not repeat the prompt.
    """

    prompt: str | tuple[Message, ...]
    """May be empty."""
    chosen: str | tuple[Message, ...]
    """At least one message."""
    rejected: str | tuple[Message, ...]
    """Likewise; may equal chosen."""


Record = str | Conversation | Preference
"""A text is a plain string."""


def parse_record(value: Any, kind: Kind) -> Record:
    """The record of one JSON object or one row of a table.

    Args:
        value: What the parser of JSON or parquet gave.
        kind: Which of the three is wanted.

    Raises:
        InputError: Not an object, keys of another kind or of none, values of a wrong type, an empty
            conversation, an unknown role.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"is JSON, but not an object with {_WANTED[kind]}")
    if kind == "text":
        _check_keys(value, kind, ("text",))
        return string(value["text"], '"text"')
    if kind == "conversation":
        _check_keys(value, kind, *((key,) for key in _CONVERSATION_KEYS))
        key = next(key for key in _CONVERSATION_KEYS if key in value)
        return Conversation(_messages(value[key], f'"{key}"'))
    _check_keys(value, kind, ("chosen", "rejected"))
    return _preference(value)


def text_of(record: Record) -> str:
    """Everything a record says, one part a line: what its hash and its size are taken of."""
    if isinstance(record, str):
        return record
    if isinstance(record, Conversation):
        return _joined(record.messages)
    return "\n".join(_joined(part) for part in (record.prompt, record.chosen, record.rejected))


def string(value: Any, what: str) -> str:
    """`value` if it is text; half a surrogate pair, which has no UTF-8 bytes, becomes U+FFFD."""
    if not isinstance(value, str):
        raise InputError(f"has a {what} that is not a string but {_named(value)}")
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


_WANTED = {
    "text": 'a "text"',
    "conversation": '"messages" (or "conversations")',
    "preference": '"chosen" and "rejected"',
}
_COMMANDS = {"text": "train-pretrain", "conversation": "train-sft", "preference": "train-dpo"}


def _check_keys(value: Mapping[str, Any], kind: Kind, *any_of: tuple[str, ...]) -> None:
    """Refuse an object without the keys of its kind; tell which command reads what it holds."""
    if any(all(key in value for key in keys) for keys in any_of):
        return
    held = (
        other
        for other, keys in (
            ("conversation", ("messages",)), ("conversation", ("conversations",)),
            ("preference", ("chosen", "rejected")), ("text", ("text",)),
        )
        if other != kind and all(key in value for key in keys)
    )  # fmt: skip
    other = next(held, None)
    reads = f"; {_COMMANDS[other]} reads its {_WANTED[other]}" if other else ""
    keys = ", ".join(sorted(map(str, value))[:5]) or "none"
    raise InputError(f"has no {_WANTED[kind].removeprefix('a ')} (its keys: {keys}{reads})")


def _preference(value: Mapping[str, Any]) -> Preference:
    parts = {key: value[key] for key in ("prompt", "chosen", "rejected") if key in value}
    if isinstance(parts.get("prompt"), str) and not isinstance(parts["chosen"], str):
        parts["prompt"] = [{"role": "user", "content": parts["prompt"]}]
    if len({isinstance(part, str) for part in parts.values()}) > 1:
        kinds = ", ".join(f'"{key}" {_named(part)}' for key, part in parts.items())
        raise InputError(f"mixes text and messages ({kinds}): give all of one sort")
    if isinstance(parts["chosen"], str):
        texts = [string(parts[key], f'"{key}"') for key in ("chosen", "rejected")]
        if "prompt" in parts:
            return Preference(string(parts["prompt"], '"prompt"'), *texts)
        shared = _shared_text(*texts)
        return Preference(texts[0][:shared], *(text[shared:] for text in texts))
    turns = [_messages(parts[key], f'"{key}"') for key in ("chosen", "rejected")]
    shared = _shared_turns(*turns)
    if "prompt" in parts:
        prompt = _messages(parts["prompt"], '"prompt"') if parts["prompt"] else ()
        # UltraFeedback and its like have the prompt in both sides, too, perhaps behind a system's.
        if not prompt or turns[0][:shared][-len(prompt) :] != prompt:
            return Preference(prompt, *turns)
    return Preference(turns[0][:shared], *(turn[shared:] for turn in turns))


def _messages(value: Any, what: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InputError(f"has {what} that is not a list of messages but {_named(value)}")
    if not value:
        raise InputError(f"has {what} without a message")
    return tuple(_message(item, f"message {n} of {what}") for n, item in enumerate(value, start=1))


def _message(value: Any, what: str) -> Message:
    if not isinstance(value, Mapping):
        raise InputError(f"has a {what} that is not an object but {_named(value)}")
    role_key, content_key = ("from", "value") if "from" in value else ("role", "content")
    for key in (role_key, content_key):
        if key not in value:
            keys = ", ".join(sorted(map(str, value))[:5]) or "none"
            raise InputError(f'has a {what} without "{key}" (its keys: {keys})')
    given = string(value[role_key], f'"{role_key}" of {what}')
    role = SHAREGPT_ROLES.get(given, given)
    if role not in ROLES:
        known = (*ROLES, *SHAREGPT_ROLES)
        raise InputError(
            f"has a {what} with the unknown role {given!r}{suggest(given, known)}: use"
            f" {', '.join(ROLES)}"
        )
    return Message(role, string(value[content_key], f'"{content_key}" of {what}'))


def _shared_text(chosen: str, rejected: str) -> int:
    """Length of the prompt that two texts begin with; a space goes with the word behind it."""
    if chosen == rejected:
        return 0
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    return shared - (shared > 0 and chosen[shared - 1] == " ")


def _shared_turns(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> int:
    """Number of turns that two conversations begin with; each keeps one that is its own."""
    most = min(len(chosen), len(rejected)) - 1
    pairs = enumerate(zip(chosen[:most], rejected[:most], strict=True))
    return next((i for i, (a, b) in pairs if a != b), most)


def _joined(part: str | tuple[Message, ...]) -> str:
    return part if isinstance(part, str) else "\n".join(f"{m.role}: {m.content}" for m in part)


def _named(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    kinds |= {int: "a number", float: "a number", type(None): "null"}
    return kinds.get(type(value), f"a {type(value).__name__}")
