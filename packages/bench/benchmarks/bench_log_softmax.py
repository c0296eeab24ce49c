"""log_softmax beside its peers: forward moves x in and y out, backward dy and y in, dx out."""

import pytest
import torch

from tilewright_bench import (
    Case,
    Variant,
    Work,
    by_device,
    normal_inputs,
    run,
    usual_providers,
    variants,
)
from tilewright_kernels import log_softmax

SHAPES = by_device(
    gpu=[(16384, 4096), (4096, 32768), (256, 1024)],
    cpu=[(64, 256)],
)


def ours(x):
    return log_softmax(x, -1)


def eager(x):
    return torch.log_softmax(x, -1)


def case(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    size = rows * width
    return Case(
        operator="log_softmax",
        shape=(rows, width),
        dtype=dtype,
        make_inputs=normal_inputs((rows, width), dtype=dtype),
        reference=eager,
        # Maximum, x - max, exp, sum, - log sum; backward: sum, exp, · sum, subtraction.
        forward=Work(bytes=2 * size * dtype.itemsize, flops=5 * size),
        backward=Work(bytes=3 * size * dtype.itemsize, flops=4 * size),
    )


PROVIDERS = usual_providers(ours, eager)


@pytest.mark.parametrize("variant", variants(PROVIDERS), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_log_softmax(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)
