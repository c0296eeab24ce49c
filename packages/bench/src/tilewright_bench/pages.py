"""Generated parts of Markdown pages, each between two comments that say what belongs there.

    <!-- bench-docs table: rms_norm add_rms_norm -->
    …
    <!-- /bench-docs -->

Comments within a fenced block are text, so that a page can show them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_OPENING = re.compile(r"<!-- bench-docs (?P<kind>[\w-]+)(?:: (?P<items>[^>]*?))? -->")
_CLOSING = "<!-- /bench-docs -->"
_FENCE = re.compile(r"\s*(```|~~~)")


class PageError(Exception):
    """A marker that cannot be filled; the message is one line and names page and line."""


@dataclass(frozen=True)
class Marker:
    """What is asked for at one place.

    Attributes:
        page: the file.
        line: of the opening comment, from 1.
        kind: "table", "plot", …
        items: the words after the colon.
    """

    page: Path
    line: int
    kind: str
    items: tuple[str, ...]

    def error(self, message: str) -> PageError:
        """An error that names the place."""
        return PageError(f"{self.page}:{self.line}: {message}")


def filled(page: Path, text: str, content: Callable[[Marker], str]) -> str:
    """The text with the content of every marker made anew.

    Raises:
        PageError: a marker without its end, or an end without a marker; or from `content`.
    """
    lines: list[str] = []
    marker: Marker | None = None
    fenced = False
    for number, line in enumerate(text.splitlines(), start=1):
        if marker is None and _FENCE.match(line):
            fenced = not fenced
        opening = None if fenced else _OPENING.fullmatch(line.strip())
        if opening:
            if marker is not None:
                raise marker.error(f"no {_CLOSING} before the next marker in line {number}")
            items = tuple((opening["items"] or "").split())
            marker = Marker(page, number, opening["kind"], items)
            lines.append(line)
        elif not fenced and line.strip() == _CLOSING:
            if marker is None:
                raise PageError(f"{page}:{number}: {_CLOSING} closes nothing")
            # Blank lines: a table right after a comment is text to some readers of Markdown.
            lines += ["", content(marker), "", line]
            marker = None
        elif marker is None:
            lines.append(line)
    if marker is not None:
        raise marker.error(f"no {_CLOSING} after it")
    return "\n".join(lines) + "\n"
