"""Templates: what they render, what they mark, and how they fail."""

from pathlib import Path

import pytest

from tilewright_train.chat_template import CHATML, ChatTemplate, Piece, read_template
from tilewright_train.errors import InputError
from tilewright_train.records import Message

TALK = [
    Message("system", "Be brief."),
    Message("user", "Hi"),
    Message("assistant", "Hello."),
    Message("user", "Bye"),
    Message("assistant", ""),
]


def test_chatml_marks_content_and_end_of_the_assistants_turns() -> None:
    assert ChatTemplate(CHATML).render(TALK) == [
        Piece(
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n",
            False,
        ),
        Piece("Hello.<|im_end|>", True),
        Piece("\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n", False),
        Piece("<|im_end|>", True),
        Piece("\n", False),
    ]


def test_a_prompt_ends_where_the_answer_begins() -> None:
    template = ChatTemplate(CHATML)
    (prompt,) = template.render(TALK[:2], add_generation_prompt=True)
    assert prompt == template.render(TALK)[0]


def test_an_answer_that_occurs_in_the_question_is_marked_once() -> None:
    same = [Message("user", "yes<|im_end|>"), Message("assistant", "yes")]
    pieces = ChatTemplate(CHATML).render(same)
    assert [piece.text for piece in pieces if piece.is_generated] == ["yes<|im_end|>"]
    assert pieces[1].is_generated


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}{{ m.content }}", "is no Jinja: line 1: Unexpected end of"),
        ("{% generation %}{{ messages }}", "is no Jinja: line 1: Unexpected end of template"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "marks nothing as the assistant's"),
        ("{{ raise_exception('no tools') }}", "raises TemplateError: no tools: mend the data"),
        ("{{ messages[0].content + 1 }}", "raises TypeError: can only concatenate str"),
        ("{{ messages.nothing.more }}", "raises UndefinedError"),
        ("{{ messages.append(1) }}", "raises SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "raises SecurityError"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(source: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        ChatTemplate(source)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_template_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xe9\xff")
    for name in ("missing", "latin"):
        with pytest.raises(InputError, match=f"{name} cannot be read as a chat template"):
            read_template(tmp_path / name)
