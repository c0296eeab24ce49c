"""The command line: `bench-compare` and its siblings, or `python -m tilewright_bench COMMAND`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from pytest_benchmark.utils import get_commit_info

from tilewright_bench import collectives_command, docs, plots, roofline
from tilewright_bench.compare import compare
from tilewright_bench.environment import describe
from tilewright_bench.pages import PageError
from tilewright_bench.parallel import command as parallel_command
from tilewright_bench.report import table
from tilewright_bench.rows import rows_of
from tilewright_bench.saved import (
    BASELINES,
    STORAGE,
    SavedRun,
    SavedRunError,
    baselines_of,
    check_provenance,
    check_workspace,
    find,
    newest,
    save_baseline,
)

DEVICE = "h200"
"""Whose baselines the pages show."""

NO_MATPLOTLIB = "drawing needs matplotlib, which is not installed here"


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> int:
    """Run one command.

    Args:
        arguments: of the command line.
        command: the command's name, where the program has only one.

    Returns:
        The exit status: 1 if a check failed, 2 for a wrong argument.
    """
    parser = _parser() if command is None else _parser_of(command)
    options = parser.parse_args(arguments)
    try:
        return options.run_command(options)
    except (SavedRunError, PageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def compare_main() -> int:
    """bench-compare."""
    return main(command="compare")


def save_main() -> int:
    """bench-save."""
    return main(command="save")


def show_main() -> int:
    """bench-show."""
    return main(command="show")


def roofline_main() -> int:
    """bench-roofline."""
    return main(command="roofline")


def collectives_main() -> int:
    """bench-collectives."""
    return main(command="collectives")


def parallel_main() -> int:
    """bench-parallel."""
    return main(command="parallel")


def docs_main() -> int:
    """bench-docs."""
    return main(command="docs")


def _compare(options: argparse.Namespace) -> int:
    baseline = find(options.baseline, options.storage, options.baselines)
    return compare(baseline, _chosen(options), fail=options.fail, words=options.k)


def _save(options: argparse.Namespace) -> int:
    target = save_baseline(
        options.name,
        _chosen(options),
        options.baselines,
        operators=options.operators,
        commit=options.commit,
        allow_dirty=options.allow_dirty,
    )
    print(f"saved {target}")
    return 0


def _show(options: argparse.Namespace) -> int:
    run = _chosen(options)
    print(f"{run.path}  ({run.device})")
    print(table(rows_of(run.content["benchmarks"])))
    return 0


def _roofline(options: argparse.Namespace) -> int:
    path = options.baselines / "roofline" / f"{options.device}.json"
    if not options.redraw:
        if not torch.cuda.is_available():
            raise SavedRunError(
                "no CUDA device, and ceilings are those of a GPU; --redraw draws the saved ones"
            )
        gpu = torch.cuda.get_device_name()
        if options.device.lower() not in gpu.lower():
            raise SavedRunError(f"this GPU is a {gpu}, no {options.device!r}; name it by --device")
        check_workspace(options.baselines)
        place = {"machine_info": describe(), "commit_info": get_commit_info()}
        # Before a minute is spent.
        check_provenance(path, place, commit=options.commit, allow_dirty=options.allow_dirty)
        roofline.save(roofline.measure(torch.device("cuda")) | place, path)
        print(f"saved {path}")
    runs = baselines_of(options.device, options.baselines)
    try:
        plots.draw(roofline.roofline(roofline.load(path), runs), options.svg)
    except ModuleNotFoundError as error:
        if not _is_matplotlib(error):
            raise
        print(f"{NO_MATPLOTLIB}; bench-roofline --redraw draws what was saved")
    else:
        print(f"drew {options.svg}")
    return 0


def _docs(options: argparse.Namespace) -> int:
    if options.check:
        found = docs.stale(options.root, options.device)
        print("\n".join([*found, "stale; make them anew with: bench-docs"] if found else ["fresh"]))
        return int(bool(found))
    try:
        changed = docs.update(options.root, options.device)
    except ModuleNotFoundError as error:
        if not _is_matplotlib(error):
            raise
        print(f"error: {NO_MATPLOTLIB}", file=sys.stderr)
        return 2
    for path in changed:
        print(f"wrote {path}")
    print(f"{len(changed)} files changed")
    return 0


def _is_matplotlib(error: ModuleNotFoundError) -> bool:
    return (error.name or "").partition(".")[0] == "matplotlib"


def _chosen(options: argparse.Namespace) -> SavedRun:
    if options.run is None:
        return newest(options.storage)
    return find(options.run, options.storage, options.baselines)


COMMANDS = {
    "compare": (_compare, "set a run beside a baseline: ratios, the worst change first"),
    "save": (_save, "keep a run as a named baseline"),
    "show": (_show, "print bandwidth, memory and accuracy of a run"),
    "roofline": (_roofline, "measure the ceilings of this device and draw operators under them"),
    "collectives": (
        collectives_command.run,
        "measure collectives by size under torchrun: time, algorithm and bus bandwidth",
    ),
    "parallel": (
        parallel_command.run,
        "measure training steps under torchrun, ours beside torch's: time, exposure, memory",
    ),
    "docs": (_docs, "make the tables and plots of README and docs anew from the baselines"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tilewright_bench", description="Saved benchmark runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, about) in COMMANDS.items():
        _add_arguments(commands.add_parser(name, help=about, description=about), name)
    return parser


def _parser_of(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"bench-{command}", description=COMMANDS[command][1])
    _add_arguments(parser, command)
    return parser


def _add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    run, _ = COMMANDS[command]
    parser.set_defaults(run_command=run)
    if command == "collectives":
        collectives_command.add_arguments(parser)
        return
    if command == "parallel":
        parallel_command.add_arguments(parser)
        return
    which = "name of a baseline, path of a file, or number of a saved run"
    parser.add_argument("--baselines", type=Path, default=BASELINES, help="[%(default)s]")
    if command in ("compare", "save", "show"):
        parser.add_argument("--storage", type=Path, default=STORAGE, help="[%(default)s]")
    if command == "compare":
        parser.add_argument("baseline", help=which)
    if command == "save":
        parser.add_argument("name", help="of the baseline; its device first, as in h200-norms")
    if command in ("compare", "save", "show"):
        parser.add_argument("run", nargs="?", help=f"{which}; the newest saved run if left out")
    if command == "compare":
        parser.add_argument(
            "--fail",
            type=_share,
            metavar="SHARE",
            help="exit with 1 if one is slower by more, beyond its spread: 5%% or 0.05",
        )
        parser.add_argument("-k", default="", metavar="WORDS", help="only names with these words")
    if command == "save":
        parser.add_argument(
            "--operators", nargs="+", default=(), metavar="NAME", help="keep only these"
        )
    if command in ("save", "roofline"):
        parser.add_argument("--commit", help="what was measured, for a run outside a git checkout")
        parser.add_argument("--allow-dirty", action="store_true", help="accept uncommitted changes")
    if command in ("roofline", "docs"):
        parser.add_argument("--device", default=DEVICE, help="[%(default)s]")
    if command == "roofline":
        parser.add_argument("--redraw", action="store_true", help="measure nothing")
        parser.add_argument("--svg", type=Path, default=docs.IMAGES / "roofline.svg")
    if command == "docs":
        parser.add_argument("--root", type=Path, default=Path(), help="the workspace [.]")
        parser.add_argument("--check", action="store_true", help="write nothing, say what is stale")


def _share(text: str) -> float:
    """5% or 0.05."""
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= value < 100:
        raise ValueError
    return value


_share.__name__ = "share"  # as argparse calls it in its messages
