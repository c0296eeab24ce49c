"""layer_norm beside its peers: forward moves x in and y out, backward dy and x in, dx out.

Weight, bias, their gradients, means and reciprocal deviations are 1/rows and 1/width of that: not
counted.
"""

import pytest
import torch
import torch.nn.functional as F

from tilewright_bench import Case, Variant, Work, by_device, run, variants
from tilewright_kernels import layer_norm

EPS = 1e-5
SHAPES = by_device(
    gpu=[(32768, 1024), (16384, 4096), (4096, 16384), (512, 262144), (256, 1024)],
    cpu=[(64, 256)],
)
LIGER_MAX_WIDTH = 65536


def ours(x, weight, bias):
    return layer_norm(x, weight.shape, weight, bias, EPS)


def eager(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def liger():
    norm = pytest.importorskip("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return lambda x, weight, bias: norm.apply(x, weight, bias, EPS)


def case(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    def make_inputs(device, generator):
        options = {"device": device, "dtype": dtype, "generator": generator}
        x = torch.randn(rows, width, **options).requires_grad_()
        weight = torch.randn(width, **options).requires_grad_()
        bias = torch.randn(width, **options).requires_grad_()
        return x, weight, bias

    size = rows * width
    return Case(
        operator="layer_norm",
        shape=(rows, width),
        dtype=dtype,
        make_inputs=make_inputs,
        reference=eager,
        # Σx, - mean, its square and sum, · r, · w, + b; backward: - mean, · r, dy · w, its sum, its
        # product with x̂ and sum, dx (four), dw (two), db.
        forward=Work(bytes=2 * size * dtype.itemsize, flops=7 * size),
        backward=Work(bytes=3 * size * dtype.itemsize, flops=13 * size),
    )


PROVIDERS = {
    "tilewright": lambda: ours,
    "torch": lambda: eager,
    "compile": lambda: torch.compile(eager, dynamic=False),
    "liger": liger,
}


@pytest.mark.parametrize("variant", variants(PROVIDERS), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_layer_norm(benchmark, case: Case, variant: Variant):
    if variant.provider == "liger" and case.shape[1] > LIGER_MAX_WIDTH:
        pytest.skip(f"Liger refuses rows wider than {LIGER_MAX_WIDTH}")
    run(benchmark, case, variant)
