"""Layouts at any number of ranks, without processes: nothing lost, nothing twice, balanced."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright_dist.layout import (
    ALIGNMENT,
    Partition,
    TensorSpec,
    assign_buckets,
    balance,
    fingerprint,
    is_even,
    lay_out,
    plan_buckets,
)


def spec(name, *shape, dtype=torch.float32, partition: Partition = "replicated"):
    return TensorSpec(name=name, shape=shape, dtype=dtype, partition=partition)


def names(buckets):
    return [[s.name for s in bucket] for bucket in buckets]


def test_buckets_fill_until_the_cap_after_a_small_first_one():
    specs = [spec(str(i), 256) for i in range(6)]  # 1 KiB each
    assert names(assign_buckets(specs, cap_bytes=2048, first_cap_bytes=1024)) == [
        ["0"],
        ["1", "2"],
        ["3", "4"],
        ["5"],
    ]


def test_the_tensor_that_reaches_the_cap_closes_the_bucket():
    specs = [spec("a", 8), spec("large", 4096), spec("b", 8)]
    assert names(assign_buckets(specs, cap_bytes=64, first_cap_bytes=64)) == [
        ["a", "large"],
        ["b"],
    ]


def test_dtypes_and_partitions_do_not_mix_and_start_when_complete():
    specs = [
        spec("a", 8),
        spec("half", 8, dtype=torch.bfloat16),
        spec("whole", 8, 8, partition="matrix"),
        spec("b", 8),
    ]
    # a's bucket is complete with b only, so it comes last.
    assert names(assign_buckets(specs, cap_bytes=1024, first_cap_bytes=1024)) == [
        ["half"],
        ["whole"],
        ["a", "b"],
    ]


def test_flat_pieces_are_equal_and_cut_through_tensors_at_whole_blocks():
    bucket = lay_out([spec("a", 300, partition="flat"), spec("b", 1000, partition="flat")], 4, {})
    assert [(s.start, s.stop) for s in bucket.slots] == [(0, 300), (512, 1512)]
    assert bucket.bounds == (0, 512, 1024, 1536, 2048)
    assert is_even(bucket.bounds)
    assert [(s.name, s.start, s.stop) for s in bucket.segments(1)] == [("b", 0, 512)]
    assert [(s.name, s.start, s.stop) for s in bucket.segments(2)] == [("b", 512, 1000)]
    assert bucket.segments(3) == ()


def test_matrix_pieces_hold_whole_tensors_of_their_owner():
    specs = [spec(n, 16, 16, partition="matrix") for n in "abc"]
    bucket = lay_out(specs, 3, {"a": 2, "b": 0, "c": 2})
    assert [s.name for s in bucket.slots] == ["b", "a", "c"]
    assert bucket.bounds == (0, 256, 256, 768)
    assert not is_even(bucket.bounds)
    assert [s.name for s in bucket.segments(2)] == ["a", "c"]


def test_balance_of_a_transformers_matrices():
    costs = {f"{i}.{n}": c for i in range(16) for n, c in (("qkv", 3), ("o", 1), ("up", 5.4))}
    for world_size in (2, 4, 8):
        owners = balance(costs, world_size)
        loads = [
            sum(costs[n] for n, r in owners.items() if r == rank) for rank in range(world_size)
        ]
        assert max(loads) < 1.05 * sum(loads) / world_size


@st.composite
def random_specs(draw):
    count = draw(st.integers(1, 12))
    return [
        TensorSpec(
            name=f"t{i}",
            shape=tuple(draw(st.lists(st.integers(0, 40), max_size=3))),
            dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
            partition=draw(st.sampled_from(["replicated", "flat", "matrix"])),
        )
        for i in range(count)
    ]


@settings(max_examples=60, deadline=None)
@given(random_specs(), st.integers(1, 9), st.integers(1, 20000), st.integers(1, 20000))
def test_every_element_has_one_place_and_one_owner(specs, world_size, cap, first_cap):
    buckets = plan_buckets(specs, world_size, cap_bytes=cap, first_cap_bytes=first_cap)
    by_name = {s.name: s for s in specs}
    placed = [slot.name for bucket in buckets for slot in bucket.slots]
    assert sorted(placed) == sorted(by_name)
    owned = dict.fromkeys(by_name, 0)
    for bucket in buckets:
        end = 0
        for slot in bucket.slots:
            one = by_name[slot.name]
            assert slot.start >= end
            assert slot.start % ALIGNMENT == 0
            assert (slot.stop - slot.start, bucket.dtype, bucket.partition) == (
                one.numel,
                one.dtype,
                one.partition,
            )
            end = slot.stop
        assert end <= bucket.numel
        assert len(bucket.bounds) == world_size + 1
        assert all(bound % ALIGNMENT == 0 for bound in bucket.bounds)
        assert list(bucket.bounds) == sorted(bucket.bounds)
        for rank in range(world_size):
            for segment in bucket.segments(rank):
                owned[segment.name] += segment.stop - segment.start
                if bucket.partition == "matrix":
                    assert segment.stop - segment.start == by_name[segment.name].numel
    assert owned == {name: one.numel for name, one in by_name.items()}


def test_padding_of_a_large_model_is_small():
    specs = [spec(f"w{i}", 4096, 1536, partition="flat") for i in range(64)]
    buckets = plan_buckets(specs, 8, cap_bytes=25 * 2**20, first_cap_bytes=2**20)
    assert sum(b.numel for b in buckets) < 1.001 * sum(s.numel for s in specs)


def test_fingerprint_tells_layouts_apart():
    specs = [spec("a", 300), spec("b", 10)]
    one = plan_buckets(specs, 2, cap_bytes=4096, first_cap_bytes=4096)
    same = plan_buckets(list(specs), 2, cap_bytes=4096, first_cap_bytes=4096)
    other = plan_buckets(specs, 2, cap_bytes=4096, first_cap_bytes=64)
    assert fingerprint(specs, one) == fingerprint(specs, same)
    assert fingerprint(specs, one) != fingerprint(specs, other)
    assert fingerprint(specs, one) != fingerprint(specs[::-1], one)


@pytest.mark.parametrize(("cap", "world_size"), [(0, 1), (64, 0)])
def test_impossible_values_are_refused(cap, world_size):
    with pytest.raises(ValueError, match="must be"):
        plan_buckets([spec("a", 1)], world_size, cap_bytes=cap, first_cap_bytes=64)
