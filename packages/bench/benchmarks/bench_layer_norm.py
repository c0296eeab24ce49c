"""layer_norm beside its peers: forward moves x in and y out, backward dy and x in, dx out.

Weight, bias, their gradients, means and reciprocal deviations are 1/rows and 1/width of that: not
counted.
"""

import pytest
import torch
import torch.nn.functional as F

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
from tilewright_kernels import layer_norm

EPS = 1e-5
SHAPES = by_device(
    gpu=[(32768, 1024), (16384, 4096), (4096, 16384), (512, 262144), (256, 1024)],
    cpu=[(64, 256)],
)


def ours(x, weight, bias):
    return layer_norm(x, weight.shape, weight, bias, EPS)


def eager(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def liger():
    norm = pytest.importorskip("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return lambda x, weight, bias: norm.apply(x, weight, bias, EPS)


def case(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    size = rows * width
    return Case(
        operator="layer_norm",
        shape=(rows, width),
        dtype=dtype,
        make_inputs=normal_inputs((rows, width), (width,), (width,), dtype=dtype),
        reference=eager,
        # Σx, - mean, its square and sum, · r, · w, + b; backward: - mean, · r, dy · w, its sum, its
        # product with x̂ and sum, dx (four), dw (two), db.
        forward=Work(bytes=2 * size * dtype.itemsize, flops=7 * size),
        backward=Work(bytes=3 * size * dtype.itemsize, flops=13 * size),
    )


PROVIDERS = usual_providers(ours, eager, liger=liger)


@pytest.mark.parametrize("variant", variants(PROVIDERS), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_layer_norm(benchmark, case: Case, variant: Variant):
    skip_rows_that_liger_refuses(case, variant)
    run(benchmark, case, variant)
