"""Batches ahead of time: worker processes read and pack, page-locked memory feeds the GPU.

Steps are handed out by number, so workers change nothing about what is read, and a run that goes on
needs no state of theirs.
"""

import os
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from tilewright_train.batches import Batch, BatchSampler


@dataclass(frozen=True, kw_only=True)
class LoadingOptions:
    """Who reads, and how far ahead."""

    workers: int = 0
    """Processes that read; 0 has the training process read when a batch is due."""
    prefetch: int = 2
    """Batches that each worker has ready."""
    pin_memory: bool = True
    """Copy batches to page-locked memory, from which a GPU fetches while the host goes on."""


class BatchLoader:
    """The batches of steps in order, on the device, and the time that was waited for them."""

    def __init__(
        self,
        sampler: BatchSampler,
        steps: range,
        device: torch.device,
        options: LoadingOptions,
        *,
        parts: int = 1,
    ) -> None:
        """Start the workers, if any.

        Args:
            sampler: Of this process.
            steps: Their numbers.
            device: Where batches are wanted.
            options: Who reads.
            parts: Micro-batches a step; they come one after another.
        """
        self._device = device
        self._pin = options.pin_memory and device.type == "cuda"
        self._loader: DataLoader[Batch] = DataLoader(
            _Parts(sampler, parts),
            batch_size=None,
            sampler=range(steps.start * parts, steps.stop * parts),
            num_workers=options.workers,
            prefetch_factor=options.prefetch if options.workers else None,
            # By fork, a worker starts in milliseconds and shares what is mapped; it touches no GPU.
            multiprocessing_context="fork" if options.workers else None,
            worker_init_fn=_outlive_signals,
            pin_memory=self._pin and options.workers > 0,
            in_order=True,
            # Each pass over a loader draws a seed for its workers: not from the generator of the
            # run, which would be one draw further in a run that was resumed.
            generator=torch.Generator(),
        )
        self._batches: Iterator[Batch] | None = None
        self.waited = 0.0
        """Seconds that `next` has taken since it was last set to 0."""

    def __iter__(self) -> "BatchLoader":
        return self

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        if self._batches is None:
            with warnings.catch_warnings():
                # From 3.12 on, of any fork beside threads; what they might hold, no worker needs.
                warnings.filterwarnings("ignore", ".* is multi-threaded", DeprecationWarning)
                self._batches = iter(self._loader)
        batch = next(self._batches)
        if self._device.type != "cpu":
            if self._pin and not batch.input_ids.is_pinned():
                batch = batch.pin_memory()
            batch = batch.to(self._device, non_blocking=self._pin)
        self.waited += time.perf_counter() - begin
        return batch

    def take_waited(self) -> float:
        """Seconds waited since this was last asked."""
        waited, self.waited = self.waited, 0.0
        return waited

    def close(self) -> None:
        """End the workers; batches that they have ready are dropped."""
        self._batches = None


class _Parts(Dataset[Batch]):
    """Micro-batches by their number, counted through all steps."""

    def __init__(self, sampler: BatchSampler, parts: int) -> None:
        self._sampler = sampler
        self._parts = parts

    def __getitem__(self, index: int) -> Batch:
        step, part = divmod(index, self._parts)
        return self._sampler.batch(step, part, self._parts)


def _outlive_signals(_: int) -> None:
    """Let a worker read on when a signal meant for the run reaches all of its processes.

    The training process finishes its step, saves and ends its workers; a second SIGTERM, which is
    what it ends them with at the latest, they obey.
    """

    def count(*_: object) -> None:
        terminated.append(True)
        if len(terminated) > 1:
            os._exit(0)

    terminated: list[bool] = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, count)


def choose_workers(device: str, cores: int) -> tuple[int, str]:
    """How many workers, and why.

    Args:
        device: Of the run.
        cores: That this process may use.
    """
    if device == "cpu":
        return 0, "the CPU has to train"
    if not hasattr(os, "fork"):
        return 0, "this system cannot fork"
    return (2, "reading is ahead of the GPU") if cores > 2 else (0, f"{cores} cores")
