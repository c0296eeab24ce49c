"""A small model with what makes sharding hard, and its training, for tests.

Tied and frozen parameters, a memory order of its own, sizes that no bound between ranks fits. Here
rather than beside the tests, which are loaded by path and cannot import their neighbours.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tilewright_dist.sharded_optimizer import ShardedOptimizer

WIDTH, ROWS = 24, 4  # 24·24 elements: no multiple of the 256 at which pieces are cut


class Block(nn.Module):
    """Norm and two matrices, beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The result, [ROWS, WIDTH]."""
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Stack(nn.Module):
    """A tied head, a frozen layer, an image kernel in channels_last, blocks; always the same."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.image = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)  # pyrefly: ignore
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The result, [ROWS, WIDTH]."""
        x = self.frozen(self.embed(x))
        x = x + self.image(x.view(ROWS, 2, 3, 4)).mean()
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Wrapped(nn.Module):
    """A module as `.module`, as the wrapper has it, without ranks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The result, [ROWS, WIDTH]."""
        return self.module(x)


def device_of(rank: int) -> torch.device:
    """The GPU of this rank's number under NCCL."""
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", rank) if on_gpu else torch.device("cpu")


def rows_of(rank: int, step: int) -> torch.Tensor:
    """[ROWS, WIDTH] on the CPU, of a rank's own at every step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(ROWS, WIDTH, generator=generator)


def adamw_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Decay for matrices only, so that a bucket holds parameters of both groups."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """What Muon may have."""
    return [p for p in model.parameters() if p.ndim == 2 and p.requires_grad]


def train(
    wrapper: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int,
    first: int = 0,
    steps: int = 3,
) -> torch.Tensor:
    """Take steps under a schedule, from a number on; the weights afterwards."""
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(first, first + steps):
        rows = rows_of(rank, step).to(next(wrapper.parameters()).device)
        wrapper(rows).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    module: Any = wrapper.module
    return weights_of(module, optimizer)


def weights_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """All parameters in one float32 tensor on the CPU."""
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.wait_for_parameters()
    return torch.cat([p.detach().float().reshape(-1).cpu() for p in model.parameters()])
