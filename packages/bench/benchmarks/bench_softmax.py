"""softmax beside its peers: forward moves x in and y out, backward dy and y in, dx out."""

import pytest
import torch

from tilewright_bench import Case, Variant, Work, by_device, run, variants
from tilewright_kernels import softmax

SHAPES = by_device(
    gpu=[(16384, 4096), (4096, 32768), (512, 262144), (256, 1024)],
    cpu=[(64, 256)],
)

LIGER_MAX_WIDTH = 65536


def ours(x):
    return softmax(x, -1)


def eager(x):
    return torch.softmax(x, -1)


def liger():
    function = pytest.importorskip("liger_kernel.ops.softmax").LigerSoftmaxFunction
    return lambda x: function.apply(x)


def case(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    def make_inputs(device, generator):
        options = {"device": device, "dtype": dtype, "generator": generator}
        return (torch.randn(rows, width, **options).requires_grad_(),)

    size = rows * width
    return Case(
        operator="softmax",
        shape=(rows, width),
        dtype=dtype,
        make_inputs=make_inputs,
        reference=eager,
        # Maximum, x - max, exp, sum, · 1/sum; backward: y · dy, sum, dy - sum, · y.
        forward=Work(bytes=2 * size * dtype.itemsize, flops=5 * size),
        backward=Work(bytes=3 * size * dtype.itemsize, flops=4 * size),
    )


PROVIDERS = {
    "tilewright": lambda: ours,
    "torch": lambda: eager,
    "compile": lambda: torch.compile(eager, dynamic=False),
    "liger": liger,
}


@pytest.mark.parametrize("variant", variants(PROVIDERS), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_softmax(benchmark, case: Case, variant: Variant):
    if variant.provider == "liger" and case.shape[1] > LIGER_MAX_WIDTH:
        pytest.skip(f"Liger refuses rows wider than {LIGER_MAX_WIDTH}")
    run(benchmark, case, variant)
