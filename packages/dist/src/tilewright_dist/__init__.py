"""Data parallelism on torch.distributed: one replica of a module a rank, gradients averaged."""

from tilewright_dist.data_parallel import DistributedDataParallel
from tilewright_dist.environment import DistributedEnvironment, init_from_environment
from tilewright_dist.failure import (
    DivergenceError,
    NonFiniteGradientError,
    RankFailure,
    verify_replicas,
)
from tilewright_dist.sharded_optimizer import ShardedOptimizer
from tilewright_dist.wrap import wrap

__all__ = [
    "DistributedDataParallel",
    "DistributedEnvironment",
    "DivergenceError",
    "NonFiniteGradientError",
    "RankFailure",
    "ShardedOptimizer",
    "init_from_environment",
    "verify_replicas",
    "wrap",
]
