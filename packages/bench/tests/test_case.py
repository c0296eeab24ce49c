from dataclasses import replace
from typing import Any

import pytest
import torch

from tilewright_bench import Case, Variant, Work, variants

UNKNOWN: Any = ("forward",)

CASE = Case(
    operator="double",
    shape=(16, 8),
    dtype=torch.float32,
    make_inputs=lambda device, generator: (torch.randn(16, 8, device=device, generator=generator),),
    reference=lambda x: x * 2,
    forward=Work(bytes=1024, flops=128),
    backward=Work(bytes=2048, flops=256),
)


def test_names():
    assert str(replace(CASE, dtype=torch.bfloat16, shape=(32768, 1024))) == "32768x1024-bf16"
    assert str(Variant(provider="liger", direction="fwd+bwd", build=lambda: abs)) == "fwd+bwd-liger"


def test_work_of_both_directions_is_the_sum_unless_given():
    assert CASE.work("fwd") == Work(bytes=1024, flops=128)
    assert CASE.work("bwd") == Work(bytes=2048, flops=256)
    assert CASE.work("fwd+bwd") == Work(bytes=3072, flops=384)
    fused = Work(bytes=2000, flops=300)
    assert replace(CASE, forward_backward=fused).work("fwd+bwd") == fused


def test_inputs_depend_on_the_seed_alone(device):
    (a,), (b,), (c,) = (CASE.inputs(device, seed) for seed in (1, 1, 2))
    assert a.device.type == device.type
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_providers_of_one_direction_stand_side_by_side():
    made = variants({"a": lambda: abs, "b": lambda: abs}, ("bwd", "fwd"))
    assert [str(variant) for variant in made] == ["bwd-a", "bwd-b", "fwd-a", "fwd-b"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(CASE, shape=()), r"shape \(\)"),
        (lambda: replace(CASE, shape=(4, 0)), r"shape \(4, 0\) of double"),
        (lambda: replace(CASE, dtype=torch.int8), "dtype torch.int8 is none of torch.bfloat16"),
        (lambda: Work(bytes=0, flops=1), "bytes must be at least 1"),
        (lambda: Work(bytes=1, flops=-1), "flops at least 0"),
        (
            lambda: variants({"a": lambda: abs}, UNKNOWN),
            "direction 'forward' is none of 'fwd', 'bwd'",
        ),
    ],
)
def test_wrong_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
