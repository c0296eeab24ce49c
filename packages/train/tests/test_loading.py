"""Batches ahead of time: the same ones, whoever reads them, and the waiting is counted."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from tilewright_train.batches import Batch, BatchSampler, WindowRows
from tilewright_train.loading import BatchLoader, LoadingOptions, choose_workers
from tilewright_train.samples import Samples

CPU = torch.device("cpu")
SAMPLES = Samples(torch.arange(500, dtype=torch.int32), torch.arange(20, 501, 20))
ROWS = WindowRows(SAMPLES, seq_len=9, seed=0, document_mask=True)
SAMPLER = BatchSampler(ROWS, batch_size=4)


class _Slow(BatchSampler):
    """A sampler that takes 20 ms a batch."""

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        time.sleep(0.02)
        return super().batch(step, part, parts)


def assert_same(batch: Batch, expected: Batch) -> None:
    for name, tensor in expected.inputs.items():
        assert torch.equal(torch.as_tensor(batch.inputs[name]).cpu(), torch.as_tensor(tensor)), name


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


def test_a_signal_to_all_processes_ends_no_worker() -> None:
    loader = BatchLoader(SAMPLER, range(40), CPU, LoadingOptions(workers=2, prefetch=1))
    next(loader)
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal_number)
    time.sleep(0.1)
    assert sum(1 for _ in loader) == 39
    workers = multiprocessing.active_children()
    loader.close()
    for worker in workers:
        worker.join(timeout=10)
        assert worker.exitcode == 0


@pytest.mark.gpu
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
