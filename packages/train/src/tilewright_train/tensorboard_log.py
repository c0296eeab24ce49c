"""Metrics as TensorBoard's events, where that is installed; metrics.jsonl is always written."""

import dataclasses
from pathlib import Path
from typing import Any

from tilewright_train.errors import InputError
from tilewright_train.metrics import Record

_GROUPS = {
    "loss": "loss/train",
    "val_loss": "loss/validation",
    "lr": "training/lr",
    "grad_norm": "training/grad_norm",
    "skipped_steps": "training/skipped_steps",
    "loss_scale": "training/loss_scale",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "data_seconds": "speed/data_seconds",
    "peak_memory_bytes": "speed/peak_memory_bytes",
}


def check_installed() -> None:
    """Ask for TensorBoard.

    Raises:
        InputError: It is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise InputError(
            "--tensorboard needs the package: pip install 'tilewright-train[tensorboard]', or leave"
            " the flag out"
        ) from error


class TensorBoardLog:
    """Writes one event file.

    Args:
        folder: Takes the file.
        first: Step behind which the run goes on: later events of an earlier start are hidden.

    Raises:
        InputError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, first: int = 0) -> None:
        check_installed()
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=first + 1 if first else None)

    def write(self, record: Record) -> None:
        """One step's numbers, each under its tag; those that are not known are left out."""
        for tag, value in scalars(record).items():
            self._writer.add_scalar(tag, value, record.step, walltime=None)

    def close(self) -> None:
        """Flush and let go of the file."""
        self._writer.close()


def scalars(record: Record) -> dict[str, float]:
    """What a record tells, by tag."""
    values: dict[str, Any] = dataclasses.asdict(record)
    known = {tag: values[name] for name, tag in _GROUPS.items() if values[name] is not None}
    own = {
        (f"validation/{name.removeprefix('val_')}" if name.startswith("val_") else name): value
        for name, value in record.metrics.items()
    }
    return {tag: float(value) for tag, value in {**known, **own}.items()}
