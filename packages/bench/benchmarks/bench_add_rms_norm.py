"""add_rms_norm beside its peers: x and residual in, y and their sum out; dy, dh and h in, dx out.

Two operators, one after the other, would read the sum once more. The weight, its gradient and the
reciprocal norms are 1/rows and 1/width of that: not counted.
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
from tilewright_kernels import add_rms_norm

EPS = 1e-6
SHAPES = by_device(
    gpu=[(32768, 1024), (16384, 4096), (4096, 16384), (512, 262144), (256, 1024)],
    cpu=[(64, 256)],
)


def ours(x, residual, weight):
    return add_rms_norm(x, residual, weight, EPS)


def eager(x, residual, weight):
    h = x + residual
    return F.rms_norm(h, weight.shape, weight, EPS), h


def liger():
    module = pytest.importorskip("liger_kernel.ops.fused_add_rms_norm")
    norm = module.LigerFusedAddRMSNormFunction
    # Llama's casts; not in place, which would write dx into the caller's dy.
    return lambda x, residual, weight: norm.apply(x, residual, weight, EPS, 0.0, "llama", False)


def case(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    size = rows * width
    return Case(
        operator="add_rms_norm",
        shape=(rows, width),
        dtype=dtype,
        make_inputs=normal_inputs((rows, width), (rows, width), (width,), dtype=dtype),
        reference=eager,
        # x + residual, then as rms_norm; backward: as rms_norm, and dh added.
        forward=Work(bytes=4 * size * dtype.itemsize, flops=5 * size),
        backward=Work(bytes=4 * size * dtype.itemsize, flops=10 * size),
    )


PROVIDERS = usual_providers(ours, eager, liger=liger)


@pytest.mark.parametrize("variant", variants(PROVIDERS), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_add_rms_norm(benchmark, case: Case, variant: Variant):
    skip_rows_that_liger_refuses(case, variant)
    run(benchmark, case, variant)
