"""Data parallelism on torch.distributed: equal replicas, averaged gradients, divided states."""

from tilewright_dist.data_parallel import DistributedDataParallel
from tilewright_dist.environment import DistributedEnvironment, init_from_environment
from tilewright_dist.failure import (
    DivergenceError,
    NonFiniteGradientError,
    RankFailure,
    verify_replicas,
)
from tilewright_dist.planning import Cluster, Layer, Link, Prediction, Workload, plan
from tilewright_dist.sharded_optimizer import ShardedOptimizer
from tilewright_dist.wrap import wrap

__all__ = [
    "Cluster",
    "DistributedDataParallel",
    "DistributedEnvironment",
    "DivergenceError",
    "Layer",
    "Link",
    "NonFiniteGradientError",
    "Prediction",
    "RankFailure",
    "ShardedOptimizer",
    "Workload",
    "init_from_environment",
    "plan",
    "verify_replicas",
    "wrap",
]
