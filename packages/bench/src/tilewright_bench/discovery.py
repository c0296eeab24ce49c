"""Which operators a folder of benchmarks measures."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from tilewright_bench.case import Case


def operators_in(folder: Path) -> set[str]:
    """Operators of all cases that the benchmark files of a folder are parametrized with."""
    return {
        case.operator for path in sorted(folder.glob("bench_*.py")) for case in cases_in(load(path))
    }


def load(path: Path) -> ModuleType:
    """Import a benchmark file, which is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases_in(module: ModuleType) -> Iterator[Case]:
    """Cases that the functions of a benchmark file are parametrized with."""
    for function in vars(module).values():
        for mark in getattr(function, "pytestmark", []):
            if mark.name == "parametrize":
                for value in mark.args[1]:
                    value = getattr(value, "values", value)  # pytest.param wraps what has marks
                    found = value if isinstance(value, tuple) else (value,)
                    yield from (part for part in found if isinstance(part, Case))
