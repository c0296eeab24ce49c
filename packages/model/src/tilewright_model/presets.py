"""Named sizes, one row each, from a model for a laptop's CPU to Llama 3's 8 billion parameters.

Widths of the MLP are multiples of 128 so that matrix products divide into whole tiles.
docs/model.md lists the parameters of each row.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tilewright_model.config import ModelConfig


def _row(
    vocab: int,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    positions: int,
    **fields: Any,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        max_position_embeddings=positions,
        **fields,
    )


def _experts(count: int, chosen: int, width: int) -> dict[str, Any]:
    """Fields of a mixture in every layer, in the shape of Qwen3-MoE."""
    return {
        "num_experts": count,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": width,
        "qk_norm": True,
    }


_LLAMA3 = {"rope_theta": 500_000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
_QWEN3 = {"rope_theta": 1_000_000.0, "head_dim": 128, "qk_norm": True}

PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        #                    vocab  hidden layers heads kv  mlp positions
        "nano": _row(2048, 128, 4, 4, 2, 384, 1024),
        "26m": _row(8192, 512, 8, 8, 4, 1280, 2048),
        "100m": _row(32768, 768, 12, 12, 4, 2048, 2048),
        "125m": _row(32768, 768, 12, 12, 12, 2560, 2048),
        "350m": _row(32768, 1024, 24, 16, 16, 2944, 2048),
        "0.5b": _row(32768, 1536, 16, 12, 12, 4096, 4096),
        "1.3b": _row(32768, 2048, 24, 16, 16, 5632, 4096),
        "2.7b": _row(32768, 2560, 32, 20, 4, 8576, 4096),
        "moe-nano": _row(2048, 128, 4, 4, 2, 384, 1024, **_experts(8, 2, 192)),
        "moe-0.5b-a0.15b": _row(32768, 768, 12, 12, 4, 4096, 4096, **_experts(16, 4, 1024)),
        "moe-7b-a1b": _row(50304, 2048, 16, 16, 16, 8192, 4096, **_experts(64, 8, 1024)),
        "llama3-8b": _row(128256, 4096, 32, 32, 8, 14336, 8192, **_LLAMA3),
        "qwen3-0.6b": _row(151936, 1024, 28, 16, 8, 3072, 40960, **_QWEN3),
    }
)
"""Every preset by its name."""


def preset(name: str, **overrides: Any) -> ModelConfig:
    """The configuration called `name`, with some of its fields replaced.

    Args:
        name: a key of `PRESETS`.
        **overrides: fields of `ModelConfig` and their values.

    Raises:
        ValueError: no such preset (the message lists them and the closest), or values that
            contradict each other.
        TypeError: no such field (the message names the closest).
    """
    if name not in PRESETS:
        raise ValueError(
            f"no preset {name!r}{_closest(name, PRESETS)}: choose one of {', '.join(PRESETS)}"
        )
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    for key in overrides:
        if key not in fields:
            raise TypeError(
                f"ModelConfig has no field {key!r}{_closest(key, fields)}: "
                f"its fields are {', '.join(fields)}"
            )
    return dataclasses.replace(PRESETS[name], **overrides)


def _closest(name: str, choices: Mapping[str, object] | list[str]) -> str:
    matches = difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.4)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
