"""Two saved runs side by side, in the tables of `pytest-benchmark compare`."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tilewright_bench.saved import SavedRun, SavedRunError

OPTIONS = ("--between=median,min", "--group-by=group", "--name=normal")
"""A table for each operator, case and direction; both runs and their difference in one row."""


def compare(baseline: SavedRun, run: SavedRun, options: Sequence[str] = ()) -> int:
    """Print the comparison; return the exit status of pytest-benchmark.

    Args:
        baseline: what differences refer to.
        run: what is judged.
        options: more options of `pytest-benchmark compare`, such as -k or --csv.

    Raises:
        SavedRunError: the two are the same file or have no benchmark in common.
    """
    if baseline.path.resolve() == run.path.resolve():
        raise SavedRunError(f"{run.path} would be compared with itself; name an older run")
    common = baseline.names & run.names
    if not common:
        raise SavedRunError(
            f"{baseline.path} ({baseline.device}) and {run.path} ({run.device}) have no benchmark "
            f"in common"
        )
    print(f"baseline: {baseline.path}  ({baseline.device})")
    print(f"run:      {run.path}  ({run.device})")
    if baseline.device != run.device:
        print("The devices differ, and so do their times, whatever the code.")
    alone = len(baseline.names ^ run.names)
    print(f"{len(common)} benchmarks in both, {alone} in one only", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        # pytest-benchmark sorts files by name, takes the first as the reference and labels columns
        # with the names; a storage of two files gets both right.
        shutil.copyfile(baseline.path, Path(folder, "baseline.json"))
        shutil.copyfile(run.path, Path(folder, "run.json"))
        command = [sys.executable, "-m", "pytest_benchmark", f"--storage=file://{folder}"]
        return subprocess.run(
            [*command, "compare", "*", *OPTIONS, *options], check=False
        ).returncode
