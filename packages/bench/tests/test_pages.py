from pathlib import Path

import pytest

from tilewright_bench.pages import PageError, filled

PAGE = Path("docs/page.md")


def words(marker):
    return f"{marker.kind} at {marker.line}: {' '.join(marker.items)}".strip()


def test_what_stands_between_the_comments_is_replaced():
    text = """\
before
<!-- bench-docs table: a b -->
old
lines
<!-- /bench-docs -->
between
<!-- bench-docs roofline -->
<!-- /bench-docs -->
after
"""
    new = """\
before
<!-- bench-docs table: a b -->

table at 2: a b

<!-- /bench-docs -->
between
<!-- bench-docs roofline -->

roofline at 7:

<!-- /bench-docs -->
after
"""
    assert filled(PAGE, text, words) == new
    assert filled(PAGE, "no marker\n", words) == "no marker\n"


def test_filling_twice_changes_nothing():
    text = "<!-- bench-docs summary: a/8x8/fwd -->\n<!-- /bench-docs -->\n"

    def content(marker):
        return words(marker).replace(str(marker.line), "")

    once = filled(PAGE, text, content)
    assert filled(PAGE, once, content) == once


@pytest.mark.parametrize("fence", ["```", "  ```md", "~~~"])
def test_a_page_can_show_a_marker(fence):
    text = f"{fence}\n<!-- bench-docs table: a -->\n{fence[:5]}\nend\n"
    assert filled(PAGE, text, words) == text
    inline = "Put `<!-- bench-docs table: a -->` there.\n"
    assert filled(PAGE, inline, words) == inline


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench-docs table: a -->\n", "page.md:1: no <!-- /bench-docs --> after it"),
        ("\n<!-- /bench-docs -->\n", "page.md:2: <!-- /bench-docs --> closes nothing"),
        (
            "<!-- bench-docs table: a -->\n<!-- bench-docs table: b -->\n<!-- /bench-docs -->\n",
            "page.md:1: no <!-- /bench-docs --> before the next marker in line 2",
        ),
    ],
)
def test_comments_without_their_other_half(text, message):
    with pytest.raises(PageError, match=message):
        filled(PAGE, text, words)
