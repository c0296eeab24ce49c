"""The validation loss, and a sample of what the model writes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from tilewright_dist import DistributedEnvironment
from tilewright_model import CausalLM, generate
from tilewright_train.data import ValidationRows
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


@torch.no_grad()
def validation_loss(
    model: CausalLM,
    rows: ValidationRows,
    *,
    batch_size: int,
    environment: DistributedEnvironment,
    autocast: torch.autocast,
) -> float:
    """Mean loss over all predictions of `rows`, in nats; the processes share the rows.

    Args:
        model: Without wrappers.
        rows: The same in every process.
        batch_size: Rows that are computed together.
        environment: Of this process.
        autocast: Precision of the forward pass.
    """
    total = torch.zeros((), dtype=torch.float64, device=environment.device)
    shares = {"rank": environment.rank, "world_size": environment.world_size}
    with evaluating(model):
        for batch in rows.batches(batch_size, **shares):
            with autocast:
                loss = model(**batch.to(environment.device).inputs, num_items=1).loss
            total += loss.double()
    if environment.process_group is not None:
        dist.all_reduce(total, group=environment.process_group)
    return float(total) / rows.targets


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
