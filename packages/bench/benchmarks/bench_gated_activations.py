"""Gated units beside their peers: gate and up in, y out; backward dy, gate, up in, two out.

Shape rows x width is gate and up apart, rows x 2 x width both in one tensor, as a joint projection
writes them: there peers get its halves by chunk() and pay for what that costs them.
"""

import pytest
import torch
import torch.nn.functional as F

from tilewright_bench import Case, Work, by_device, normal_inputs, run, usual_providers, variants
from tilewright_kernels import geglu, reglu, swiglu

SHAPES = by_device(
    gpu=[(16384, 8192), (16384, 2, 8192), (256, 1024)], cpu=[(64, 256), (64, 2, 256)]
)
FUNCTIONS = {"swiglu": (swiglu, F.silu), "geglu": (geglu, F.gelu), "reglu": (reglu, F.relu)}
# As for the activations alone; one product more forward, three backward, f and f' sharing terms.
FLOPS = {"swiglu": (5, 11), "geglu": (19, 25), "reglu": (2, 5)}


def eager(operator: str):
    activation = FUNCTIONS[operator][1]

    def unit(gate, up=None):
        if up is None:
            gate, up = gate.chunk(2, -1)
        return activation(gate) * up

    return unit


def liger():
    function = pytest.importorskip("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    return lambda gate, up=None: function.apply(*(gate.chunk(2, -1) if up is None else (gate, up)))


def case(operator: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    rows, *joint, width = shape
    sizes = [(rows, 2 * width)] if joint else [(rows, width)] * 2
    size = rows * width
    forward, backward = FLOPS[operator]
    return Case(
        operator=operator,
        shape=shape,
        dtype=dtype,
        make_inputs=normal_inputs(*sizes, dtype=dtype),
        reference=eager(operator),
        forward=Work(bytes=3 * size * dtype.itemsize, flops=forward * size),
        backward=Work(bytes=5 * size * dtype.itemsize, flops=backward * size),
    )


def providers(operator: str):
    # Liger's geglu is the tanh form, which is another function; it has no reglu.
    others = {"liger": liger} if operator == "swiglu" else {}
    return usual_providers(FUNCTIONS[operator][0], eager(operator), **others)


CASES = [
    (case(operator, *shape), variant)
    for operator in FUNCTIONS
    for shape in SHAPES
    for variant in variants(providers(operator))
]


@pytest.mark.parametrize(("case", "variant"), CASES, ids=str)
def bench_gated_activations(benchmark, case, variant):
    run(benchmark, case, variant)
