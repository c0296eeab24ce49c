"""The command `train-report`: the folders of runs in, one HTML page out."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tilewright_train.errors import InputError, one_line, writing

_DESCRIPTION = """Write one HTML page about a run, or about several side by side: what they are,
what they came to, curves, updates that were left out, samples. The page needs nothing else."""


def report() -> None:
    """Entry point."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Write the page and give the exit status."""
    parser = argparse.ArgumentParser("train-report", description=_DESCRIPTION)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--out", type=Path, help="the page; by default RUN/report/report.html of the first run"
    )
    given = parser.parse_args(arguments)
    page = given.out or given.runs[0] / "report" / "report.html"
    try:
        for run in given.runs:
            if not run.is_dir():
                raise InputError(f"{run} does not exist: give the folder that a run printed")
        # Imported here: matplotlib takes a second, --help does not wait for it.
        from tilewright_train.report_page import write_page

        with writing(page.parent, "give another --out"):
            write_page(given.runs, page)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    print(page)
    return 0
