"""The note's layer with its experts on two processes, beside the layer on one."""

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tilewright_dist.testing import run_ranks
from tilewright_kernels import moe_mlp, moe_route

NOTE = Path(__file__).parents[1] / "docs" / "notes" / "moe.md"
RANKS, TOKENS, HIDDEN, WIDTH, EXPERTS, K = 2, 20, 16, 10, 8, 3


def expert_parallel(*args):
    """The function as the page shows it."""
    blocks = re.findall(r"^```python\n(.*?)^```", NOTE.read_text(), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "def expert_parallel" in block]
    namespace: dict[str, Any] = {"torch": torch}
    exec(compile(block, str(NOTE), "exec"), namespace)
    return namespace["expert_parallel"](*args)


def inputs():
    torch.manual_seed(0)
    x, dy = torch.randn(2, RANKS * TOKENS, HIDDEN)
    logits = torch.randn(RANKS * TOKENS, EXPERTS) * 2
    w_gate_up, w_down = (
        torch.randn(EXPERTS, 2 * WIDTH, HIDDEN),
        torch.randn(EXPERTS, HIDDEN, WIDTH),
    )
    return [t.requires_grad_() for t in (x, logits, w_gate_up, w_down)], dy


def on_a_rank(rank):
    (x, logits, w_gate_up, w_down), dy = inputs()
    tokens = slice(rank * TOKENS, (rank + 1) * TOKENS)
    experts = slice(rank * EXPERTS // RANKS, (rank + 1) * EXPERTS // RANKS)
    mine = [t.detach()[s].requires_grad_() for t, s in (
        (x, tokens), (logits, tokens), (w_gate_up, experts), (w_down, experts)
    )]  # fmt: skip
    x, logits, w_gate_up, w_down = mine
    y = expert_parallel(x, moe_route(logits, K), w_gate_up, w_down, dist.group.WORLD)
    return [y.detach(), *torch.autograd.grad(y, mine, dy[tokens])]


def test_two_processes_are_as_one():
    given, dy = inputs()
    x, logits, w_gate_up, w_down = given
    y = moe_mlp(x, w_gate_up, w_down, moe_route(logits, K))
    alone = [y.detach(), *torch.autograd.grad(y, given, dy)]
    together = [torch.cat(parts) for parts in zip(*run_ranks(on_a_rank), strict=True)]
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, expected)
