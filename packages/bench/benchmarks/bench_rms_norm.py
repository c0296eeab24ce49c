"""rms_norm beside its peers: forward moves x once in and y once out, backward dy and x in, dx out.

The weight, its gradient and the reciprocal norms are 1/rows and 1/width of that: not counted.
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
from tilewright_kernels import rms_norm

EPS = 1e-6
SHAPES = by_device(
    gpu=[(32768, 1024), (16384, 4096), (4096, 16384), (512, 262144), (256, 1024)],
    cpu=[(64, 256)],
)


def ours(x, weight):
    return rms_norm(x, weight.shape, weight, EPS)


def eager(x, weight):
    return F.rms_norm(x, weight.shape, weight, EPS)


def liger():
    norm = pytest.importorskip("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    # Llama's casts; not in place, which would write dx into the caller's dy.
    return lambda x, weight: norm.apply(x, weight, EPS, 0.0, "llama", False)


def case(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    size = rows * width
    return Case(
        operator="rms_norm",
        shape=(rows, width),
        dtype=dtype,
        make_inputs=normal_inputs((rows, width), (width,), dtype=dtype),
        reference=eager,
        # x², its sum, · r, · w; backward: dy · w, its product with x̂ and sum, x̂, dx, dw.
        forward=Work(bytes=2 * size * dtype.itemsize, flops=4 * size),
        backward=Work(bytes=3 * size * dtype.itemsize, flops=9 * size),
    )


PROVIDERS = usual_providers(ours, eager, liger=liger)


@pytest.mark.parametrize("variant", variants(PROVIDERS), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_rms_norm(benchmark, case: Case, variant: Variant):
    skip_rows_that_liger_refuses(case, variant)
    run(benchmark, case, variant)


@pytest.mark.parametrize("variant", variants(PROVIDERS, ("fwd+bwd",)), ids=str)
@pytest.mark.parametrize("case", [case(1, 4096)], ids=str)
def bench_rms_norm_of_one_row(benchmark, case: Case, variant: Variant):
    """Here the host is what one waits for: see host_us."""
    run(benchmark, case, variant)
