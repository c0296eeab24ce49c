"""Saved runs to test with: the smallest files that pytest-benchmark itself can read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

H200 = {
    "node": "host-17",
    "gpu": "NVIDIA H200",
    "gpu_count": 1,
    "driver": "580.1",
    "cuda": "13.0",
    "python": "3.12.3",
    "torch": "2.11.0",
    "triton": "3.6.0",
}


def pytest_configure(config: pytest.Config) -> None:
    """No tables of times from the few tests that use pytest-benchmark's fixture themselves."""
    config.option.benchmark_quiet = True


@pytest.fixture
def write_run() -> Callable[..., Path]:
    """Write a saved run: (path, {name: median in seconds}, machine_info, commit_info) -> path."""

    def write(
        path: Path,
        medians: dict[str, float],
        machine: dict[str, Any] | None = None,
        commit: dict[str, Any] | None = None,
    ) -> Path:
        def benchmark(name: str, median: float) -> dict[str, Any]:
            stats = dict.fromkeys(("min", "max", "mean", "median"), median)
            stats |= {"stddev": 0.0, "iqr": 0.0, "ops": 1 / median, "outliers": "0;0"}
            stats |= {"rounds": 3, "iterations": 1}
            return {
                "group": "op 8x8-fp32 fwd",
                "name": name,
                "fullname": f"bench_op.py::{name}",
                "params": None,
                "param": None,
                "extra_info": {},
                "stats": stats,
            }

        content = {
            "machine_info": dict(H200 if machine is None else machine),
            "commit_info": {"id": "0123456789abcdef", "dirty": False} if commit is None else commit,
            "benchmarks": [benchmark(*item) for item in medians.items()],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    return write
