"""swiglu beside its peers: forward moves gate and up in, y out; backward dy, gate, up in, two out.

Shape rows x width is gate and up apart, rows x 2 x width both in one tensor, as a joint projection
writes them: there peers get its halves by chunk() and pay for what that costs them.
"""

import pytest
import torch
import torch.nn.functional as F

from tilewright_bench import Case, Variant, Work, by_device, run, variants
from tilewright_kernels import swiglu

SHAPES = by_device(gpu=[(16384, 8192), (16384, 4096)], cpu=[(64, 256)])


def eager(gate, up=None):
    if up is None:
        gate, up = gate.chunk(2, -1)
    return F.silu(gate) * up


def liger():
    function = pytest.importorskip("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    return lambda gate, up=None: function.apply(*(gate.chunk(2, -1) if up is None else (gate, up)))


def case(rows: int, width: int, dtype: torch.dtype = torch.bfloat16, *, joint=False) -> Case:
    def make_inputs(device, generator):
        sizes = [2 * width] if joint else [width, width]
        options = {"device": device, "dtype": dtype, "generator": generator}
        return tuple(torch.randn(rows, n, **options).requires_grad_() for n in sizes)

    size = rows * width
    return Case(
        operator="swiglu",
        shape=(rows, 2, width) if joint else (rows, width),
        dtype=dtype,
        make_inputs=make_inputs,
        reference=eager,
        # e⁻ᵍ, + 1, 1 / that, · g, · up; backward: s again, · g, · dy for dup; four for the slope of
        # silu, · up, · dy for dgate.
        forward=Work(bytes=3 * size * dtype.itemsize, flops=5 * size),
        backward=Work(bytes=5 * size * dtype.itemsize, flops=11 * size),
    )


PROVIDERS = {
    "tilewright": lambda: swiglu,
    "torch": lambda: eager,
    "compile": lambda: torch.compile(eager, dynamic=False),
    "liger": liger,
}
CASES = [case(*shape, joint=joint) for joint in (False, True) for shape in SHAPES]


@pytest.mark.parametrize("variant", variants(PROVIDERS), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_swiglu(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)
