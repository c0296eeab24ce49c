"""What the repository's benchmarks count as least traffic, against the tensors themselves."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from tilewright_bench.discovery import cases_in, load
from tilewright_bench.evaluate import directed

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")

# An optimizer's own tensors: states, and masters.
_OPTIMIZERS = {
    "adamw", "adamw_captured", "adamw_clipped", "adamw_exact", "adamw_in_turn", "adamw_int8",
    "muon",
}  # fmt: skip
NOT_CHECKED = {
    # Tables that only peers read; a reference whose result stays float32.
    "fwd": {*_OPTIMIZERS, "apply_rotary_emb", "newton_schulz"},
    # No backward, two gradients that are one tensor, or what a backward does not read.
    "bwd": {
        *_OPTIMIZERS,
        "apply_rotary_emb",
        "add_rms_norm",
        "dropout",
        "dropout_add",
        "moe_permute",
        "moe_route",
    },
}


def total(tensors):
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def as_list(result):
    return list(result) if isinstance(result, tuple | list) else [result]


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("bench_*.py")), ids=lambda path: path.stem)
def test_least_traffic_is_each_input_and_result_once(path):
    # Weights, targets and losses, which are not counted, are under 5 %.
    for case in {case.operator: case for case in reversed([*cases_in(load(path))])}.values():
        inputs = case.inputs(CPU, seed=0)
        moved = [*inputs, *as_list(directed(case.reference, inputs, "fwd")())]
        if case.operator not in NOT_CHECKED["fwd"]:
            assert 1 <= total(moved) / case.forward.bytes <= 1.05, case.operator
        differentiable = any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
        if differentiable and case.operator not in NOT_CHECKED["bwd"]:
            moved += as_list(directed(case.reference, inputs, "bwd")())
            assert 1 <= total(moved) / case.backward.bytes <= 1.05, case.operator


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
