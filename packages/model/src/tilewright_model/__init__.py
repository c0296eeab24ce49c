"""A decoder language model built on tilewright-kernels.

`ModelConfig` or a `preset` describes a model, `CausalLM` is it, `generate` and `Engine`
continue text with it.
Weights are read and written in Hugging Face's layout. Tokens are integers here: text is for the
caller.
"""

from tilewright_model.block import Block
from tilewright_model.causal_lm import CausalLM, CausalLMOutput
from tilewright_model.config import ModelConfig
from tilewright_model.counting import (
    ParameterCount,
    count_parameters,
    flops_per_token,
    model_flops_utilization,
)
from tilewright_model.engine import Completion, Engine, Token
from tilewright_model.generation import generate
from tilewright_model.kv_cache import KVCache
from tilewright_model.memory import (
    MemoryEstimate,
    activation_bytes,
    kv_cache_bytes,
    logits_bytes,
    memory_estimate,
    optimizer_bytes,
)
from tilewright_model.presets import PRESETS, preset
from tilewright_model.rope_scaling import RopeScaling
from tilewright_model.sampling import SamplingParams

__all__ = [
    "PRESETS",
    "Block",
    "CausalLM",
    "CausalLMOutput",
    "Completion",
    "Engine",
    "KVCache",
    "MemoryEstimate",
    "ModelConfig",
    "ParameterCount",
    "RopeScaling",
    "SamplingParams",
    "Token",
    "activation_bytes",
    "count_parameters",
    "flops_per_token",
    "generate",
    "kv_cache_bytes",
    "logits_bytes",
    "memory_estimate",
    "model_flops_utilization",
    "optimizer_bytes",
    "preset",
]
