"""Whether a text that comes token by token has reached one of some strings."""

from collections.abc import Callable


class StopStrings:
    """Looks at the end of a text alone: as many tokens as its last characters take.

    Tokens are no measure of text: one may be several characters, a byte of one, or nothing. So the
    tail is cut where what is left of it decodes to enough.

    Args:
        decode: text of token ids.
        strings: what is looked for, none of them empty.
    """

    def __init__(self, decode: Callable[[list[int]], str], strings: tuple[str, ...]) -> None:
        self.decode, self.strings = decode, strings
        # A cut through a character's bytes leaves up to three characters that stand for them.
        self._enough = max(map(len, strings), default=0) + 4
        self._cut_at = 8 * self._enough
        self._tail: list[int] = []

    def found_with(self, token: int) -> bool:
        """Whether one of them is there now that `token` follows."""
        if not self.strings:
            return False
        self._tail.append(token)
        text = self.decode(self._tail)
        if any(string in text for string in self.strings):
            return True
        if len(self._tail) >= self._cut_at:
            half = self._tail[len(self._tail) // 2 :]
            if len(self.decode(half)) >= self._enough:
                self._tail = half
            self._cut_at = max(8 * self._enough, 2 * len(self._tail))
        return False
