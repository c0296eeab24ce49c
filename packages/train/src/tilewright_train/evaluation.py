"""The validation loss, and a sample of what the model writes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import nn

from tilewright_dist import DistributedEnvironment
from tilewright_model import CausalLM, generate
from tilewright_train.batches import Batch
from tilewright_train.data import ValidationRows
from tilewright_train.objectives import Objective
from tilewright_train.replicas import is_fully_sharded
from tilewright_train.tokenizer import decode, end_token


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout and without the losses of routers, and as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@dataclass(frozen=True)
class Validation:
    """How good the model is on rows that it does not train on."""

    loss: float
    """Mean over all predictions, or pairs, in nats."""
    metrics: Mapping[str, float]
    """Of the objective, by name."""


@torch.no_grad()
def validate(
    objective: Objective,
    module: nn.Module,
    rows: ValidationRows,
    *,
    batch_size: int,
    environment: DistributedEnvironment,
    autocast: torch.autocast,
) -> Validation:
    """Mean loss and metrics over all of `rows`; the processes share the rows.

    Args:
        objective: Gives them.
        module: What it calls, without wrappers for several processes.
        rows: The same in every process.
        batch_size: Rows that are computed together.
        environment: Of this process.
        autocast: Precision of the forward pass.
    """
    total: torch.Tensor | None = None  # [1 + K] float64: the loss, then the metrics' sums
    shares = {"rank": environment.rank, "world_size": environment.world_size}
    device = environment.device
    with evaluating(module):
        mine = rows.batches(batch_size, **shares)
        for batch in _in_step(mine, rows, batch_size, environment, is_fully_sharded(module)):
            computed = next(rows.batches(1)) if batch is None else batch
            with autocast:
                loss, sums = objective.loss(module, computed.to(device), 1)
            if batch is not None:
                parts = torch.cat([loss[None], sums]).double()
                total = parts if total is None else total + parts
    if environment.process_group is not None:
        total = _summed(total, environment)
    assert total is not None, "there is a row at least"
    loss, *sums = total.tolist()
    return Validation(loss / rows.targets, objective.means(sums, rows.targets))


def _in_step(
    mine: Iterator[Batch],
    rows: ValidationRows,
    size: int,
    environment: DistributedEnvironment,
    together: bool,
) -> Iterator[Batch | None]:
    """This process's batches, and None while others that compute `together` with it have more."""
    missing = rows.most_batches(size, environment.world_size) if together else 0
    for batch in mine:
        missing -= 1
        yield batch
    yield from [None] * missing


def _summed(total: torch.Tensor | None, environment: DistributedEnvironment) -> torch.Tensor:
    """The sum over all processes, of which some may have had no row."""
    width = torch.tensor(0 if total is None else total.numel(), device=environment.device)
    dist.all_reduce(width, dist.ReduceOp.MAX, group=environment.process_group)
    if total is None:
        total = torch.zeros(int(width), dtype=torch.float64, device=environment.device)
    dist.all_reduce(total, group=environment.process_group)
    return total


def draw_sample(
    model: CausalLM,
    tokenizer: Tokenizer,
    *,
    prompt: str,
    tokens: int,
    seed: int,
    autocast: torch.autocast,
) -> str:
    """`prompt` and what the model writes after it, until a document ends.

    Args:
        model: Without wrappers.
        tokenizer: Of the model.
        prompt: Empty to begin a document.
        tokens: Tokens to add, as far as the model's positions reach.
        seed: Of the draw, at temperature 0.8 among the 50 likeliest tokens.
        autocast: Precision of the forward pass.
    """
    end = end_token(tokenizer)
    positions = model.config.max_position_embeddings
    start = [end, *tokenizer.encode(prompt).ids][-(positions // 2) :]
    device = model.embed_tokens.weight.device
    with evaluating(model), autocast:
        drawn = generate(
            model,
            torch.tensor([start], device=device),
            max_new_tokens=min(tokens, positions - len(start)),
            temperature=0.8,
            top_k=50,
            eos_token_id=end,
            seed=seed,
        )
    written = drawn[0].tolist()[len(start) :]
    if end in written:
        written = written[: written.index(end)]
    return prompt + decode(tokenizer, written)
