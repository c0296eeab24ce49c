"""Benchmarks of tilewright's operators beside their peers, on pytest-benchmark.

A benchmark file lists `Case`s (operator, shape, least bytes and FLOPs, inputs) and `variants`
(provider × direction) and calls `run`. `python -m tilewright_bench` compares saved runs, keeps them
as baselines, and draws tables and plots from those.
"""

from tilewright_bench.case import Case, Direction, Variant, Work, variants
from tilewright_bench.environment import by_device, default_device
from tilewright_bench.measure import run
from tilewright_bench.measurement import Measurement
from tilewright_bench.stopwatch import Rotation, Samples, time_interleaved
from tilewright_bench.usual import normal_inputs, skip_rows_that_liger_refuses, usual_providers

__all__ = [
    "Case",
    "Direction",
    "Measurement",
    "Rotation",
    "Samples",
    "Variant",
    "Work",
    "by_device",
    "default_device",
    "normal_inputs",
    "run",
    "skip_rows_that_liger_refuses",
    "time_interleaved",
    "usual_providers",
    "variants",
]
