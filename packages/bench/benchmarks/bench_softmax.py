"""softmax beside its peers: forward moves x in and y out, backward dy and y in, dx out."""

import pytest
import torch

from tilewright_bench import (
    Case,
    Variant,
    Work,
    by_device,
    normal_inputs,
    run,
    skip_rows_that_liger_refuses,
    usual_providers,
    variants,
)
from tilewright_kernels import softmax

SHAPES = by_device(
    gpu=[(16384, 4096), (4096, 32768), (512, 262144), (256, 1024)],
    cpu=[(64, 256)],
)


def ours(x):
    return softmax(x, -1)


def eager(x):
    return torch.softmax(x, -1)


def liger():
    function = pytest.importorskip("liger_kernel.ops.softmax").LigerSoftmaxFunction
    return lambda x: function.apply(x)


def case(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    size = rows * width
    return Case(
        operator="softmax",
        shape=(rows, width),
        dtype=dtype,
        make_inputs=normal_inputs((rows, width), dtype=dtype),
        reference=eager,
        # Maximum, x - max, exp, sum, · 1/sum; backward: y · dy, sum, dy - sum, · y.
        forward=Work(bytes=2 * size * dtype.itemsize, flops=5 * size),
        backward=Work(bytes=3 * size * dtype.itemsize, flops=4 * size),
    )


PROVIDERS = usual_providers(ours, eager, liger=liger)


@pytest.mark.parametrize("variant", variants(PROVIDERS), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_softmax(benchmark, case: Case, variant: Variant):
    skip_rows_that_liger_refuses(case, variant)
    run(benchmark, case, variant)
