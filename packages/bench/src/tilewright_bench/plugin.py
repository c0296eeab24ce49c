"""pytest hooks of a benchmark session: device times, where the run was made, a table with GB/s.

A folder of benchmarks takes them by importing them in its conftest.py; `-p tilewright_bench.plugin`
on pytest's command line does the same. Nothing else needs to be set.
"""

from collections.abc import Generator
from typing import Any

import pytest
import torch

from tilewright_bench.case import Case, Variant
from tilewright_bench.environment import CPU_NOTE, describe
from tilewright_bench.measure import Group, selected
from tilewright_bench.report import table
from tilewright_bench.rows import Row, row_of

_ROWS = pytest.StashKey[list[Row]]()


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-benchmark record device times; it reads its options after this hook."""
    config.option.benchmark_timer = "tilewright_bench.clock.device_clock"
    config.stash[_ROWS] = []


def pytest_report_header() -> str:
    """Name the device in the session's first lines."""
    if not torch.cuda.is_available():
        return f"benchmarks: {CPU_NOTE}"
    place = describe()
    return (
        f"benchmarks: {place['gpu']}, driver {place['driver']}, torch {place['torch']}, "
        f"triton {place['triton']}"
    )


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Add device, driver and versions to what pytest-benchmark saves of the machine."""
    machine_info.update(describe())


def pytest_collection_finish(session: pytest.Session) -> None:
    """Group the benchmarks that this session runs: variants of a case are measured together.

    Raises:
        UsageError: two cases of one operator, shape and dtype that differ in their work.
    """
    groups: dict[tuple[str, ...], list[tuple[str, Case, Variant]]] = {}
    for item in session.items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        case, variant = params.get("case"), params.get("variant")
        if isinstance(case, Case) and isinstance(variant, Variant):
            key = (item.nodeid.split("[")[0], case.operator, str(case), variant.direction)
            groups.setdefault(key, []).append((item.nodeid, case, variant))
    selected.clear()
    for (place, operator, name, direction), members in groups.items():
        if len({case.work(variant.direction) for _, case, variant in members}) > 1:
            raise pytest.UsageError(
                f"{place}: two cases of {operator} are both called {name} and differ in the work "
                f"of {direction}; what they differ in belongs in the operator's name or the shape"
            )
        group = Group(members[0][1], [variant for _, _, variant in members])
        selected.update((nodeid, group) for nodeid, _, _ in members)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep what was measured for the table at the end."""
    report = yield
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if call.when == "call" and report.passed and benchmark and benchmark.extra_info:
        item.config.stash[_ROWS].append(row_of(benchmark.stats, benchmark.extra_info))
    return report


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the table, after pytest-benchmark's own tables of times."""
    rows = config.stash[_ROWS]
    if not rows:
        return
    terminalreporter.section("bandwidth, memory and accuracy")
    terminalreporter.write_line(table(rows))
    if not torch.cuda.is_available():
        terminalreporter.write_line(f"\n{CPU_NOTE}")
