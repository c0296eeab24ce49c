"""How fast each pattern moves its bytes on the device at hand, beside torch's copy_."""

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import torch

from tilewright_kernels.memory_patterns.copy import (
    copy_coalesced,
    copy_misaligned,
    copy_strided,
    copy_tiled,
)
from tilewright_kernels.memory_patterns.reduce import (
    sum_atomic,
    sum_one_program,
    sum_persistent,
    sum_tree,
)
from tilewright_kernels.memory_patterns.transpose import transpose_naive, transpose_tiled
from tilewright_kernels.memory_patterns.vector_add import multiply_add, scale, vector_add


class Bandwidth(NamedTuple):
    """One pattern's line of the report."""

    pattern: str
    """The call."""
    gb_per_s: float
    """10⁹ bytes a second, each input and output counted once."""
    share: float
    """Of what `copy_` reaches on as many bytes of input."""


def bandwidth_report(
    device: torch.device | str | None = None, *, megabytes: int = 256
) -> list[Bandwidth]:
    """Time every pattern on a float32 vector, or square matrix.

    Args:
        device: None takes the current CUDA device, or the CPU where there is none. On a CPU it is
            the references that run, unless `use_backend("triton")` asks for the interpreter.
        megabytes: size of the vector, in 2²⁰ bytes. Several times the L2 cache, or the figures are
            those of the cache.

    Returns:
        One line a pattern, `copy_` first.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    side = round((megabytes * 2**18) ** 0.5)
    x, y, out = (torch.randn(side, side, device=device) for _ in range(3))
    n = x.nbytes
    patterns: list[tuple[str, int, Callable[[], object]]] = [
        ("out.copy_(x)", 2 * n, lambda: out.copy_(x)),
        ("vector_add(x, y)", 3 * n, lambda: vector_add(x, y)),
        ("scale(x, 3.0)", 2 * n, lambda: scale(x, 3.0)),
        ("multiply_add(x, 3.0, y)", 3 * n, lambda: multiply_add(x, 3.0, y)),
        ("copy_coalesced(x)", 2 * n, lambda: copy_coalesced(x)),
        ("copy_misaligned(x, 1)", 2 * n, lambda: copy_misaligned(x, 1)),
        ("copy_strided(x, 2)", 2 * n, lambda: copy_strided(x, 2)),
        ("copy_strided(x, 8)", 2 * n, lambda: copy_strided(x, 8)),
        ("copy_strided(x, 64)", 2 * n, lambda: copy_strided(x, 64)),
        ("copy_tiled(x)", 2 * n, lambda: copy_tiled(x)),
        ("transpose_naive(x)", 2 * n, lambda: transpose_naive(x)),
        ("transpose_tiled(x)", 2 * n, lambda: transpose_tiled(x)),
        ("sum_one_program(x)", n, lambda: sum_one_program(x)),
        ("sum_atomic(x)", n, lambda: sum_atomic(x)),
        ("sum_tree(x)", n, lambda: sum_tree(x)),
        ("sum_persistent(x)", n, lambda: sum_persistent(x)),
    ]
    speeds = [(name, traffic / _seconds(call, x.device)) for name, traffic, call in patterns]
    ceiling = speeds[0][1]
    return [Bandwidth(name, speed / 1e9, speed / ceiling) for name, speed in speeds]


def _seconds(call: Callable[[], object], device: torch.device, repetitions: int = 10) -> float:
    """Median time of a call after one that compiles: by events on a GPU, by the clock on a CPU."""
    call()
    if device.type != "cuda":
        return median(_clocked(call) for _ in range(repetitions))
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
        # The first calls only fill the queue, so that the device never waits for the host.
        for event in events:
            event.record()
            call()
        torch.cuda.synchronize()
    return median(a.elapsed_time(b) for a, b in pairwise(events)) / 1e3


def _clocked(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
