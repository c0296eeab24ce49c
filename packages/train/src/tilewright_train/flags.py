"""Flags of a command into a dataclass: tyro, with every refusal as one `InputError`.

The names of nested dataclasses are no part of a flag; a flag that nobody knows gets the closest one
that exists.
"""

import contextlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import tyro

from tilewright_train.errors import InputError, suggest

T = TypeVar("T")


def parse_flags(
    default: T, arguments: Sequence[str], *, prog: str, description: str, names: Iterable[str]
) -> T:
    """The options that `arguments` ask for.

    Args:
        default: A dataclass with what holds where a flag is not given.
        arguments: Words of the command line.
        prog: Name of the command.
        description: Above the flags in `--help`.
        names: Fields that have a flag, to suggest one of them for an unknown one.

    Raises:
        InputError: An unknown flag, or a value that its field refuses.
        SystemExit: Status 0 after `--help`.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed, unknown = tyro.cli(
                type(default),
                prog=prog,
                description=description,
                args=list(arguments),
                default=default,
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes,),
                registry=_registry(),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise _refusal(stop, errors.getvalue()) from None
    if unknown:
        name = unknown[0].split("=")[0]
        known = [flag(known) for known in (*names, "help")]
        kind = "unknown flag" if name.startswith("-") else "unexpected argument"
        raise InputError(f"{kind} {name!r}{suggest(name.replace('_', '-'), known)}: see --help")
    return parsed


def flag(name: str) -> str:
    """How the field `name` is written as a flag."""
    return "--" + name.replace("_", "-")


def _refusal(stop: SystemExit, printed: str) -> InputError:
    """What tyro stopped for: our own error if there is one in the chain, else its box of text."""
    error: BaseException | None = stop
    while error is not None:
        if isinstance(error, InputError):
            return error
        error = error.__context__
    lines = [line.strip("│ ") for line in printed.splitlines()[1:]]
    body = lines[: next((i for i, line in enumerate(lines) if line.startswith("─")), len(lines))]
    return InputError(re.sub(r"^Error parsing ", "", " ".join(body)) + " (see --help)")


def _registry() -> tyro.constructors.ConstructorRegistry:
    """How values that may be None look: «INT» with the default «auto», «PATH» with «none»."""
    registry = tyro.constructors.ConstructorRegistry()
    kinds = {int: "a whole number", float: "a number", str: "text", Path: "a path"}

    @registry.primitive_rule
    def _optional(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec | None:
        inner = get_args(info.type)
        if len(inner) != 2 or inner[1] is not type(None) or inner[0] not in kinds:
            return None

        unset = "none" if inner[0] is Path else "auto"

        def convert(words: list[str]) -> Any:
            try:
                return inner[0](words[0])
            except ValueError:
                raise ValueError(f"{words[0]!r} is not {kinds[inner[0]]}") from None

        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=inner[0].__name__.upper(),
            instance_from_str=convert,
            is_instance=lambda value: value is None or isinstance(value, inner[0]),
            str_from_instance=lambda value: [str(value) if value is not None else unset],
        )

    return registry
