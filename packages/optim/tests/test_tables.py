"""Chunk lists, and which tables are sent anew."""

import pytest
import torch

from tilewright_optim._tables import PointerTables, chunk_list


def unpack(chunks):
    return [(c >> 32, c & 0xFFFFFFFF) for c in chunks.tolist()]


def test_chunk_list():
    assert unpack(chunk_list([1, 0, 5, 4], 2)) == [(0, 0), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1)]
    assert unpack(chunk_list([0, 0], 2)) == []


def test_chunk_list_of_a_tensor_past_two_to_the_31():
    chunks = chunk_list([3, 2**32 + 1], 2**20)
    assert len(chunks) == 1 + 2**12 + 1
    assert unpack(chunks[-1:]) == [(1, 2**12)]


def test_layout(device):
    tables = PointerTables(device, 16).get([[7, 8], [9, 10]], [17, 3], [5, 6])
    assert tables.work.tolist() == [7, 8, 9, 10, 17, 3, 0, 1, 1 << 32]
    assert tables.grads.tolist() == [5, 6]
    assert tables.num_chunks == 3
    assert tables.work.device.type == device.type


@pytest.mark.parametrize(
    ("columns", "sizes", "grads", "work_stays", "grads_stay"),
    [
        ([[7, 8]], [17, 3], [5, 6], True, True),
        ([[7, 8]], [17, 3], [5, 9], True, False),  # a gradient moved
        ([[7, 1]], [17, 3], [5, 6], False, True),  # a parameter moved
        ([[7, 8]], [17, 4], [5, 6], False, True),  # other size at the same addresses
        ([[7]], [17], [5], False, False),  # one parameter has no gradient this time
        ([[7, 8], [1, 2]], [17, 3], [5, 6], False, True),  # one more column
    ],
)
def test_only_what_changed_is_sent(columns, sizes, grads, work_stays, grads_stay, device):
    maker = PointerTables(device, 16)
    first = maker.get([[7, 8]], [17, 3], [5, 6])
    kept = [t.clone() for t in first[:2]]
    second = maker.get(columns, sizes, grads)
    assert (second.work is first.work) == work_stays
    assert (second.grads is first.grads) == grads_stay
    # A launch that is still under way reads the first ones.
    assert all(torch.equal(a, b) for a, b in zip(first[:2], kept, strict=True))


@pytest.mark.gpu
def test_tables_sent_in_a_capture_are_not_used_outside():
    maker = PointerTables(torch.device("cuda", torch.cuda.current_device()), 16)
    before = maker.get([[7, 8]], [17, 3], [5, 6])
    seen = torch.zeros(2, dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = maker.get([[7, 8]], [17, 3], [1, 2])
        seen.copy_(captured.grads)
    assert captured.work is before.work
    after = maker.get([[7, 8]], [17, 3], [1, 2])
    assert after.grads.tolist() == [1, 2]
    assert maker.get([[7, 8]], [17, 3], [3, 4]).grads.tolist() == [3, 4]
    graph.replay()
    assert seen.tolist() == [1, 2]
