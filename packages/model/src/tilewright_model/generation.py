"""Text generation, plain: read the prompt once, then one token at a time from the KV cache.

For a batch of prompts of one length. No step waits for the device unless an end token is watched
for. B batch, T tokens, V vocabulary.
"""

import contextlib
import sys

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tilewright_model.causal_lm import CausalLM
from tilewright_model.kv_cache import KVCache

# All of torch's attention backends but cuDNN, which builds a plan for every new length: decoding a
# 0.5 B model takes 31 ms a token with it on an H200 (torch 2.11) and 6.5 ms without.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@torch.no_grad()
def generate(
    model: CausalLM,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue prompts.

    Blocks run uncompiled here even where they were compiled for training: the length changes with
    every token, and each new one would be compiled again.

    Args:
        model: where it computes and in which precision; torch.autocast around the call is honoured.
        input_ids: [B, T] int64 on the model's device, prompts of one length.
        max_new_tokens: tokens to add.
        temperature: divides the logits; 0 takes the likeliest token (and ignores top_k, top_p).
        top_k: sample among this many likeliest tokens.
        top_p: sample among the likeliest tokens that together have this probability.
        eos_token_id: ends a sequence; its row is filled with it from there on, and generation stops
            when all rows have ended.
        generator: source of randomness, on the model's device; by default torch's own.

    Returns:
        [B, T + new] int64: prompt and continuation, new ≤ max_new_tokens.

    Raises:
        TypeError: input_ids are not int64.
        ValueError: an option out of range, a token outside the vocabulary, or more tokens than the
            model has positions.
    """
    _check_sampling(temperature, top_k, top_p)
    _check_request(model, input_ids, max_new_tokens, eos_token_id)
    batch_size, prompt_length = input_ids.shape
    cache = KVCache(
        model.config,
        batch_size,
        prompt_length + max_new_tokens,
        device=input_ids.device,
        dtype=_compute_dtype(model),
    )
    ended = torch.zeros(batch_size, dtype=torch.bool, device=input_ids.device)
    pieces = [input_ids]
    with _uncompiled(), sdpa_kernel(_ATTENTION):
        for _ in range(max_new_tokens):
            # Only the last position's logits are needed, not [B, T, V] of a long prompt.
            last_BC = model.hidden_states(pieces[-1], cache=cache)[:, -1]
            tokens_B = sample(
                model.project_logits(last_BC),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                generator=generator,
            )
            if eos_token_id is not None:
                tokens_B = tokens_B.masked_fill(ended, eos_token_id)
                ended |= tokens_B == eos_token_id
            pieces.append(tokens_B[:, None])
            if eos_token_id is not None and bool(ended.all()):
                break
    return torch.cat(pieces, dim=1)


def sample(
    logits_BV: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token a row from softmax(logits / temperature), cut to top_k and then to top_p.

    Returns:
        [B] int64.

    Raises:
        ValueError: an option out of range.
    """
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    probabilities_BV = logits_BV.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True)
        # A token stays if those before it do not reach top_p: the likeliest always does.
        beyond_BV = sorted_BV.cumsum(dim=-1) - sorted_BV >= top_p
        dropped_BV = torch.empty_like(beyond_BV).scatter_(-1, order_BV, beyond_BV)
        probabilities_BV = probabilities_BV.masked_fill(dropped_BV, 0.0)
    # The first of V exponential clocks with rates p rings at i with probability p_i / Σp. Unlike
    # torch.multinomial, which validates p on the host, this does not wait for the device.
    clocks_BV = torch.empty_like(probabilities_BV).exponential_(generator=generator)
    return (probabilities_BV / clocks_BV).argmax(dim=-1)


def _uncompiled() -> contextlib.AbstractContextManager[object]:
    # Where the compiler was never imported nothing is compiled; importing it takes 3 seconds.
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def _compute_dtype(model: CausalLM) -> torch.dtype:
    weight = model.embed_tokens.weight
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}: give 0 (greedy) or a positive number")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}: give 1 or more, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: give a number above 0 and up to 1, or None")


def _check_request(
    model: CausalLM, input_ids: Tensor, max_new_tokens: int, eos_token_id: int | None
) -> None:
    config = model.config
    if input_ids.dtype != torch.int64:
        raise TypeError(f"input_ids is {input_ids.dtype}: give int64")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids is {list(input_ids.shape)}: give [batch, tokens], not empty")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: give 1 or more")
    end = input_ids.shape[1] + max_new_tokens
    if end > config.max_position_embeddings:
        raise ValueError(
            f"{input_ids.shape[1]} prompt tokens and max_new_tokens {max_new_tokens} exceed "
            f"max_position_embeddings {config.max_position_embeddings}: ask for fewer"
        )
    smallest, largest = (int(bound) for bound in input_ids.aminmax())
    for token in (smallest, largest, *([] if eos_token_id is None else [eos_token_id])):
        if not 0 <= token < config.vocab_size:
            raise ValueError(
                f"token {token} is outside the vocabulary of {config.vocab_size}: "
                f"is this the model's tokenizer?"
            )
