"""Batches ahead of time: the same ones, whoever reads them, and the waiting is counted."""

import time

import pytest
import torch

from tilewright_train.batches import Batch, BatchSampler, WindowRows
from tilewright_train.loading import BatchLoader, LoadingOptions, choose_workers

CPU = torch.device("cpu")
ROWS = WindowRows(torch.arange(500, dtype=torch.int32), seq_len=9, seed=0, separator=7)
SAMPLER = BatchSampler(ROWS, batch_size=4)


class _Slow(BatchSampler):
    """A sampler that takes 20 ms a batch."""

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        time.sleep(0.02)
        return super().batch(step, part, parts)


def assert_same(batch: Batch, expected: Batch) -> None:
    for name, tensor in expected.inputs.items():
        assert torch.equal(torch.as_tensor(batch.inputs[name]).cpu(), torch.as_tensor(tensor)), name


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_from_any_step_on(workers: int) -> None:
    loader = BatchLoader(SAMPLER, range(3, 9), CPU, LoadingOptions(workers=workers), parts=2)
    batches = list(loader)
    assert len(batches) == 12
    for number, batch in enumerate(batches):
        assert_same(batch, SAMPLER.batch(3 + number // 2, number % 2, 2))
    loader.close()


def test_waiting_is_counted() -> None:
    loader = BatchLoader(_Slow(ROWS, batch_size=4), range(4), CPU, LoadingOptions())
    next(loader)
    next(loader)
    assert 0.04 <= loader.take_waited() < 2
    assert loader.take_waited() == 0
    time.sleep(0.05)
    assert loader.take_waited() == 0  # only `next` waits


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_read_while_the_step_computes() -> None:
    loader = BatchLoader(
        _Slow(ROWS, batch_size=4), range(8), CPU, LoadingOptions(workers=1, prefetch=4)
    )
    next(loader)
    time.sleep(0.5)  # the step; meanwhile four batches are made
    loader.take_waited()
    next(loader)
    assert loader.take_waited() < 0.02
    loader.close()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pin_memory", [False, True])
def test_on_a_gpu_they_arrive_whole(workers: int, pin_memory: bool) -> None:
    options = LoadingOptions(workers=workers, pin_memory=pin_memory)
    loader = BatchLoader(SAMPLER, range(6), torch.device("cuda"), options)
    for step, batch in enumerate(loader):
        assert batch.input_ids.is_cuda
        assert_same(batch, SAMPLER.batch(step))
    loader.close()


def test_workers_are_chosen_where_there_are_cores_for_them() -> None:
    assert choose_workers("cpu", 64)[0] == 0
    assert choose_workers("cuda", 2)[0] == 0
    assert choose_workers("cuda:1", 16)[0] == 2
