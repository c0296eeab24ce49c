"""Contradictions in a `ModelConfig`, each named with a value that would do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright_model.config import ModelConfig

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
    "num_experts_per_tok",
    "decoder_sparse_step",
)
_OPTIONAL_SIZES = ("head_dim", "sliding_window", "moe_intermediate_size")
_COUNTS = ("num_experts", "num_shared_experts", "first_k_dense_replace")
_POSITIVE = (
    "rms_norm_eps",
    "rope_theta",
    "logits_scaling",
    "initializer_range",
    "routed_scaling_factor",
)
_OPTIONAL_POSITIVE = ("attn_logit_softcapping", "final_logit_softcapping")
_COEFFICIENTS = ("router_aux_loss_coef", "router_z_loss_coef")
_PROBABILITIES = ("attention_dropout", "residual_dropout")
_BOOLS = ("tie_word_embeddings", "qk_norm", "norm_topk_prob")
_CHOICES = {
    "position_embedding": ("rope", "learned", "sinusoidal", "none"),
    "router_scoring": ("softmax", "sigmoid"),
    "router_aux_loss_layers": ("together", "sum", "mean"),
}
_LAYER_TYPES = ("full_attention", "sliding_attention")


def check(config: ModelConfig) -> None:
    """Raise for the first value that is out of range or contradicts another."""
    for name in _SIZES:
        _check_int(name, getattr(config, name), least=1)
    for name in _OPTIONAL_SIZES:
        if getattr(config, name) is not None:
            _check_int(name, getattr(config, name), least=1)
    for name in _COUNTS:
        _check_int(name, getattr(config, name), least=0)
    for name in _POSITIVE:
        _check_number(name, getattr(config, name))
    for name in _OPTIONAL_POSITIVE:
        if getattr(config, name) is not None:
            _check_number(name, getattr(config, name))
    for name in (*_COEFFICIENTS, *_PROBABILITIES):
        _check_number(name, getattr(config, name), zero=True)
    for name in _PROBABILITIES:
        if getattr(config, name) >= 1:
            raise ValueError(f"{name} is {getattr(config, name)}: give a probability below 1")
    for name in _BOOLS:
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"{name} is {getattr(config, name)!r}: give a bool")
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}: choose one of {', '.join(choices)}"
            )
    _check_heads(config)
    _check_positions(config)
    _check_layers(config)
    _check_experts(config)


def _check_heads(config: ModelConfig) -> None:
    hidden, heads, kv_heads = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    if config.head_dim is None and hidden % heads:
        # Multiples of twice the heads, so that the head_dim of what is proposed is even.
        below = hidden // (2 * heads) * 2 * heads
        choice = f"{below} or {below + 2 * heads}" if below else f"{2 * heads}"
        raise ValueError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}: "
            f"use hidden_size {choice}, or set head_dim"
        )
    if config.attention_head_dim % 2:
        raise ValueError(
            f"head_dim {config.attention_head_dim} is odd and rotary embedding turns pairs: "
            f"set head_dim {config.attention_head_dim + 1}, or change hidden_size {hidden} or "
            f"num_attention_heads {heads}"
        )
    if heads % kv_heads:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads "
            f"{kv_heads}: use num_key_value_heads {divisors}"
        )


def _check_positions(config: ModelConfig) -> None:
    scaling = config.rope_scaling
    if scaling is None:
        return
    if not hasattr(scaling, "rope_type"):
        raise TypeError(f"rope_scaling is {scaling!r}: give a RopeScaling or None")
    if config.position_embedding != "rope":
        raise ValueError(
            f"rope_scaling is set and position_embedding is {config.position_embedding!r}: "
            f"leave one of them at its default"
        )
    if scaling.rope_type == "yarn" and config.rope_theta <= 1:
        raise ValueError(
            f"rope_theta is {config.rope_theta} and rope_type 'yarn' asks how often each pair "
            f"turns: give a rope_theta above 1"
        )
    if scaling.rope_type == "ntk" and config.attention_head_dim <= 2:
        raise ValueError(
            f"head_dim {config.attention_head_dim} is one pair, which rope_type 'ntk' cannot "
            f"scale: use 'linear'"
        )


def _check_layers(config: ModelConfig) -> None:
    types, layers = config.layer_types, config.num_hidden_layers
    if types is None:
        return
    if not isinstance(types, tuple) or len(types) != layers:
        raise ValueError(
            f"layer_types is {types!r}: give a tuple with one entry for each of "
            f"num_hidden_layers {layers}"
        )
    for layer, kind in enumerate(types):
        if kind not in _LAYER_TYPES:
            raise ValueError(
                f"layer_types[{layer}] is {kind!r}: choose one of {', '.join(_LAYER_TYPES)}"
            )
    if "sliding_attention" in types and config.sliding_window is None:
        raise ValueError(
            "layer_types has sliding_attention and sliding_window is None: give its tokens"
        )


def _check_experts(config: ModelConfig) -> None:
    experts, chosen = config.num_experts, config.num_experts_per_tok
    if not isinstance(config.mlp_only_layers, tuple):
        raise TypeError(f"mlp_only_layers is {config.mlp_only_layers!r}: give a tuple of ints")
    for layer in config.mlp_only_layers:
        _check_int("mlp_only_layers", layer, least=0)
    if experts == 0:
        if config.num_shared_experts:
            raise ValueError(
                f"num_shared_experts is {config.num_shared_experts} and num_experts 0: a dense "
                f"model has intermediate_size instead"
            )
        return
    if chosen > experts:
        raise ValueError(
            f"num_experts_per_tok {chosen} exceeds num_experts {experts}: use at most that"
        )
    if not config.sparse_layers:
        raise ValueError(
            f"num_experts is {experts} and no layer of {config.num_hidden_layers} is sparse: lower "
            f"first_k_dense_replace {config.first_k_dense_replace} or decoder_sparse_step "
            f"{config.decoder_sparse_step}, or shorten mlp_only_layers {config.mlp_only_layers}"
        )


def _check_int(name: str, value: Any, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}: give an int")
    if value < least:
        raise ValueError(f"{name} is {value}: give {least} or more")


def _check_number(name: str, value: Any, *, zero: bool = False) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}: give a float")
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        least = "of 0 or more" if zero else "greater than 0"
        raise ValueError(f"{name} is {value}: give a finite number {least}")
