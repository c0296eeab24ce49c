"""Text generation in one call, for a tensor of prompts of one length.

`Engine` is what it runs: that one keeps its cache and its graphs from call to call, takes prompts
of unequal lengths with options of their own, and streams.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tilewright_model.causal_lm import CausalLM
from tilewright_model.engine import Completion, Engine
from tilewright_model.sampling import SamplingParams

WORTH_A_GRAPH = 16
"""Steps from which capturing one, which costs the host a few, pays."""


def generate(
    model: CausalLM,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    seed: int | Sequence[int] | None = None,
) -> Tensor:
    """Continue prompts.

    Blocks run uncompiled here even where they were compiled for training: the length changes with
    every token, and each new one would be compiled again.

    Args:
        model: where it computes and in which precision; torch.autocast around the call is honoured.
        input_ids: [B, T] int64, prompts of one length.
        max_new_tokens: tokens to add.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: as the following, of `SamplingParams`.
        top_p: likewise.
        min_p: likewise.
        repetition_penalty: likewise.
        eos_token_id: ends a sequence; its row is filled with it from there on, and generation stops
            when all rows have ended.
        seed: of the first row, and the next number of each next one, or one for each; by default
            drawn from torch's own generator.

    Returns:
        [B, T + new] int64 on input_ids' device: prompt and continuation, new ≤ max_new_tokens.

    Raises:
        TypeError: input_ids are not int64.
        ValueError: an option out of range, a token outside the vocabulary, or more tokens than the
            model has positions.
    """
    if input_ids.dtype != torch.int64:
        raise TypeError(f"input_ids is {input_ids.dtype}: give int64")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids is {list(input_ids.shape)}: give [batch, tokens], not empty")
    batch_size, length = input_ids.shape
    seeds = [seed] * batch_size if seed is None else seed
    if isinstance(seeds, int):
        seeds = [seeds + row for row in range(batch_size)]
    if len(seeds) != batch_size:
        raise ValueError(f"{len(seeds)} seeds for {batch_size} rows: give one each")
    params = [
        SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop_token_ids=() if eos_token_id is None else (eos_token_id,),
            seed=row_seed,
        )
        for row_seed in seeds
    ]
    end, limit = length + max_new_tokens, model.config.max_position_embeddings
    engine = Engine(
        model,
        max_batch_size=batch_size,
        max_length=min(end, limit),
        cuda_graph=max_new_tokens > WORTH_A_GRAPH,
    )
    return _with_continuations(input_ids, engine.generate(input_ids.tolist(), params))


def _with_continuations(prompts_BT: Tensor, completions: Sequence[Completion]) -> Tensor:
    """[B, T + longest] int64: prompts and continuations, the last token repeated to fill a row."""
    longest = max(len(completion.token_ids) for completion in completions)
    rows = [c.token_ids + c.token_ids[-1:] * (longest - len(c.token_ids)) for c in completions]
    new_BT = torch.tensor(rows, dtype=torch.int64).to(prompts_BT.device)
    return torch.cat([prompts_BT, new_BT], dim=1)
