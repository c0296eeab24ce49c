"""Data parallelism on torch.distributed: equal replicas, averaged gradients, divided states."""

from tilewright_dist.data_parallel import DistributedDataParallel
from tilewright_dist.environment import DistributedEnvironment, init_from_environment
from tilewright_dist.failure import (
    DivergenceError,
    NonFiniteGradientError,
    RankFailure,
    verify_replicas,
)
from tilewright_dist.fully_sharded import (
    FullyShardedOptimizer,
    gather_state_dict,
    load_whole_state_dict,
)
from tilewright_dist.planning import Cluster, Layer, Link, Prediction, Workload, plan
from tilewright_dist.sharded_optimizer import ShardedOptimizer
from tilewright_dist.wrap import shard_fully, wrap

__all__ = [
    "Cluster",
    "DistributedDataParallel",
    "DistributedEnvironment",
    "DivergenceError",
    "FullyShardedOptimizer",
    "Layer",
    "Link",
    "NonFiniteGradientError",
    "Prediction",
    "RankFailure",
    "ShardedOptimizer",
    "Workload",
    "gather_state_dict",
    "init_from_environment",
    "load_whole_state_dict",
    "plan",
    "shard_fully",
    "verify_replicas",
    "wrap",
]
