"""Batches for the driver: what is handed to it, by a stand-in on the CPU, and what a GPU makes of
them."""

import ctypes

import pytest
import torch

from tilewright_dist import stream_operations
from tilewright_dist.stream_operations import BatchedCopies, Copies, Piece, Signals


def values_and_pieces(device="cpu", dtype=torch.float32):
    """Two values, and parts of them that have places in memory with gaps."""
    values = [torch.arange(n * k, n * k + n, device=device).to(dtype) for k, n in ((2, 40), (3, 9))]
    memory = torch.zeros(60, device=device, dtype=dtype)
    pieces = [
        Piece(0, 3, 20, memory, 10),
        Piece(1, 2, 4, memory, 1),
        Piece(0, 23, 5, memory, 55),
    ]
    return values, memory, pieces


def check(copies, values, memory, pieces):
    """What is sent is at its places, what is fetched in its values; nothing else is touched."""
    expected = memory.clone()
    for value, begin, numel, _, at in pieces:
        expected[at : at + numel] = values[value][begin : begin + numel]
    copies.send(values)
    assert torch.equal(memory, expected)
    memory += 100
    others = [value.view(-1, 1).clone() for value in values]  # elsewhere, in another shape
    for value, begin, numel, _, at in pieces:
        values[value][begin : begin + numel] = memory[at : at + numel]
    copies.fetch(others)
    for other, value in zip(others, values, strict=True):
        assert torch.equal(other.view(-1), value)


def test_one_by_one():
    values, memory, pieces = values_and_pieces()
    check(Copies(pieces), values, memory, pieces)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_is_one_call_with_addresses_in_bytes(monkeypatch, dtype):
    calls = []

    def driver(targets, sources, sizes, count, attributes, firsts, number, stream):
        calls.append((stream, count, number, list(firsts), list(attributes)))
        for target, source, size in zip(targets, sources, sizes, strict=True):
            ctypes.memmove(target, source, size)
        return 0

    monkeypatch.setattr(stream_operations, "_batched_copies", lambda: driver)
    values, memory, pieces = values_and_pieces(dtype=dtype)
    check(BatchedCopies(pieces, lambda: 123), values, memory, pieces)
    # Read in stream order; to be carried out beside kernels.
    assert calls == [(123, 3, 1, [0], [1, 0, 0, 0, 0, 1])] * 2


@pytest.mark.parametrize(
    ("driver", "stream"),
    [(None, 123), (lambda *_: 801, 123), (lambda *_: pytest.fail("asked"), 0)],
    ids=["older driver", "error", "legacy default stream"],
)
def test_what_the_driver_does_not_take_goes_one_by_one(monkeypatch, driver, stream):
    monkeypatch.setattr(stream_operations, "_batched_copies", lambda: driver)
    values, memory, pieces = values_and_pieces()
    check(BatchedCopies(pieces, lambda: stream), values, memory, pieces)


def test_nothing_to_copy(monkeypatch):
    monkeypatch.setattr(stream_operations, "_batched_copies", lambda: pytest.fail)
    BatchedCopies([], lambda: 123).send([torch.zeros(3)])


FIELDS = ((0, 4), (8, 16), (16, 24))


def test_signals_are_written_before_others_are_awaited(monkeypatch):
    calls = []

    def driver(stream, count, operations, flags):
        # Offsets of CUstreamBatchMemOpParams, 48 bytes each.
        raw = bytes(operations)
        numbers = [raw[at : at + 48] for at in range(0, len(raw), 48)]
        calls.append((stream, count, flags))
        read = int.from_bytes
        for one in numbers:
            kind, address, value = (read(one[a:b], "little") for a, b in FIELDS)
            calls.append((kind, address, value))
            assert read(one[24:28], "little") == 0
        return 0 if stream else 1

    monkeypatch.setattr(stream_operations, "_batched_operations", lambda: driver)
    signals = Signals([1000, 2000], [3000, 3004])
    signals.exchange(2**32 + 5, 7)
    assert calls == [(7, 4, 0), (2, 1000, 5), (2, 2000, 5), (1, 3000, 5), (1, 3004, 5)]
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        signals.exchange(6, 0)


@pytest.mark.gpu
def test_a_gpu_takes_batches_in_stream_order():
    stream = torch.cuda.Stream()
    number = torch.zeros(1, device="cuda", dtype=torch.int32)
    signals = Signals([number.data_ptr()], [number.data_ptr()])
    values, memory, pieces = values_and_pieces("cuda")
    copies = BatchedCopies(pieces, lambda: stream.cuda_stream)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        assert copies._batch(copies._places, copies._parts, values), "the driver takes no batches"
        check(copies, values, memory, pieces)
        signals.exchange(3, stream.cuda_stream)
    stream.synchronize()
    assert number.item() == 3
