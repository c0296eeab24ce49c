"""Conversations as text: a Jinja template that also says which text is the assistant's.

A template is one that `transformers` reads. What the assistant writes, its end of turn included,
stands between `{% generation %}` and `{% endgeneration %}`; a template without them is rendered
with and without each of the assistant's turns, and the difference is the turn. Either way nothing
is searched for, so no message can pass for a turn. It is kept beside the tokenizer, as
`chat_template.jinja`. Templates run in a sandbox.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tilewright_train.errors import InputError, one_line
from tilewright_train.records import Message

TEMPLATE_FILE = "chat_template.jinja"

IM_START, IM_END = "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}{{ '\\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)
"""The default: <|im_start|>role, a line, the content, <|im_end|>, for every turn."""


class Piece(NamedTuple):
    """A part of the rendered text."""

    text: str
    """Not empty."""
    is_generated: bool
    """Whether the assistant writes it."""


class ChatTemplate:
    """A compiled template.

    Attributes:
        source: Its text.
        marks: Whether it marks the assistant's part itself, by {% generation %}.
    """

    def __init__(self, source: str) -> None:
        """Compile it.

        Args:
            source: Jinja.

        Raises:
            InputError: It is no Jinja, raises, or writes nothing for the assistant's turns.
        """
        self.source = source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        known = {"raise_exception": _raise, "strftime_now": _strftime_now}
        try:
            parsed = environment.parse(source)
            self._template = environment.from_string(source, globals=known)
        except TemplateSyntaxError as error:
            raise InputError(
                f"the chat template is no Jinja: line {error.lineno}: {one_line(error)}"
            ) from None
        except Exception as error:  # of Python's compiler, or of Jinja's own recursion
            raise InputError(
                f"the chat template cannot be compiled ({type(error).__name__}: {one_line(error)}):"
                " nest its blocks and expressions less deeply"
            ) from None
        used = parsed.find_all(nodes.ExtensionAttribute)
        self.marks = any(attribute.name == _Generation._mark.__name__ for attribute in used)
        tried = self.render([Message("user", "question"), Message("assistant", "answer")])
        if not any(piece.is_generated for piece in tried):
            raise InputError(
                "the chat template writes nothing for the assistant's turns: put {% generation %}"
                " and {% endgeneration %} around their content and their end"
            )

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> list[Piece]:
        """The text of a conversation in pieces, those of one kind joined.

        Args:
            messages: Turns.
            add_generation_prompt: End with what the assistant's next turn begins with.

        Raises:
            InputError: The template raises, or writes turns otherwise when others follow and does
                not mark them.
        """
        if self.marks:
            return _joined(
                (str(part), isinstance(part, _Generated))
                for part in self._parts(messages, add_generation_prompt)
            )
        return _joined(self._differences(messages, add_generation_prompt))

    def _parts(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[str]:
        """What the template yields, one part after the other."""
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            return list(
                self._template.generate(
                    messages=turns,
                    add_generation_prompt=add_generation_prompt,
                    tools=None,  # templates ask whether they are none, not whether they are defined
                    documents=None,
                )
            )
        except Exception as error:  # whatever the template's expressions do
            raise InputError(
                f"the chat template raises {type(error).__name__}: {one_line(error)}: mend the"
                " data, or give another --chat-template"
            ) from None

    def _differences(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> Iterator[tuple[str, bool]]:
        """(text, whether it is the assistant's), by rendering up to each turn and with it."""
        whole = "".join(self._parts(messages, add_generation_prompt))
        done = 0
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = "".join(self._parts(messages[:number], True))
            after = "".join(self._parts(messages[: number + 1], False))
            if not (after.startswith(before) and whole.startswith(after)):
                raise InputError(
                    f"the chat template writes turn {number + 1} otherwise when others follow it,"
                    " so its end is not known: put {% generation %} and {% endgeneration %} around"
                    " what the assistant writes, or give another --chat-template"
                )
            yield whole[done : len(before)], False
            yield whole[len(before) : len(after)], True
            done = len(after)
        yield whole[done:], False


def _joined(parts: Iterable[tuple[str, bool]]) -> list[Piece]:
    """Pieces of (text, whether it is the assistant's), neighbours of one kind in one."""
    pieces: list[Piece] = []
    for text, kind in parts:
        if pieces and pieces[-1].is_generated == kind:
            pieces[-1] = Piece(pieces[-1].text + text, kind)
        elif text:
            pieces.append(Piece(text, kind))
    return pieces


def read_template(path: Path) -> str:
    """The text of a template.

    Raises:
        InputError: It is not there or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as a chat template ({one_line(error)}): give --chat-template"
            " a Jinja file"
        ) from None


class _Generated(str):
    """Text that was rendered between {% generation %} and {% endgeneration %}."""


class _Generation(Extension):
    """The tag; what it renders is yielded as one part, which keeps its type."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> _Generated:
        return _Generated(caller())


def _raise(message: Any) -> None:
    """What templates call `raise_exception`."""
    raise TemplateError(str(message))


def _strftime_now(format: str) -> str:  # templates may name it
    """Today, or the time, as templates ask for it."""
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` as templates for models mean it: Jinja's own escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
