"""Element-wise activations beside their peers: x in and y out forward, dy and x or y in, dx out.

relu's backward and that of relu_squared read y, which the layer behind them keeps anyway; all else
reads x. Peers differ in what they keep, not in what they move.
"""

import pytest
import torch
import torch.nn.functional as F

from tilewright_bench import Case, Work, by_device, normal_inputs, run, usual_providers, variants
from tilewright_kernels import gelu, relu, relu_squared, silu

SHAPES = by_device(gpu=[(16384, 8192), (256, 1024)], cpu=[(64, 256)])
FUNCTIONS = {
    "relu": (relu, F.relu),
    "gelu": (gelu, F.gelu),
    "silu": (silu, F.silu),
    "relu_squared": (relu_squared, lambda x: F.relu(x).square()),
}
# Operations an element forward and backward, an exponential or a division counted as one. gelu's
# erf is taken as a polynomial of degree five and an exponential.
FLOPS = {"relu": (1, 2), "gelu": (18, 21), "silu": (4, 8), "relu_squared": (2, 3)}


def case(operator: str, rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    size = rows * width
    forward, backward = FLOPS[operator]
    return Case(
        operator=operator,
        shape=(rows, width),
        dtype=dtype,
        make_inputs=normal_inputs((rows, width), dtype=dtype),
        reference=FUNCTIONS[operator][1],
        forward=Work(bytes=2 * size * dtype.itemsize, flops=forward * size),
        backward=Work(bytes=3 * size * dtype.itemsize, flops=backward * size),
    )


CASES = [
    (case(operator, *shape), variant)
    for operator in FUNCTIONS
    for shape in SHAPES
    for variant in variants(usual_providers(*FUNCTIONS[operator]))
]


@pytest.mark.parametrize(("case", "variant"), CASES, ids=str)
def bench_activations(benchmark, case, variant):
    run(benchmark, case, variant)
