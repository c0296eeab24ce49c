"""Data parallelism on torch.distributed: one replica of a module a rank, gradients averaged."""

from tilewright_dist.data_parallel import DistributedDataParallel
from tilewright_dist.environment import DistributedEnvironment, init_from_environment

__all__ = [
    "DistributedDataParallel",
    "DistributedEnvironment",
    "init_from_environment",
]
