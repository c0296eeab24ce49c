"""What the repository's benchmarks count as least traffic, against the tensors themselves."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tilewright_bench.evaluate import directed

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")

# Wide and high enough that weights, targets and losses, which are not counted, are under 5 %.
SHAPES = {"bench_rms_norm": (64, 256), "bench_cross_entropy": (16, 512)}


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def total(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_least_traffic_is_each_input_and_result_once(name, dtype):
    case = load(name).case(*SHAPES[name], dtype)
    inputs = case.inputs(CPU, seed=0)
    result = directed(case.reference, inputs, "fwd")()
    gradients = directed(case.reference, inputs, "bwd")()
    forward = total([*inputs, result])
    backward = total([result, *inputs, *gradients])
    assert case.work("fwd").bytes <= forward <= 1.05 * case.work("fwd").bytes
    assert case.work("bwd").bytes <= backward <= 1.05 * case.work("bwd").bytes


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("bench_*.py")), ids=lambda path: path.stem)
def test_a_benchmark_is_named_after_its_operator(path):
    module = load(path.stem)
    operator = path.stem.removeprefix("bench_")
    assert callable(getattr(module, path.stem))
    assert module.case(*module.SHAPES[0]).operator == operator
    assert {"tilewright", "torch"} <= module.PROVIDERS.keys()
