"""One new token for every sequence: the forward of `CausalLM` for T = 1, in five launches a block.

    q, k, v   ← W_qkv · RMSNorm(h)
    y         ← attention of turned q to the cache, which gets turned k and v
    h         ← h + W_o · y
    z         ← silu(W_gate · RMSNorm(h)) ∘ (W_up · RMSNorm(h))
    h         ← h + W_down · z

At this size every launch is a wait, and the time between them, in which no weights are read, is
most of what a decoder's step costs. So norms, rotation, cache, gate and sums are parts of the
products and of the attention (`skinny_linear`, `flash_attn_with_kvcache`), each of which fetches
its weights while the one before still runs; a product that a norm follows hands on what that needs.
A mixture of experts is called as a module. Of more sequences than `skinny_linear` takes rows,
norms, gates and sums are launches of their own.

Shapes: B batch, C hidden_size, V vocab_size, H query heads, K key/value heads, D head dimension.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright_kernels import RMSNorm, flash_attn_with_kvcache, rms_norm, skinny_linear
from tilewright_kernels.skinny_linear import (
    MAX_ROWS,
    by_parts,
    hands_norm_on,
    skinny_linear_scaled,
)
from tilewright_model.attention import Attention
from tilewright_model.block import Block
from tilewright_model.causal_lm import CausalLM
from tilewright_model.kv_cache import KVCache
from tilewright_model.mlp import MLP


def decodes_in_one_dtype(model: CausalLM) -> bool:
    """Whether `decode_step` computes what the model's forward would.

    It knows neither autocast nor weights of several dtypes nor dropout; the forward itself does.
    """
    weight = model.embed_tokens.weight
    config = model.config
    drops = model.training and (config.attention_dropout > 0 or config.residual_dropout > 0)
    return (
        not torch.is_autocast_enabled(weight.device.type)
        and not drops
        and all(p.dtype == weight.dtype for p in model.parameters())
    )


def counters_for(model: CausalLM, batch_size: int) -> Tensor:
    """The zeros that the launches of a step count in, for all of them one after another."""
    config = model.config
    widest = max(
        config.vocab_size,
        2 * config.intermediate_size,
        (config.num_attention_heads + 2 * config.num_key_value_heads) * config.attention_head_dim,
        config.hidden_size,
    )
    size = max(widest // 16 + 1, batch_size * config.num_key_value_heads)
    return torch.zeros(size, dtype=torch.int32, device=model.embed_tokens.weight.device)


def decode_step(
    model: CausalLM, tokens_B: Tensor, cache: KVCache, counters: Tensor | None = None
) -> Tensor:
    """Logits of the token after each of `tokens_B`, whose keys and values go to the cache.

    The cache does not count them: `cache.advance(1)` does, on the host and on the device. Nothing
    waits for the device and no shape depends on lengths, so the step can be captured in a graph.

    Args:
        model: of which `decodes_in_one_dtype` is true.
        tokens_B: int64, the newest token of each sequence.
        cache: with room for one token more; unequal lengths are all the same to it.
        counters: from `counters_for`; None lets each launch make its own.

    Returns:
        [B, V].
    """
    h_BC = F.embedding(tokens_B, model.embed_tokens.weight)
    if model.embed_positions is not None:
        h_BC = h_BC + model.embed_positions(cache.lengths.long()).to(h_BC.dtype)
    cos, sin = (None, None) if model.rotary is None else (model.rotary.cos, model.rotary.sin)
    norms = [cast(Block, block).input_layernorm for block in model.layers] + [model.norm]
    stream = _Stream(h_BC)
    for i, (module, keys, values) in enumerate(
        zip(model.layers, cache.keys, cache.values, strict=True)
    ):
        block = cast(Block, module)
        qkv_BN = _product_of_norm(stream, block.self_attn.qkv_proj.weight, norms[i], counters)
        y_BC = _attend(block.self_attn, qkv_BN, keys, values, cache.lengths, cos, sin, counters)
        stream = _added(
            stream, y_BC, block.self_attn.o_proj.weight, block.post_attention_layernorm, counters
        )
        stream = _feed_forward(block, stream, norms[i + 1], counters)
    return _logits(model, stream, counters)


class _Stream(NamedTuple):
    """What blocks add to, and what the next norm needs of it where a product has handed that on."""

    h_BC: Tensor
    scaled_BC: Tensor | None = None
    """h · weight of the norm."""
    squares: Tensor | None = None
    """Sums of h², as `skinny_linear` takes them."""


def _added(
    stream: _Stream, x: Tensor, weight: Tensor, next_norm: RMSNorm, counters: Tensor | None
) -> _Stream:
    """The stream with a product added to it."""
    # Products of other widths would have to undo it, in launches of their own.
    if len(weight) % 64 == 0 and hands_norm_on(x, weight):
        return _Stream(
            *skinny_linear_scaled(
                *(x, weight, next_norm.weight),
                residual=stream.h_BC, counters=counters, prefetch_weight=True,
            )
        )  # fmt: skip
    return _Stream(
        _product(x, weight, residual=stream.h_BC, counters=counters, prefetch_weight=True)
    )


def _product_of_norm(
    stream: _Stream, weight: Tensor, norm: RMSNorm, counters: Tensor | None, gated: bool = False
) -> Tensor:
    """The product of the stream, normalized, with a weight."""
    launch: dict[str, Any] = {"gated": gated, "counters": counters, "prefetch_weight": True}
    if stream.scaled_BC is not None:
        return skinny_linear(
            stream.scaled_BC, weight, squares=stream.squares, eps=norm.eps, **launch
        )
    return _product(stream.h_BC, weight, norm_weight=norm.weight, eps=norm.eps, **launch)


def _product(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    **launch: Any,
) -> Tensor:
    """`skinny_linear`, or the same part by part for more rows than it takes."""
    if len(x) <= MAX_ROWS:
        return skinny_linear(
            *(x, weight),
            norm_weight=norm_weight, eps=eps, residual=residual, gated=gated, **launch,
        )  # fmt: skip
    return by_parts(x, weight, norm_weight, eps, residual, gated)


def _attend(
    attention: Attention, qkv_BN: Tensor, keys: Tensor, values: Tensor, lengths: Tensor,
    cos: Tensor | None, sin: Tensor | None, counters: Tensor | None,
) -> Tensor:  # fmt: skip
    """[B, H·D] from the joint projection of one token a sequence."""
    heads, kv_heads = attention.heads, attention.kv_heads
    qkv = qkv_BN.view(len(qkv_BN), 1, -1, attention.head_dim)
    q_B1HD, k_B1KD, v_B1KD = qkv.split([heads, kv_heads, kv_heads], dim=2)
    q_norm, k_norm = attention.q_norm, attention.k_norm
    eps = 0.0 if q_norm is None or q_norm.eps is None else q_norm.eps
    y_B1HD = flash_attn_with_kvcache(
        *(q_B1HD, keys, values, k_B1KD, v_B1KD, lengths),
        cos=cos,
        sin=sin,
        q_norm_weight=None if q_norm is None else q_norm.weight,
        k_norm_weight=None if k_norm is None else k_norm.weight,
        norm_eps=eps,
        softcap=attention.softcap,
        window_size=attention.window_size,
        counters=counters,
        prefetch_cache=True,
    )
    return y_B1HD.flatten(1)


def _feed_forward(
    block: Block, stream: _Stream, next_norm: RMSNorm, counters: Tensor | None
) -> _Stream:
    """h + MLP(RMSNorm(h))."""
    norm, mlp = block.post_attention_layernorm, block.mlp
    if not isinstance(mlp, MLP):
        x_BC = rms_norm(stream.h_BC, stream.h_BC.shape[-1:], norm.weight, norm.eps)
        return _Stream(stream.h_BC + mlp(x_BC)[0])
    z_BI = _product_of_norm(stream, mlp.gate_up_proj.weight, norm, counters, gated=True)
    return _added(stream, z_BI, mlp.down_proj.weight, next_norm, counters)


def _logits(model: CausalLM, stream: _Stream, counters: Tensor | None) -> Tensor:
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    logits_BV = _product_of_norm(stream, head.weight, model.norm, counters)
    if model.config.logits_scaling != 1:
        logits_BV = logits_BV / model.config.logits_scaling
    if (cap := model.config.final_logit_softcapping) is not None:
        logits_BV = cap * torch.tanh(logits_BV / cap)
    return logits_BV
