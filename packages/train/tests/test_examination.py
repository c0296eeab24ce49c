"""What broke a step is found again by two processes, which compute it as the step does (gloo)."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tilewright_dist import DistributedEnvironment
from tilewright_dist.testing import run_ranks
from tilewright_model import CausalLM, ModelConfig
from tilewright_optim import AdamW
from tilewright_train.batches import Batch
from tilewright_train.examination import examine
from tilewright_train.guilty import LeftOut
from tilewright_train.objectives import NextToken
from tilewright_train.replicas import replicate

Parallel = Literal["ddp", "zero1", "fsdp"]
CONFIG = ModelConfig(
    vocab_size=21,
    hidden_size=20,
    num_hidden_layers=1,
    num_attention_heads=5,
    num_key_value_heads=5,
    intermediate_size=24,
    max_position_embeddings=16,
)
ITEMS = 14  # seven of each process


class Magnified(torch.autograd.Function):
    """Passes on what it gets; its gradient is `root` times `root` as large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, root: float) -> Tensor:
        ctx.root = root
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.root * ctx.root, None  # the product is no float32


def almost(model: CausalLM, ids: Tensor) -> float:
    """With which `root` the largest gradient of the embedding of `ids` is 3/4 of the most."""
    outputs: list[Tensor] = []
    handle = model.embed_tokens.register_forward_hook(lambda m, i, output: outputs.append(output))
    loss = model(ids, labels=ids, num_items=ITEMS).loss
    handle.remove()
    assert loss is not None
    (gradient,) = torch.autograd.grad(loss, outputs)
    return (0.75 * torch.finfo(torch.float32).max / gradient.abs().max().item()) ** 0.5


def examined(rank: int, parallel: Parallel, folder: str) -> str:
    """A gradient of rank 1 overflows in a step, where a process's loss counts twice."""
    world = dist.get_world_size()
    here = DistributedEnvironment(
        device=torch.device("cpu"), rank=rank, world_size=world, distributed=True
    )
    torch.manual_seed(0)
    model = CausalLM(CONFIG)
    ids = torch.arange(8 * rank, 8 * rank + 8).view(1, 8)  # each token once
    root = almost(model, ids)
    module, optimizer = replicate(
        model,
        lambda _: AdamW(model.parameters(), 0.01),
        parallel=parallel,
        precision="fp32",
        environment=here,
        max_grad_norm=1.0,
    )
    if rank == 1:
        model.embed_tokens.register_forward_hook(lambda m, i, out: Magnified.apply(out, root))
    batch = Batch(input_ids=ids, labels=ids, targets=7, tokens=8)
    prepared: Any = SimpleNamespace(
        sampler=SimpleNamespace(
            parts=lambda _: 1, batch=lambda *_: batch, targets=lambda _: ITEMS
        ),
        trainee=SimpleNamespace(
            model=model, called=model, module=module, optimizer=optimizer,
            guard=SimpleNamespace(scaled=lambda loss: loss),
        ),
        objective=NextToken(),
        run=SimpleNamespace(left_out=Path(folder)),
    )  # fmt: skip
    chosen: Any = SimpleNamespace(settled=SimpleNamespace(micro_batch_size=1))
    left_out = LeftOut(3, "not finite", 3.0, float("inf"), 1e-3, 1, 1.0, 1.5)
    told = examine(left_out, chosen, prepared, here, torch.autocast("cpu", enabled=False))
    gradients: Any = [p.grad for p in model.parameters()]
    assert gradients == [None] * len(gradients)
    return told


@pytest.mark.parametrize("parallel", get_args(Parallel))
def test_a_gradient_that_overflows_only_in_the_step_is_named(
    parallel: Parallel, tmp_path: Path
) -> None:
    first, second = run_ranks(examined, parallel, str(tmp_path), timeout=200)
    assert first == second
    # Under FSDP it is an average by then, and the first process with a row of it tells.
    process = 0 if parallel == "fsdp" else 1
    assert f"not finite: gradient of embed_tokens.weight; process {process}, batch kept" in first
