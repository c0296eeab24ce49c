"""What a device can do at most, measured: bytes by copies, FLOPs by matrix products."""

from functools import lru_cache

import torch

from tilewright_bench.stopwatch import Rotation, time_interleaved
from tilewright_bench.timer import Call

L2_MULTIPLE = 4
MAX_INPUT_SETS = 256
"""Sets of inputs: as many as move L2_MULTIPLE times the L2's size, MAX_INPUT_SETS at most."""

LINE = 128

MATMUL_SIZE = 8192
"""Sides of the square product whose speed is the ceiling of FLOPs; large enough for any device."""

MATMUL_SECONDS = 0.2


def input_sets(traffic: int, device: torch.device) -> int:
    """Sets of inputs to rotate among, so that their traffic [bytes] exceeds the L2 cache."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(1, -(-L2_MULTIPLE * cache // traffic)), MAX_INPUT_SETS)


def copies(traffic: int, sets: int, device: torch.device) -> list[Call]:
    """`sets` copies of random bytes, each of which moves `traffic` bytes, read and written."""
    generator = torch.Generator(device).manual_seed(0)
    # Whole cache lines: the driver copies odd sizes in other, slower ways.
    size = -(-traffic // 2 // LINE) * LINE

    def copy() -> Call:
        source = torch.empty(size, dtype=torch.uint8, device=device)
        source.random_(generator=generator)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return [copy() for _ in range(sets)]


def products(size: int, dtype: torch.dtype, device: torch.device) -> Call:
    """A product of two random matrices of size × size, 2 · size³ operations."""
    options = {"device": device, "dtype": dtype}
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, **options) for _ in range(2))
    result = torch.empty(size, size, **options)
    return lambda: torch.mm(a, b, out=result)


@lru_cache
def matmul_tflop_per_s(dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of torch's matrix product in a dtype, measured once a session."""
    size = MATMUL_SIZE if device.type == "cuda" else 128
    call = products(size, dtype, device)
    (samples,) = time_interleaved([Rotation([call])], device, seconds=MATMUL_SECONDS)
    return 2 * size**3 / samples.median / 1e12
