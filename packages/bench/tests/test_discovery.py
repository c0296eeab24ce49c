from tilewright_bench.discovery import operators_in

FILE = """
import pytest, torch
from tilewright_bench import Case, Work

def case(operator):
    work = Work(bytes=1, flops=1)
    return Case(operator=operator, shape=(8,), dtype=torch.float32, make_inputs=lambda d, g: (),
                reference=abs, forward=work, backward=work)

UNUSED = case("unused")

@pytest.mark.parametrize("variant", ["a", "b"])
@pytest.mark.parametrize("case", [case("one"), pytest.param(case("two"), id="second")])
def bench_several(case, variant): ...

@pytest.mark.parametrize(("case", "variant"), [(case("three"), "a")])
def bench_pairs(case, variant): ...
"""


def test_operators_are_those_of_all_parametrized_cases(tmp_path):
    (tmp_path / "bench_several.py").write_text(FILE)
    (tmp_path / "conftest.py").write_text("raise RuntimeError('no benchmark')")
    assert operators_in(tmp_path) == {"one", "two", "three"}
