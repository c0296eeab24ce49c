"""Saved runs to test with: the smallest files that pytest-benchmark itself can read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

H200 = {
    "node": "host-17",
    "cpu": {"arch": "X86_64", "flags": ["sse", "avx"]},
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
def info() -> Callable[..., dict[str, Any]]:
    """extra_info of one benchmark: (fields that differ from rms_norm's forward) -> fields."""

    def make(**fields: Any) -> dict[str, Any]:
        plain = {
            "operator": "rms_norm",
            "case": "16384x4096-bf16",
            "direction": "fwd",
            "provider": "tilewright",
            "clock": "cuda graph",
            "bytes": 2 * 16384 * 4096 * 2,
            "flops": 4 * 16384 * 4096,
            "gb_per_s": 3912.4,
            "tflop_per_s": 3.9124,
            "copy_gb_per_s": 4105.0,
            "share_of_copy": 0.953,
            "ceiling": "copy",
            "share": 0.953,
            "host_us": 21.04,
            "peak_extra_bytes": 136_314_880,
            "result_bytes": 134_217_728,
            "error": 0.00163,
        }
        return plain | fields

    return make


@pytest.fixture
def write_run() -> Callable[..., Path]:
    """Write a saved run.

    (path, {name: median in seconds}, machine_info, commit_info, {name: extra_info}, spread) -> path
    """

    def write(
        path: Path,
        medians: dict[str, float],
        machine: dict[str, Any] | None = None,
        commit: dict[str, Any] | None = None,
        infos: dict[str, dict[str, Any]] | None = None,
        spread: float = 0.0,
    ) -> Path:
        def benchmark(name: str, median: float) -> dict[str, Any]:
            stats = dict.fromkeys(("min", "max", "mean", "median"), median)
            stats |= {"stddev": 0.0, "iqr": spread * median, "ops": 1 / median, "outliers": "0;0"}
            stats |= {"rounds": 3, "iterations": 1}
            return {
                "group": "op 8x8-fp32 fwd",
                "name": name,
                "fullname": f"bench_op.py::{name}",
                "params": None,
                "param": None,
                "extra_info": (infos or {}).get(name, {}),
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
