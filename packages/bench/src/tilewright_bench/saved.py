"""Saved runs: where they lie, which is the newest, and when one is fit to be a baseline.

`nox -s bench` lets pytest-benchmark save each run as <storage>/<platform>/<number>_<commit>….json.
A baseline is such a file under a name of its own in the repository, with all that a reader needs to
judge its figures: device, driver, versions, commit. `pytest-benchmark compare` reads both.
"""

import copy
import difflib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STORAGE = Path(".benchmarks")
BASELINES = Path("packages/bench/baselines")
"""Relative to the root of the workspace, where nox runs."""

_NUMBER = re.compile(r"(\d{4,})_")
_PLACE = ("gpu", "driver", "cuda", "python", "torch", "triton")


class SavedRunError(Exception):
    """A saved run that is not there or not fit for what was asked; the message is one line."""


@dataclass(frozen=True)
class SavedRun:
    """One file of pytest-benchmark and what is in it."""

    path: Path
    content: dict[str, Any]

    @property
    def benchmarks(self) -> dict[str, dict[str, Any]]:
        """Its benchmarks by their full names."""
        return {benchmark["fullname"]: benchmark for benchmark in self.content["benchmarks"]}

    @property
    def device(self) -> str:
        """GPU and driver, or "cpu"."""
        machine = self.content["machine_info"]
        return f"{machine['gpu']}, driver {machine.get('driver')}" if machine.get("gpu") else "cpu"


def load(path: Path) -> SavedRun:
    """Read a saved run.

    Raises:
        SavedRunError: unreadable, or not a file of pytest-benchmark.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SavedRunError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not {"benchmarks", "machine_info"} <= content.keys():
        raise SavedRunError(f"{path} is not a file that pytest-benchmark saved")
    return SavedRun(path, content)


def runs(storage: Path = STORAGE) -> list[Path]:
    """Numbered runs in the storage, oldest first."""
    found = [path for path in storage.glob("*/*.json") if _NUMBER.match(path.name)]
    return sorted(found, key=lambda path: (path.stat().st_mtime, path.name))


def newest(storage: Path = STORAGE) -> SavedRun:
    """The run saved last.

    Raises:
        SavedRunError: nothing has been saved yet.
    """
    found = runs(storage)
    if not found:
        raise SavedRunError(f"no saved run in {storage}; make one with: nox -s bench")
    return load(found[-1])


def find(name: str, storage: Path = STORAGE, baselines: Path = BASELINES) -> SavedRun:
    """A run by the name of a baseline, the path of a file, or the number of a saved run.

    Raises:
        SavedRunError: nothing of that name; the message lists the baselines there are.
    """
    for path in (baselines / f"{name}.json", Path(name)):
        if path.is_file():
            return load(path)
    if name.isdecimal():
        numbered = [path for path in runs(storage) if int(path.name.split("_")[0]) == int(name)]
        if numbered:
            return load(numbered[-1])
    there = sorted(path.stem for path in baselines.glob("*.json"))
    close = difflib.get_close_matches(name, there, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise SavedRunError(
        f"{name!r} is no baseline, file or number of a saved run{hint}; baselines in {baselines}: "
        f"{', '.join(there) or 'none yet, make one with: nox -s bench -- save NAME'}"
    )


def baselines_of(device: str, baselines: Path = BASELINES) -> list[SavedRun]:
    """The baselines of a device, which their names begin with: h200.json, h200-norms.json, …."""
    return [
        load(p)
        for p in sorted([*baselines.glob(f"{device}.json"), *baselines.glob(f"{device}-*.json")])
    ]


def save_baseline(
    name: str,
    run: SavedRun,
    baselines: Path = BASELINES,
    *,
    operators: Collection[str] = (),
    commit: str | None = None,
    allow_dirty: bool = False,
) -> Path:
    """Keep a run as a baseline.

    The host's name and the long list of its processor's features are left out of the copy: they
    identify a machine, not a kind of machine.

    Args:
        name: letters, digits, dots, dashes and underscores; its device first, as in h200-norms.
        run: what to keep.
        baselines: where the copy goes; one of the same name is replaced.
        operators: keep only the benchmarks of these; all if empty.
        commit: the commit that was measured, for a run made outside a git checkout.
        allow_dirty: keep a run of a tree with uncommitted changes; the file says so.

    Returns:
        The path of the copy.

    Raises:
        SavedRunError: an unsuitable name, an operator that was not measured, or a run that does not
            say where it was made.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name.isdecimal():
        raise SavedRunError(
            f"{name!r} cannot name a baseline: letters, digits, dots, dashes and underscores, "
            f"and not digits alone"
        )
    check_workspace(baselines)
    content = copy.deepcopy(run.content)
    check_provenance(run.path, content, commit=commit, allow_dirty=allow_dirty)
    content["machine_info"].pop("node", None)
    content["machine_info"].get("cpu", {}).pop("flags", None)
    if operators:
        content["benchmarks"] = _only(operators, run)
    baselines.mkdir(exist_ok=True)
    target = baselines / f"{name}.json"
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return target


def _only(operators: Collection[str], run: SavedRun) -> list[dict[str, Any]]:
    benchmarks = run.content["benchmarks"]
    measured = {b["extra_info"].get("operator") for b in benchmarks}
    missing = sorted(set(operators) - measured)
    if missing:
        there = ", ".join(sorted(filter(None, measured)))
        raise SavedRunError(f"{run.path} measured no {', '.join(missing)}, but {there}")
    return [b for b in benchmarks if b["extra_info"].get("operator") in operators]


def check_workspace(baselines: Path) -> None:
    """Refuse a folder of baselines that is in no workspace.

    Raises:
        SavedRunError: the folder that holds it does not exist.
    """
    if not baselines.parent.is_dir():
        raise SavedRunError(f"there is no {baselines.parent} here; run from the workspace's root")


def check_provenance(
    path: Path, content: dict[str, Any], *, commit: str | None = None, allow_dirty: bool = False
) -> None:
    """Check that a measurement says where and of what it was made.

    Args:
        path: of the file, for messages.
        content: with machine_info and commit_info.
        commit: what to write as the commit, for a measurement made outside a git checkout.
        allow_dirty: accept uncommitted changes.

    Raises:
        SavedRunError: something is not said, or there were uncommitted changes.
    """
    machine, made_with = content["machine_info"], content.setdefault("commit_info", {})
    if commit is not None:
        if not re.fullmatch(r"[0-9a-f]{7,40}", commit):
            raise SavedRunError(f"{commit!r} is not a commit: give 7 to 40 hexadecimal digits")
        made_with["id"] = commit
        made_with.pop("error", None)  # git's word that there is no checkout
    missing = [key for key in _PLACE if not machine.get(key)]
    if missing:
        raise SavedRunError(
            f"{path} does not say its {', '.join(missing)}; a baseline is a run on a GPU, with "
            f"the hooks of tilewright_bench.plugin"
        )
    if made_with.get("id") in (None, "unversioned", "unknown"):
        raise SavedRunError(f"{path} does not name its commit; add --commit COMMIT")
    if made_with.get("dirty") and not allow_dirty:
        raise SavedRunError(
            f"{path} measured uncommitted changes on {made_with['id'][:12]}; commit and run "
            f"again, or add --allow-dirty"
        )
