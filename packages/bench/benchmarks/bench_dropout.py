"""dropout beside its peers: x (and a residual) in and y out forward, dy in and dx out backward.

The masks of peers are their own and some are stored, which is not counted. No two agree, so the
error of each is taken where none has a choice, at p = 1; ours has to match its reference, whose
mask is the same, at P too. The residual's gradient is dy itself.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tilewright_bench import (
    Case,
    Variant,
    Work,
    by_device,
    default_device,
    run,
    usual_providers,
    variants,
)
from tilewright_bench.evaluate import Oracle, error_limit
from tilewright_kernels import dropout, dropout_add, dropout_add_reference, dropout_reference

P = 0.1
SHAPES = by_device(gpu=[(16384, 8192), (256, 1024)], cpu=[(64, 256)])
OURS = {
    "dropout": lambda x, p: dropout(x, p, seed=1),
    "dropout_add": lambda x, residual, p: dropout_add(x, residual, p, seed=1),
}
REFERENCES = {
    "dropout": lambda x, p: dropout_reference(x, p, seed=1),
    "dropout_add": lambda x, residual, p: dropout_add_reference(x, residual, p, seed=1),
}
EAGER = {
    "dropout": lambda x, p: F.dropout(x, p),
    "dropout_add": lambda x, residual, p: F.dropout(x, p) + residual,
}


def case(operator: str, rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    tensors = 2 if operator == "dropout_add" else 1

    def make_inputs(device, generator, p=P):
        options = {"device": device, "dtype": dtype, "generator": generator}
        return *(torch.randn(rows, width, **options).requires_grad_() for _ in range(tensors)), p

    size = rows * width
    # The words of Philox are integers: not counted. A comparison, a product and perhaps a sum.
    return Case(
        operator=operator,
        shape=(rows, width),
        dtype=dtype,
        make_inputs=make_inputs,
        check_inputs=lambda device, generator: make_inputs(device, generator, p=1.0),
        reference=EAGER[operator],
        forward=Work(bytes=(1 + tensors) * size * dtype.itemsize, flops=(1 + tensors) * size),
        backward=Work(bytes=2 * size * dtype.itemsize, flops=2 * size),
    )


def check_masks(case: Case, variant: Variant) -> None:
    """Fail unless ours drops and scales what its reference does in float64, under the same seed."""
    masked = replace(case, reference=REFERENCES[case.operator], check_inputs=None)
    verdict = Oracle(masked, variant.direction, default_device()).judge(variant.build())
    assert verdict.error <= error_limit(case.dtype)


CASES = [
    (case(operator, *shape), variant)
    for operator in OURS
    for shape in SHAPES
    for variant in variants(usual_providers(OURS[operator], EAGER[operator]))
]


@pytest.mark.parametrize(("case", "variant"), CASES, ids=str)
def bench_dropout(benchmark, case, variant):
    if variant.provider == "tilewright":
        check_masks(case, variant)
    run(benchmark, case, variant)
