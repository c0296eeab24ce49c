"""Pretraining, fine-tuning and preferences from one command each, on a laptop or on a GPU.

`train-pretrain` with no argument trains a small model on the Python standard library, `train-sft`
teaches it to answer, `train-dpo` to prefer the better of two answers. A script makes a
`PretrainConfig` and hands it to `tilewright_train.pretraining.run`; that module is not imported
here, because it imports torch.
"""

from tilewright_train.config import (
    DataOptions,
    DpoOptions,
    MachineOptions,
    ModelOptions,
    PretrainConfig,
    RunOptions,
    TrainingOptions,
)
from tilewright_train.errors import InputError, TrainingStopped

__all__ = [
    "DataOptions",
    "DpoOptions",
    "InputError",
    "MachineOptions",
    "ModelOptions",
    "PretrainConfig",
    "RunOptions",
    "TrainingOptions",
    "TrainingStopped",
]
