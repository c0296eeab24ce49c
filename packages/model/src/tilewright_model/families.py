"""Hugging Face's families that a `ModelConfig` may belong to.

llama      dense
mistral    dense with one sliding window for all layers
qwen3      dense with qk-norm, sliding windows layer by layer
mixtral    every layer sparse, softmax router, weights normalized
qwen3_moe  sparse layers among dense ones, qk-norm
tilewright anything else that `ModelConfig` describes; transformers does not know it
"""

from collections.abc import Mapping
from typing import Any

from tilewright_model.config import ModelConfig

ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "tilewright": "TilewrightForCausalLM",
}
"""Known families by their `model_type`, and the class that transformers has for each."""

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "mixtral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
    },
}
"""What a family takes for a key that config.json leaves out (transformers 5.23), where it is not
what ModelConfig takes. All but ours leave embeddings untied."""

DEFAULT_THETA: Mapping[str, float] = {"mixtral": 1e6}
"""Of families where it is not 10000."""


def family_of(config: ModelConfig) -> str:
    """The `model_type` that computes what `config` describes: a key of `ARCHITECTURES`."""
    plain = (
        config.position_embedding == "rope"
        and config.attn_logit_softcapping is None
        and config.final_logit_softcapping is None
        and config.logits_scaling == 1
        and config.residual_dropout == 0
        and config.num_shared_experts == 0
        and config.router_scoring == "softmax"
        and config.routed_scaling_factor == 1
    )
    windows = {config.window(layer) for layer in range(config.num_hidden_layers)}
    one_window = len(windows) == 1
    if not plain:
        return "tilewright"
    if config.num_experts == 0:
        if config.qk_norm:
            return "qwen3"
        # transformers' Llama refuses a hidden_size that its heads do not divide.
        divides = config.hidden_size % config.num_attention_heads == 0
        if windows == {None} and divides:
            return "llama"
        return "mistral" if one_window else "tilewright"
    if config.qk_norm:
        return "qwen3_moe" if one_window else "tilewright"
    everywhere = len(config.sparse_layers) == config.num_hidden_layers
    return "mixtral" if everywhere and config.norm_topk_prob and one_window else "tilewright"
