"""memory_patterns: each input is read once, each output written once; the best beside torch.

Shapes are a vector's length, for some copies with the shift, stride or stages behind it, or rows x
columns. Forward only: the gradients are copies, or views that move nothing.
"""

import pytest
import torch

from tilewright_bench import Case, Work, by_device, run, usual_providers, variants
from tilewright_kernels import memory_patterns as patterns

DTYPE = torch.float32
LENGTH, SIDE = by_device(gpu=(2**27, 2**13), cpu=(2**10, 2**5))
PATTERNS: list[tuple[str, *tuple[int, ...]]] = [
    ("vector_add", LENGTH),
    ("scale", LENGTH),
    ("multiply_add", LENGTH),
    ("copy_coalesced", LENGTH),
    ("copy_misaligned", LENGTH, 1),
    *(("copy_strided", LENGTH, stride) for stride in (2, 4, 8, 32)),
    *(("copy_tiled", LENGTH, stages) for stages in (1, 2, 4, 8)),
    ("transpose_naive", 2 * SIDE, SIDE),
    ("transpose_tiled", 2 * SIDE, SIDE),
    ("sum_one_program", LENGTH),
    ("sum_atomic", LENGTH),
    ("sum_tree", LENGTH),
    ("sum_persistent", LENGTH),
]
PLAIN_TORCH = {
    "vector_add": torch.add,
    "scale": lambda x: 2.0 * x,
    "multiply_add": lambda x, y: torch.add(y, x, alpha=2.0),
    "copy": lambda x, *_: x.clone(),
    "transpose": patterns.transpose_reference,
    "sum": torch.sum,
}
BEST_OF_A_KIND = (
    "vector_add", "scale", "multiply_add", "copy_coalesced", "transpose_tiled", "sum_persistent",
)  # fmt: skip
OURS = {
    "scale": lambda x: patterns.scale(x, 2.0),
    "multiply_add": lambda x, y: patterns.multiply_add(x, 2.0, y),
}


def ours(operator: str):
    return OURS.get(operator) or getattr(patterns, operator)


def plain_torch(operator: str):
    return PLAIN_TORCH.get(operator) or PLAIN_TORCH[operator.split("_")[0]]


def case(operator: str, *shape: int) -> Case:
    tensors = 2 if "add" in operator else 1
    # A transpose's shape is a matrix, any other's a length and perhaps a number for the function.
    sizes, numbers = (shape, ()) if "transpose" in operator else (shape[:1], shape[1:])

    def make_inputs(device, generator):
        options = {"device": device, "dtype": DTYPE, "generator": generator}
        return *(torch.randn(sizes, **options) for _ in range(tensors)), *numbers

    size = torch.Size(sizes).numel()
    vectors = tensors + ("sum" not in operator)
    operations = {"copy": 0, "transpose": 0, "multiply": 2}.get(operator.split("_")[0], 1)
    work = Work(bytes=vectors * size * DTYPE.itemsize, flops=operations * size)
    return Case(
        operator=operator,
        shape=shape,
        dtype=DTYPE,
        make_inputs=make_inputs,
        reference=plain_torch(operator),
        forward=work,
        backward=work,
    )


def providers(operator: str):
    if operator not in BEST_OF_A_KIND:
        return {"tilewright": lambda: ours(operator)}
    return usual_providers(ours(operator), plain_torch(operator))


CASES = [
    (case(operator, *shape), variant)
    for operator, *shape in PATTERNS
    for variant in variants(providers(operator), ("fwd",))
]


@pytest.mark.parametrize(("case", "variant"), CASES, ids=str)
def bench_memory_patterns(benchmark, case, variant):
    run(benchmark, case, variant)
