"""A decoder language model built on tilewright-kernels.

`ModelConfig` or a `preset` describes a model, `CausalLM` is it, `generate` continues text with it.
Weights are read and written in Hugging Face's layout. Tokens are integers here: text is for the
caller.
"""

from tilewright_model.block import Block
from tilewright_model.causal_lm import CausalLM, CausalLMOutput
from tilewright_model.config import ModelConfig
from tilewright_model.counting import ParameterCount, count_parameters, flops_per_token
from tilewright_model.generation import generate
from tilewright_model.kv_cache import KVCache
from tilewright_model.presets import PRESETS, preset
from tilewright_model.rope_scaling import RopeScaling

__all__ = [
    "PRESETS",
    "Block",
    "CausalLM",
    "CausalLMOutput",
    "KVCache",
    "ModelConfig",
    "ParameterCount",
    "RopeScaling",
    "count_parameters",
    "flops_per_token",
    "generate",
    "preset",
]
