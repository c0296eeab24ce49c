"""What the repository's benchmarks count as least traffic, against the tensors themselves."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from tilewright_bench.discovery import cases_in, load
from tilewright_bench.evaluate import directed

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")

# Wide and high enough that weights, targets and losses, which are not counted, are under 5 %.
SHAPES = {"bench_rms_norm": (64, 256), "bench_cross_entropy": (16, 512)}


def total(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_least_traffic_is_each_input_and_result_once(name, dtype):
    case = load(BENCHMARKS / f"{name}.py").case(*SHAPES[name], dtype)
    inputs = case.inputs(CPU, seed=0)
    result = directed(case.reference, inputs, "fwd")()
    gradients = directed(case.reference, inputs, "bwd")()
    forward = total([*inputs, result])
    backward = total([result, *inputs, *gradients])
    assert case.work("fwd").bytes <= forward <= 1.05 * case.work("fwd").bytes
    assert case.work("bwd").bytes <= backward <= 1.05 * case.work("bwd").bytes


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("bench_*.py")), ids=lambda path: path.stem)
def test_a_benchmark_is_named_after_its_operator_or_its_family(path):
    module = load(path)
    operators = {case.operator for case in cases_in(module)}
    assert callable(getattr(module, path.stem))
    assert operators
    if len(operators) == 1:
        assert operators == {path.stem.removeprefix("bench_")}


def test_an_operator_is_measured_in_one_place():
    files = [{case.operator for case in cases_in(load(p))} for p in BENCHMARKS.glob("bench_*.py")]
    assert [name for name, files in Counter(n for f in files for n in f).items() if files > 1] == []
