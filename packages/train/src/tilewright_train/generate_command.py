"""The command `train-generate`: continue a prompt, or chat, token by token as they come.

The text goes to the standard output; how long the first token took and how many followed a second
go to the standard error.
"""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilewright_train.errors import InputError
from tilewright_train.flags import parse_flags
from tilewright_train.records import Message, string
from tilewright_train.trained import ModelChoice, Trained, as_input_errors, exit_status, opened

if TYPE_CHECKING:
    from tilewright_model import Engine, SamplingParams

_DESCRIPTION = """Let a model write. With no argument: the latest run in --out; one that has learned
to chat answers the lines of the standard input, another one begins a text."""

_STANDARD_INPUT = "-"
_CHAT_POSITIONS = 4096  # of a conversation from the standard input, where the model has as many


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelChoice):
    """What is written, and how it is drawn."""

    prompt: str | None = None
    """The beginning of a text to go on with."""
    chat: str | None = None
    """A message to answer; «-», as does the bare flag, for lines of the standard input, each a turn
    of one conversation."""
    system: str | None = None
    """With --chat: the system's message before it."""
    max_new_tokens: int = 256
    """Tokens to add at most, as far as the model's positions reach."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 50
    """Draw among so many likeliest tokens; 0 for all."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together have this probability."""
    min_p: float | None = None
    """Draw among tokens of at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens less likely that were there before."""
    stop: tuple[str, ...] = ()
    """Texts that end what is written."""
    seed: int | None = None
    """The same seed draws the same text."""


def generate() -> None:
    """Entry point."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str], lines: Iterable[str] | None = None) -> int:
    """Write; the exit status.

    Args:
        arguments: Words of the command line.
        lines: Messages of a conversation; by default the standard input.
    """

    def action() -> None:
        options = parse_flags(
            GenerateOptions(),
            _with_bare_chat(arguments),
            prog="train-generate",
            description=_DESCRIPTION,
            names=[field.name for field in dataclasses.fields(GenerateOptions)],
        )
        _write(options, sys.stdin if lines is None else lines)

    return exit_status(action)


def _write(options: GenerateOptions, lines: Iterable[str]) -> None:
    if options.prompt is not None and options.chat is not None:
        raise InputError("--prompt and --chat exclude each other: give one of them")
    _sampling(options, 1, ())  # complains before the model is loaded
    with opened(options, cast=True) as trained:
        chat = options.chat
        if chat is None and options.prompt is None and _chats(trained):
            chat = _STANDARD_INPUT
        if chat is None:
            if options.system is not None:
                raise InputError("--system is for a conversation: give --chat as well")
            _continue(options, trained)
        else:
            several = chat == _STANDARD_INPUT
            _converse(options, trained, lines if several else [chat], several=several)


def _chats(trained: Trained) -> bool:
    """Whether it has learned to: a run of pretraining only hands a template on."""
    is_pretrained = trained.config is not None and trained.config.run.objective == "pretrain"
    return trained.template is not None and not is_pretrained


def _continue(options: GenerateOptions, trained: Trained) -> None:
    from tilewright_train.streaming import prompt_tokens, stream_reply

    prompt = None if options.prompt is None else string(options.prompt, "prompt")
    if prompt is None:
        prompt = (trained.config.run.prompt if trained.config else None) or ""
    tokens = prompt_tokens(trained.tokenizer, prompt)
    engine = _engine(trained, _needed(trained, len(tokens), options.max_new_tokens))
    params = _sampling(options, engine.cache.max_length - len(tokens), _ends(trained))
    _warm_up(engine, tokens, params)
    _say(prompt)
    reply = stream_reply(engine, trained.tokenizer, tokens, params, _say)
    _say("\n")
    print(reply.describe(), file=sys.stderr)


def _converse(
    options: GenerateOptions, trained: Trained, lines: Iterable[str], *, several: bool
) -> None:
    from tilewright_train.conversations import tokenize
    from tilewright_train.streaming import stream_reply

    if trained.template is None:
        raise InputError(
            f"{trained.start.folder} has no chat template: give --prompt, or a model that train-sft"
            " has made"
        )
    is_typed = lines is sys.stdin and sys.stdin.isatty()
    messages = []
    if options.system is not None:
        messages.append(Message("system", string(options.system, "message")))
    engine: Engine | None = None
    for line in _prompted(lines) if is_typed else lines:
        if not line.strip():
            continue
        messages.append(Message("user", string(line.rstrip("\n"), "message")))
        ((tokens, _),) = tokenize(
            trained.tokenizer, trained.template, [messages], add_generation_prompt=True
        )
        needed = _needed(trained, len(tokens), options.max_new_tokens)
        if engine is None or needed > engine.cache.max_length:
            positions = trained.model.config.max_position_embeddings
            room = min(positions, _CHAT_POSITIONS) if several else needed
            engine = _engine(trained, max(needed, room))
        params = _sampling(options, engine.cache.max_length - len(tokens), _ends(trained))
        _warm_up(engine, tokens, params)
        reply = stream_reply(engine, trained.tokenizer, tokens, params, _say)
        _say("\n")
        print(reply.describe(), file=sys.stderr)
        messages.append(Message("assistant", reply.text))


def _needed(trained: Trained, prompt: int, new: int) -> int:
    """Positions for a prompt and new tokens, as far as they reach.

    Raises:
        InputError: The prompt leaves none.
    """
    positions = trained.model.config.max_position_embeddings
    if prompt >= positions:
        raise InputError(
            f"the prompt has {prompt} tokens and the model {positions} positions: give a shorter"
            " one, or begin a new conversation"
        )
    return min(prompt + new, positions)


def _engine(trained: Trained, positions: int) -> "Engine":
    from tilewright_model import Engine

    return Engine(trained.model, max_batch_size=1, max_length=positions)


def _sampling(options: GenerateOptions, room: int, ends: tuple[int, ...]) -> "SamplingParams":
    """How to draw, with as many tokens as there is room for."""
    if options.max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {options.max_new_tokens}: give 1 or more")
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "stop", "seed")
    chosen = {name: getattr(options, name) for name in names} | {"top_k": options.top_k or None}
    with as_input_errors():  # tilewright_kernels reads TILEWRIGHT_BACKEND when it is imported
        from tilewright_model import SamplingParams

        return SamplingParams(
            max_new_tokens=min(options.max_new_tokens, room), stop_token_ids=ends, **chosen
        )


def _ends(trained: Trained) -> tuple[int, ...]:
    """Tokens behind which nothing is written: of a document, of a turn, and what the model says."""
    from tilewright_model.checkpoint import read_token_ids
    from tilewright_train.conversations import end_of_turn
    from tilewright_train.tokenizer import end_token

    named = read_token_ids(trained.start.folder).get("eos_token_id")
    ends = set(named if isinstance(named, list) else [] if named is None else [named])
    ends.add(end_token(trained.tokenizer))
    if trained.template is not None:
        ends.add(end_of_turn(trained.tokenizer, trained.template))
    return tuple(sorted(ends))


def _warm_up(engine: "Engine", tokens: list[int], params: "SamplingParams") -> None:
    """On a GPU, compile the kernels and capture the graph before anything is timed."""
    if engine.cache.keys.device.type == "cuda":
        few = dataclasses.replace(params, max_new_tokens=min(3, params.max_new_tokens), stop=())
        engine.generate([tokens], few)


def _prompted(lines: Iterable[str]) -> Iterable[str]:
    """Lines that somebody types."""
    while True:
        print("> ", end="", flush=True, file=sys.stderr)
        line = next(iter(lines), None)
        if line is None:
            return
        yield line


def _say(text: str) -> None:
    print(text, end="", flush=True)


def _with_bare_chat(arguments: Sequence[str]) -> list[str]:
    """`--chat` without a value means `--chat -`; tyro takes a lone dash only behind «=»."""
    words: list[str] = []
    for word, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        if word == "--chat" and (following.startswith("--") or following == _STANDARD_INPUT):
            words.append(f"--chat={_STANDARD_INPUT}")
        elif not (word == _STANDARD_INPUT and words[-1:] == [f"--chat={_STANDARD_INPUT}"]):
            words.append(word)
    return words
