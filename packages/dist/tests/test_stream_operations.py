"""Batches for the driver: what is handed to it, by a stand-in on the CPU, and what a GPU makes of
them."""

import ctypes

import pytest
import torch

from tilewright_dist import stream_operations
from tilewright_dist.stream_operations import Move, Signals, copy_in_a_batch, copy_one_by_one

pointer = ctypes.POINTER(ctypes.c_uint64)


def moves_and_targets(device="cpu", dtype=torch.float32):
    """Parts of two sources that go to places of two targets, with gaps."""
    sources = [torch.arange(1, n + 1, device=device).to(dtype) for n in (40, 7)]
    targets = [torch.zeros(n, device=device, dtype=dtype) for n in (50, 9)]
    moves = [
        Move(targets[0], 10, sources[0], 3, 20),
        Move(targets[1], 1, sources[0], 23, 4),
        Move(targets[0], 45, sources[1], 2, 5),
    ]
    return moves, targets


def expected_targets(dtype=torch.float32):
    moves, targets = moves_and_targets(dtype=dtype)
    for target, at, source, begin, numel in moves:
        for place in range(numel):
            target[at + place] = source[begin + place]
    return targets


def test_one_by_one():
    moves, targets = moves_and_targets()
    copy_one_by_one(moves)
    for target, expected in zip(targets, expected_targets(), strict=True):
        assert torch.equal(target, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_is_one_call_with_addresses_in_bytes(monkeypatch, dtype):
    calls = []

    def driver(targets, sources, sizes, count, attributes, first, number, stream):
        calls.append((stream, number, ctypes.cast(first, pointer)[0], list(attributes)))
        for target, source, size in zip(targets[:count], sources, sizes, strict=True):
            ctypes.memmove(target, source, size)
        return 0

    # byref() is for C only.
    monkeypatch.setattr(stream_operations.ctypes, "byref", ctypes.pointer)
    monkeypatch.setattr(stream_operations, "_batched_copies", lambda: driver)
    moves, targets = moves_and_targets(dtype=dtype)
    assert copy_in_a_batch(moves, 123)
    # Read in stream order; to be carried out beside kernels.
    assert calls == [(123, 1, 0, [1, 0, 0, 0, 0, 1])]
    for target, expected in zip(targets, expected_targets(dtype), strict=True):
        assert torch.equal(target, expected)


def test_who_takes_no_batch(monkeypatch):
    moves, _ = moves_and_targets()
    monkeypatch.setattr(stream_operations, "_batched_copies", lambda: None)
    assert not copy_in_a_batch(moves, 123)  # an older driver
    monkeypatch.setattr(stream_operations, "_batched_copies", lambda: lambda *_: 801)
    assert not copy_in_a_batch(moves, 123)  # an error: not supported
    monkeypatch.setattr(stream_operations, "_batched_copies", lambda: lambda *_: 0)
    assert copy_in_a_batch(moves, 123)
    assert not copy_in_a_batch(moves, 0)  # the legacy default stream
    assert copy_in_a_batch([], 0)


def test_signals_are_written_before_others_are_awaited(monkeypatch):
    calls = []

    def driver(stream, count, operations, flags):
        # Offsets of CUstreamBatchMemOpParams, 48 bytes each.
        raw = bytes(operations)
        numbers = [raw[at : at + 48] for at in range(0, len(raw), 48)]
        calls.append((stream, count, flags))
        read = int.from_bytes
        for one in numbers:
            calls.append(tuple(read(one[a:b], "little") for a, b in ((0, 4), (8, 16), (16, 24))))
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
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        moves, targets = moves_and_targets("cuda")
        assert copy_in_a_batch(moves, stream.cuda_stream)
        signals.exchange(3, stream.cuda_stream)
        after = [target * 2 for target in targets]
    stream.synchronize()
    assert number.item() == 3
    for target, expected in zip(after, expected_targets(), strict=True):
        assert torch.equal(target.cpu(), expected * 2)
