"""Bytes that training and decoding hold, in closed form from the configuration.

What a block keeps for backward is counted tensor by tensor, as the Triton operators save them; a
test holds the sum against what autograd packs. torch's own operators keep more.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from tilewright_model.config import ModelConfig
from tilewright_model.counting import count_parameters

OptimizerKind = Literal["none", "adamw", "adamw_bf16", "adamw_int8", "muonw"]
Recompute = Literal["none", "selective", "full"]

_INT8_BLOCK = 256
_LEAST_CHUNK = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one replica in training, at the end of a forward, where they are most."""

    weights: int
    """Parameters."""

    gradients: int
    """One of each parameter, in its dtype."""

    optimizer: int
    """States and master weights."""

    activations: int
    """What blocks keep for backward, the hidden states and their gradient at the output."""

    logits: int
    """The chunk of logits that the loss holds at a time."""

    @property
    def total(self) -> int:
        """All of them. Workspaces and what the allocator leaves unused come on top."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def memory_estimate(
    config: ModelConfig,
    batch_size: int,
    seq_len: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    optimizer: OptimizerKind = "adamw",
    master: bool = True,
    recompute: Recompute = "none",
) -> MemoryEstimate:
    """Bytes of training on [batch_size, seq_len] tokens at a time.

    Args:
        config: of the model.
        batch_size: sequences of one forward.
        seq_len: their tokens.
        dtype: of weights, gradients and activations.
        optimizer: which states are kept: two averages in float32 ("adamw"), bfloat16 or 8 bits; for
            "muonw" one momentum in float32 for hidden matrices and AdamW's two for the rest.
        master: whether 16-bit weights have exact masters, 2 bytes each.
        recompute: as `CausalLM.recompute`.

    Raises:
        ValueError: a size below 1, more tokens than positions, an unknown optimizer or mode.
    """
    _check_sizes(config, batch_size, "seq_len", seq_len)
    weights = count_parameters(config).total * dtype.itemsize
    return MemoryEstimate(
        weights=weights,
        gradients=weights,
        optimizer=optimizer_bytes(config, optimizer, dtype=dtype, master=master),
        activations=activation_bytes(config, batch_size, seq_len, dtype=dtype, recompute=recompute),
        logits=logits_bytes(config, batch_size * seq_len, dtype=dtype),
    )


def _check_sizes(config: ModelConfig, batch_size: int, name: str, tokens: int) -> None:
    if batch_size < 1 or tokens < 1:
        raise ValueError(f"batch_size {batch_size} and {name} {tokens}: both must be 1 or more")
    if tokens > config.max_position_embeddings:
        raise ValueError(
            f"{name} {tokens} exceeds max_position_embeddings {config.max_position_embeddings}: "
            f"use at most that"
        )


def optimizer_bytes(
    config: ModelConfig,
    optimizer: OptimizerKind,
    *,
    dtype: torch.dtype = torch.bfloat16,
    master: bool = True,
) -> int:
    """Bytes of an optimizer's states, master weights included."""
    count = count_parameters(config)
    hidden_matrices = count.attention + count.mlp + count.experts
    a_parameter = {"none": 0.0, "adamw": 8.0, "adamw_bf16": 4.0, "muonw": 8.0}
    a_parameter["adamw_int8"] = 2 + 2 * 4 / _INT8_BLOCK
    if optimizer not in a_parameter:
        raise ValueError(
            f"optimizer is {optimizer!r}: choose one of {', '.join(get_args(OptimizerKind))}"
        )
    states = a_parameter[optimizer] * count.total
    if optimizer == "muonw":
        states -= 4 * hidden_matrices
    masters = 2 * count.total if master and dtype.itemsize == 2 and optimizer != "none" else 0
    return round(states) + masters


def activation_bytes(
    config: ModelConfig,
    batch_size: int,
    seq_len: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    recompute: Recompute = "none",
) -> int:
    """Bytes kept for backward by all blocks and the output.

    With recompute="full" every block keeps its input, and one block at a time all that it would
    keep otherwise; with "selective" its MLP keeps its input alone, and one at a time all of it.

    Raises:
        ValueError: an unknown mode.
    """
    if recompute not in get_args(Recompute):
        raise ValueError(
            f"recompute is {recompute!r}: choose one of {', '.join(get_args(Recompute))}"
        )
    tokens, layers = batch_size * seq_len, range(config.num_hidden_layers)
    mixers = [_attention_bytes(config, dtype) for _ in layers]
    mlps = [_mlp_bytes(config, layer, dtype) for layer in layers]
    hidden = config.hidden_size * dtype.itemsize
    if recompute == "none":
        blocks = sum(mixers) + sum(mlps)
    elif recompute == "selective":
        blocks = sum(mixers) + len(mlps) * hidden + max(mlps) - hidden
    else:
        blocks = len(mlps) * hidden + max(a + b for a, b in zip(mixers, mlps, strict=True)) - hidden
    # The last block's output and the reciprocal root of its norm; the loss's gradient by its input.
    output = 2 * hidden + 4
    return tokens * (blocks + output)


def _attention_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What the first half of a block keeps a token, its norm and the second norm's sum included."""
    hidden, head_dim = config.hidden_size, config.attention_head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    elements = hidden  # input of the first norm
    elements += hidden  # input of the qkv product
    elements += (heads + 2 * kv_heads) * head_dim  # its result: v is a view of it
    rotated = config.position_embedding == "rope" or config.qk_norm
    elements += (heads + kv_heads) * head_dim if rotated else 0
    elements += heads * head_dim  # attention's result, the input of the output product
    elements += hidden  # the sum that the second norm takes
    statistics = 2 + heads  # of two norms; log-sum-exp of each query
    statistics += heads + kv_heads if config.qk_norm else 0
    return elements * dtype.itemsize + 4 * statistics


def _mlp_bytes(config: ModelConfig, layer: int, dtype: torch.dtype) -> int:
    """What the second half of a block keeps a token: its input, and gate and up."""
    hidden = config.hidden_size
    if not config.is_sparse(layer):
        return (hidden + 2 * config.intermediate_size) * dtype.itemsize
    k, experts = config.num_experts_per_tok, config.num_experts
    elements = hidden + experts  # and the router's logits
    elements += 2 * (k + config.num_shared_experts) * config.expert_size
    routing = k * (4 + 4 + 4 + 4)  # weights, ids, the two orders of rows
    return elements * dtype.itemsize + routing


def logits_bytes(
    config: ModelConfig, tokens: int, *, dtype: torch.dtype = torch.bfloat16, kept: bool = False
) -> int:
    """Bytes of logits: of all tokens if they are kept, else of the chunk that the loss holds.

    A chunk is a fifth of them, or 64 MiB where that is more.
    """
    whole = tokens * config.vocab_size * dtype.itemsize
    return whole if kept else min(whole, max(_LEAST_CHUNK, whole // 5))


def kv_cache_bytes(
    config: ModelConfig,
    batch_size: int,
    max_length: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes of a `KVCache` of `max_length` tokens for each of `batch_size` sequences.

    Raises:
        ValueError: a size below 1, or more tokens than positions.
    """
    _check_sizes(config, batch_size, "max_length", max_length)
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.attention_head_dim
    return a_token * dtype.itemsize * batch_size * max_length
