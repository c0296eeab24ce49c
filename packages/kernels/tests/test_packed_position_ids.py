"""packed_position_ids against counting by hand, with empty sequences, one sequence and padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright_kernels import packed_position_ids, packed_position_ids_reference, use_backend
from tilewright_kernels.testing import (
    check_deterministic,
    count_launches,
    no_synchronization,
    poisoned_memory,
)


@pytest.fixture(autouse=True)
def kernels():
    with use_backend("triton"):
        yield


@pytest.mark.smoke
def test_each_sequence_counts_from_zero(device):
    # An empty sequence in the middle, and two tokens of padding.
    cu_seqlens = torch.tensor([0, 3, 3, 7], device=device)
    with use_backend("auto"):
        ours = packed_position_ids(cu_seqlens, 9)
    assert ours.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 300), max_size=20),
    padding=st.integers(0, 3),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_is_counting(lengths, padding, dtype):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cu_seqlens = torch.tensor([0, *lengths], dtype=dtype, device=device).cumsum(0, dtype=dtype)
    counted = [n for length in (*lengths, padding) for n in range(length)]
    with poisoned_memory(), count_launches() as launches:
        ours = packed_position_ids(cu_seqlens, len(counted))
    assert ours.dtype == dtype
    assert ours.tolist() == counted
    assert launches["packed_position_ids"] == (len(counted) > 0)
    assert torch.equal(ours, packed_position_ids_reference(cu_seqlens, len(counted)))


def test_strided_entries(device):
    cu_seqlens = torch.tensor([0, -1, 2, -1, 5, -1], device=device)[::2]
    assert packed_position_ids(cu_seqlens, 5).tolist() == [0, 1, 0, 1, 2]


def test_opcheck_and_compiles(device):
    cu_seqlens = torch.tensor([0, 3, 7], device=device)
    torch.library.opcheck(torch.ops.tilewright.packed_position_ids_forward.default, (cu_seqlens, 7))
    compiled = torch.compile(packed_position_ids, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(cu_seqlens, 7), packed_position_ids(cu_seqlens, 7))


def test_bits_repeat(device):
    cu_seqlens = torch.tensor([0, 3, 700], device=device)
    check_deterministic(lambda: [packed_position_ids(cu_seqlens, 1000)])


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    cu_seqlens = torch.tensor([0, 3, 7], device="cuda")
    with no_synchronization():
        packed_position_ids(cu_seqlens, 7)


def test_bad_input(device):
    entries = torch.tensor([0, 3], device=device)
    with pytest.raises(TypeError, match=r"cu_seqlens is torch.float32.*long\(\)"):
        packed_position_ids(entries.float(), 3)
    for bad in (entries[None], entries[:0]):
        with pytest.raises(ValueError, match=r"cu_seqlens has shape .*must be \[S \+ 1\]"):
            packed_position_ids(bad, 3)
    for bad in (-1, 2**31):
        with pytest.raises(ValueError, match=f"num_tokens is {bad}; give 0 or more"):
            packed_position_ids(entries, bad)
