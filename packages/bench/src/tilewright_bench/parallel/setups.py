"""The ways of training the decoder on several ranks: ours, torch's, and without communication."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import MixedPrecisionPolicy

from tilewright_dist import DistributedDataParallel, ShardedOptimizer, wrap
from tilewright_optim import Muon

LR = 1e-4

COLLECTIVE: dict[str, Any] = {"transport": "collective"}
COPY: dict[str, Any] = {"transport": "copy"}

Made = tuple[nn.Module, torch.optim.Optimizer]
Make = Callable[[nn.Module], Made]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One way of training.

    Attributes:
        name: In results.
        make: Wraps a module on its device and builds the optimizer of its parameters.
        transport: "copy" where GPUs have to read each other's memory.
        peer: Whether it is torch's.
    """

    name: str
    make: Make = field(repr=False)
    transport: str = "collective"
    peer: bool = False


def alone(module: nn.Module) -> Made:
    """Computation without any communication."""
    return module, _adamw(module)


def torchs(*, bf16: bool = False, zero: bool = False, **options: Any) -> Make:
    """torch's DistributedDataParallel, its gradients views of the buckets."""

    def make(module: nn.Module) -> Made:
        device = next(module.parameters()).device
        wrapper = nn.parallel.DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **options,
        )
        if bf16:
            wrapper.register_comm_hook(None, bf16_compress_hook)
        if not zero:
            return wrapper, _adamw(module)
        # Here, as its package warns when it is imported.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return wrapper, ZeroRedundancyOptimizer(
            module.parameters(),
            torch.optim.AdamW,
            lr=LR,
            fused=True,
            parameters_as_bucket_view=True,
        )

    return make


def ours(**options: Any) -> Make:
    """Our DistributedDataParallel."""
    chosen = COLLECTIVE | options
    return lambda module: (DistributedDataParallel(module, **chosen), _adamw(module))


def sharded(**options: Any) -> Make:
    """The same, its states divided."""
    chosen = COLLECTIVE | options

    def make(module: nn.Module) -> Made:
        wrapper = DistributedDataParallel(module, **chosen)
        return wrapper, ShardedOptimizer(
            module.parameters(), torch.optim.AdamW, ddp=wrapper, lr=LR, fused=True
        )

    return make


def fsdp(*, alone: bool = False) -> Make:
    """torch's fully_shard: bfloat16 weights are gathered block by block, all else is divided."""

    def make(module: nn.Module) -> Made:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        group: Any = dist.group.WORLD
        if alone:
            # Each rank among itself: the same computation, and nothing to send.
            groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
            group = groups[dist.get_rank()]
        return wrap(module, _adamw, parallel="fsdp", process_group=group, mp_policy=policy)

    return make


def muon(*, shard: bool, **options: Any) -> Make:
    """Muon for the blocks' matrices; nothing else is updated."""
    chosen = COLLECTIVE | options

    def make(module: nn.Module) -> Made:
        wrapper = DistributedDataParallel(module, **chosen)
        matrices = [p for n, p in module.named_parameters() if p.ndim == 2 and "embed" not in n]
        if shard:
            return wrapper, ShardedOptimizer(matrices, Muon, ddp=wrapper, lr=LR)
        return wrapper, Muon(matrices, lr=LR)

    return make


def _adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=LR, fused=True)


ALONE = Setup(name="alone", make=alone)
TORCH = (
    Setup(name="torch", make=torchs(), peer=True),
    Setup(name="torch static", make=torchs(static_graph=True), peer=True),
    Setup(name="torch 100 MB", make=torchs(bucket_cap_mb=100), peer=True),
)
BF16: dict[str, Any] = {"reduce_dtype": torch.bfloat16}

LADDER = (
    Setup(name="naive", make=ours(strategy="naive")),
    Setup(name="per_parameter", make=ours(strategy="per_parameter")),
)
BUCKETED = (
    Setup(name="bucketed", make=ours()),
    Setup(name="bucketed 100 MB", make=ours(bucket_cap_mb=100)),
    Setup(name="bucketed copy", make=ours(**COPY), transport="copy"),
    Setup(name="bucketed copy 50 MB", make=ours(**COPY, bucket_cap_mb=50), transport="copy"),
    Setup(name="bucketed copy 100 MB", make=ours(**COPY, bucket_cap_mb=100), transport="copy"),
)
HALF = (
    Setup(name="torch bf16", make=torchs(bf16=True), peer=True),
    Setup(name="bucketed bf16", make=ours(**BF16)),
    Setup(name="bucketed copy bf16", make=ours(**BF16, **COPY), transport="copy"),
    Setup(
        name="bucketed copy bf16 100 MB",
        make=ours(**BF16, **COPY, bucket_cap_mb=100),
        transport="copy",
    ),
)
ZERO = (
    Setup(name="torch zero", make=torchs(zero=True), peer=True),
    Setup(name="zero1", make=sharded()),
    Setup(name="zero1 copy", make=sharded(**COPY), transport="copy"),
    Setup(name="zero1 copy 100 MB", make=sharded(**COPY, bucket_cap_mb=100), transport="copy"),
)
MUON = (
    Setup(name="muon", make=muon(shard=False)),
    Setup(name="zero1 muon", make=muon(shard=True)),
    Setup(name="zero1 copy muon", make=muon(shard=True, **COPY), transport="copy"),
)

FSDP = (
    Setup(name="fsdp alone", make=fsdp(alone=True), peer=True),
    Setup(name="fsdp", make=fsdp(), peer=True),
)

_ALL = (ALONE, *TORCH, LADDER[1], *BUCKETED, *HALF, *ZERO)

PARTS: dict[str, tuple[bool, tuple[Setup, ...]]] = {
    "eager": (False, _ALL),
    "compiled": (True, _ALL),
    "ladder": (False, (*LADDER, BUCKETED[0], *FSDP)),
    "muon": (False, MUON),
}
"""What is timed in turn, and whether blocks are compiled."""

TRACED: dict[str, tuple[bool, tuple[Setup, ...]]] = {
    "eager": (False, (ALONE, *LADDER, *BUCKETED[:3], *ZERO[1:3])),
    "compiled": (True, (ALONE, TORCH[0], *BUCKETED[:3], *ZERO[1:3])),
}
"""What a profiler looks at, by part; afterwards, as its hooks stay in the process."""
