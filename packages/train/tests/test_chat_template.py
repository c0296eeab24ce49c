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
        ("{{ messages[0].content }}", "writes nothing for the assistant's turns: put {% gen"),
        ("{% if false %}{% generation %}x{% endgeneration %}{% endif %}", "writes nothing for"),
        ("{{ messages | length }}", "writes turn 2 otherwise when others follow it"),
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


PLAIN = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.mark.parametrize("talk", [TALK, [TALK[1]], TALK[:3], [TALK[1], TALK[2], TALK[2]]])
def test_without_marks_a_turn_is_the_difference_that_it_makes(talk: list[Message]) -> None:
    """As with marks, but that the line behind a turn's end belongs to the difference."""
    marked, plain = ChatTemplate(CHATML), ChatTemplate(PLAIN)
    assert (marked.marks, plain.marks) == (True, False)
    for prompted in (False, True):
        expected = marked.render(talk, add_generation_prompt=prompted)
        pieces = plain.render(talk, add_generation_prompt=prompted)
        assert "".join(p.text for p in pieces) == "".join(p.text for p in expected)
        assert [p.text for p in pieces if p.is_generated] == [
            f"{p.text}\n" for p in expected if p.is_generated
        ]


def test_a_turn_that_is_written_otherwise_once_others_follow_is_refused() -> None:
    """As templates do that leave out the thoughts of earlier answers."""
    source = (
        "{% for m in messages %}[{{ m.role }}]"
        "{% if m.role == 'assistant' and loop.last %}hm... {% endif %}{{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    template = ChatTemplate(source)
    assert template.render(TALK[1:3])[1] == Piece("hm... Hello.\n", True)
    with pytest.raises(InputError, match=r"writes turn 3 otherwise .*: put {% generation %} and"):
        template.render(TALK)


def test_spans_are_those_of_transformers(tmp_path: Path) -> None:
    """Of the same template with marks, letter for letter."""
    processing = pytest.importorskip("transformers.utils.chat_template_utils")
    turns = [{"role": m.role, "content": m.content} for m in TALK]
    (text,), (spans,) = processing.render_jinja_template(
        [turns], chat_template=CHATML, return_assistant_tokens_mask=True
    )
    pieces = ChatTemplate(CHATML).render(TALK)
    assert "".join(piece.text for piece in pieces) == text
    assert [text[a:b] for a, b in spans] == [p.text for p in pieces if p.is_generated]


@pytest.mark.parametrize(
    "source",
    [
        "{% if true %}" * 200 + "x" + "{% endif %}" * 200,  # Python's indentation ends at 100
        "{% for m in messages %}" * 21 + "x" + "{% endfor %}" * 21,  # its loops at 20
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",  # Jinja's parser calls itself
    ],
)
def test_a_template_that_is_nested_too_deeply_is_named(source: str) -> None:
    with pytest.raises(InputError) as error:
        ChatTemplate(source)
    assert "the chat template cannot be compiled (" in str(error.value)
    assert "nest its blocks and expressions less deeply" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ strftime_now('%d %b %Y') }} ",
        "{% macro today() %}{{ strftime_now('%Y') }}{% endmacro %}{{ today() }}",
        "{% if tools is not none %}{{ tools | length }}{% endif %}",
        "{% if documents %}none{% endif %}",
        "{{ messages[0].content | tojson(ensure_ascii=true) }}",
        "{{ {'b': 1, 'a': 2} | tojson(indent=2) }}",
        "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}",
    ],
)
def test_what_transformers_gives_templates_is_there(source: str) -> None:
    processing = pytest.importorskip("transformers.utils.chat_template_utils")
    turns = [{"role": m.role, "content": m.content} for m in TALK]
    (text,), _ = processing.render_jinja_template([turns], chat_template=source + CHATML)
    pieces = ChatTemplate(source + CHATML).render(TALK)
    assert "".join(piece.text for piece in pieces) == text


def test_json_in_a_template_is_json() -> None:
    source = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}"
    pieces = ChatTemplate(source).render([Message("user", "<é>"), Message("assistant", '"')])
    assert pieces == [Piece('"<é>"', False), Piece(r'"\""', True)]


def test_a_file_that_is_no_template_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xe9\xff")
    for name in ("missing", "latin"):
        with pytest.raises(InputError, match=f"{name} cannot be read as a chat template"):
            read_template(tmp_path / name)
