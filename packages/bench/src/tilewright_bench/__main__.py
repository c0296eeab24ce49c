"""`python -m tilewright_bench`: compare saved runs, keep one as a baseline, show one as a table."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tilewright_bench.compare import compare
from tilewright_bench.report import rows_of, table
from tilewright_bench.saved import (
    BASELINES,
    STORAGE,
    SavedRunError,
    find,
    newest,
    save_baseline,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 2 for a wrong argument."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "compare":
        parser.error(f"unknown arguments: {' '.join(rest)}")
    places = (options.storage, options.baselines)
    try:
        if options.command == "save":
            target = save_baseline(
                options.name, *places, commit=options.commit, allow_dirty=options.allow_dirty
            )
            print(f"saved {target}")
            return 0
        if options.command == "show":
            run = find(options.run, *places) if options.run else newest(options.storage)
            print(f"{run.path}  ({run.device})")
            print(table(rows_of(run.content["benchmarks"])))
            return 0
        baseline = find(options.baseline, *places)
        run = find(options.run, *places) if options.run else newest(options.storage)
        return compare(baseline, run, rest)
    except SavedRunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    places = argparse.ArgumentParser(add_help=False)
    places.add_argument("--storage", type=Path, default=STORAGE, help="saved runs [%(default)s]")
    places.add_argument("--baselines", type=Path, default=BASELINES, help="[%(default)s]")
    which = "name of a baseline, path of a file, or number of a saved run"

    parser = argparse.ArgumentParser(prog="tilewright_bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    comparing = commands.add_parser(
        "compare",
        parents=[places],
        help="set a run beside a baseline",
        epilog="Other options go to `pytest-benchmark compare`, such as -k EXPR or --csv FILE.",
    )
    comparing.add_argument("baseline", help=which)
    comparing.add_argument("run", nargs="?", help=f"{which}; the newest saved run if left out")
    saving = commands.add_parser(
        "save", parents=[places], help="keep the newest run as a named baseline"
    )
    saving.add_argument("name")
    saving.add_argument("--commit", help="what was measured, for a run outside a git checkout")
    saving.add_argument("--allow-dirty", action="store_true", help="accept uncommitted changes")
    showing = commands.add_parser(
        "show", parents=[places], help="print bandwidth, memory and accuracy of a run"
    )
    showing.add_argument("run", nargs="?", help=f"{which}; the newest saved run if left out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
