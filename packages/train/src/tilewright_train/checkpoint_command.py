"""The command `train-checkpoint`: verify, diff, reshard, export.

0: done, whole, the same. 1: `diff` has found differences. 2: something that the user can mend, said
in one line on stderr; a damaged checkpoint is one.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tilewright_train.errors import InputError, one_line

_DESCRIPTION = """Look after checkpoints. Where a command takes one it takes the folder of a run as
well, for its newest."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SHOWN = 20  # differences


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}: see {self.prog} --help")


def checkpoint() -> None:
    """Entry point."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run one of the four commands and give its exit status."""
    try:
        return _run(_parser().parse_args(arguments))
    except BrokenPipeError:
        return 141
    except (InputError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("train-checkpoint", description=_DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    size = {"default": "5GB", "metavar": "SIZE", "help": "of a file, as in 2GB; default 5GB"}

    verify = commands.add_parser("verify", help="check every file against its size and SHA-256")
    verify.add_argument(
        "place", nargs="+", type=Path, help="checkpoints, or runs for all of theirs"
    )

    diff = commands.add_parser("diff", help="say in which tensors and options two differ")
    diff.add_argument("one", type=Path)
    diff.add_argument("other", type=Path)

    reshard = commands.add_parser("reshard", help="spread the tensors over files of another size")
    reshard.add_argument("place", type=Path, help="a checkpoint")
    reshard.add_argument("out", type=Path, help="the folder of checkpoints to write it in")
    reshard.add_argument("--max-shard-size", **size)

    export = commands.add_parser("export", help="write the model alone in Hugging Face's layout")
    export.add_argument("place", type=Path, help="a checkpoint")
    export.add_argument("out", type=Path, help="the folder to write")
    kinds = ("float32", "bfloat16", "float16")
    export.add_argument("--dtype", choices=kinds, help="of the weights; default: as they are")
    export.add_argument("--max-shard-size", **size)
    return parser


def _run(options: argparse.Namespace) -> int:
    # torch takes seconds to import: --help and a mistyped flag do not wait for it.
    import torch

    from tilewright_train import checkpoint_tools as tools

    if options.command == "verify":
        return _verify(options.place)
    if options.command == "diff":
        return _diff(options.one, options.other)
    limit = _bytes(options.max_shard_size)
    folder = tools.whole_checkpoint(options.place)
    if options.command == "reshard":
        made = tools.reshard(folder, options.out, limit)
        print(f"{made}: {len(list(made.glob('*.safetensors')))} files of tensors")
    else:
        dtype = getattr(torch, options.dtype) if options.dtype else None
        tools.export(folder, options.out, dtype, limit)
        print(f"{options.out}: {folder.name} as {options.dtype or 'it is'}")
    return 0


def _verify(places: Sequence[Path]) -> int:
    from tilewright_train.checkpoint import damage
    from tilewright_train.checkpoint_tools import checkpoints_at

    problems = []
    for folder in (folder for place in places for folder in checkpoints_at(place)):
        problem = damage(folder)
        if problem is None:
            files = [file for file in folder.iterdir() if file.is_file()]
            size = sum(file.stat().st_size for file in files)
            print(f"whole      {folder}  {len(files)} files, {size / 1e6:,.1f} MB")
        else:
            print(f"damaged    {folder}")
            problems.append(problem)
    for problem in problems:
        remedy = "restore it, or go on from an older one with --resume-from-older"
        print(f"error: {problem}; {remedy}", file=sys.stderr)
    return 2 if problems else 0


def _diff(one: Path, other: Path) -> int:
    from tilewright_train.checkpoint_tools import differences, whole_checkpoint

    folders = [whole_checkpoint(place) for place in (one, other)]
    found = differences(*folders)
    for kind in dict.fromkeys(difference.kind for difference in found):
        mine = [difference for difference in found if difference.kind == kind]
        for difference in mine[:_SHOWN]:
            print(f"{kind:<10} {difference.name}  {difference.what}")
        if len(mine) > _SHOWN:
            print(f"{kind:<10} and {len(mine) - _SHOWN} more")
    if not found:
        print(f"the same   {folders[0]} and {folders[1]}")
    return 1 if found else 0


def _bytes(text: str) -> int:
    """«2GB» as a number.

    Raises:
        InputError: It is none, or 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B?)", text.strip(), re.IGNORECASE)
    unit = match.group(2).upper() if match else ""
    size = int(float(match.group(1)) * _UNITS.get(unit, _UNITS.get(f"{unit}B", 1))) if match else 0
    if size < 1:
        raise InputError(f"--max-shard-size {text!r} is no size: write it as in 2GB or 500MB")
    return size
