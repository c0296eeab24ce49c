"""Text from an engine as it comes: tokens in, characters out, and how fast that was."""

import dataclasses
import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import cast

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from tilewright_model import Engine, SamplingParams, Token
from tilewright_train.tokenizer import decode, end_token


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What was written, and how fast."""

    text: str
    tokens: int
    first_seconds: float
    """From the call to the first token, the prompt read."""
    seconds: float
    """From the call to the last token."""

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens behind the first; NaN where there is none."""
        rest = self.seconds - self.first_seconds
        return (self.tokens - 1) / rest if self.tokens > 1 and rest > 0 else math.nan

    def describe(self) -> str:
        """One line for people."""
        speed = f", then {self.tokens_per_second:,.1f} tokens/s" if self.tokens > 1 else ""
        return f"{self.tokens} tokens, the first after {1000 * self.first_seconds:,.1f} ms{speed}"


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt as the beginning of a document.

    Behind what the tokenizer itself puts before a text, as Llama's does, else behind the token that
    ends the document before it.
    """
    tokens = tokenizer.encode(prompt).ids
    plain = tokenizer.encode(prompt, add_special_tokens=False).ids
    return [end_token(tokenizer), *plain] if tokens == plain else tokens


def stream_reply(
    engine: Engine,
    tokenizer: Tokenizer,
    tokens: list[int],
    params: SamplingParams,
    write: Callable[[str], None],
) -> Reply:
    """Write what follows `tokens` as it comes.

    Args:
        engine: Of the model.
        tokenizer: Of the model.
        tokens: The prompt.
        params: How to draw; `stop` is looked for here.
        write: Takes the text, piece by piece; a character comes when all its tokens are there, and
            what may be the beginning of a text that stops waits for the rest of it.
    """
    stops, decoder = params.stop, DecodeStream(skip_special_tokens=False)
    request = dataclasses.replace(params, stop=())
    text, written, first = "", 0, math.nan
    ids: list[int] = []
    is_cut = False
    begin = time.perf_counter()
    # Left to the garbage, an open stream would keep the engine's cache.
    stream = cast("Generator[Token]", engine.stream([tokens], request))
    for token in stream:
        ids.append(token.token_id)
        if len(ids) == 1:
            first = time.perf_counter() - begin
        if token.token_id in params.stop_token_ids:
            break
        text += decoder.step(tokenizer, token.token_id) or ""
        found = [at for at in map(text.find, stops) if at >= 0]
        if is_cut := bool(found):
            text = text[: min(found)]
            break
        ready = max(written, len(text) - _held(text, stops))
        write(text[written:ready])
        written = ready
    seconds = time.perf_counter() - begin
    stream.close()
    shown = [number for number in ids if number not in params.stop_token_ids]
    whole = decode(tokenizer, shown)
    if not is_cut and whole.startswith(text):
        text = whole  # with the bytes at the end of which no character has come
    write(text[written:])
    return Reply(text=text, tokens=len(ids), first_seconds=first, seconds=seconds)


def _held(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of `text` that may be the beginning of a text that stops."""
    lengths = (n for stop in stops for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n]))
    return max(lengths, default=0)
