"""log_softmax beside its peers: forward moves x in and y out, backward dy and y in, dx out."""

import pytest
import torch

from tilewright_bench import Case, Variant, Work, by_device, run, variants
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
    def make_inputs(device, generator):
        options = {"device": device, "dtype": dtype, "generator": generator}
        return (torch.randn(rows, width, **options).requires_grad_(),)

    size = rows * width
    return Case(
        operator="log_softmax",
        shape=(rows, width),
        dtype=dtype,
        make_inputs=make_inputs,
        reference=eager,
        # Maximum, x - max, exp, sum, - log sum; backward: sum, exp, · sum, subtraction.
        forward=Work(bytes=2 * size * dtype.itemsize, flops=5 * size),
        backward=Work(bytes=3 * size * dtype.itemsize, flops=4 * size),
    )


PROVIDERS = {
    "tilewright": lambda: ours,
    "torch": lambda: eager,
    "compile": lambda: torch.compile(eager, dynamic=False),
}


@pytest.mark.parametrize("variant", variants(PROVIDERS), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_log_softmax(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)
