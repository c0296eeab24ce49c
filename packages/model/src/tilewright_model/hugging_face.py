"""`config.json` of a model, as Hugging Face's class for its family writes and reads it.

Pure data: no file is touched here.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

import torch

from tilewright_model.config import ModelConfig
from tilewright_model.families import ARCHITECTURES, DEFAULT_THETA, DEFAULTS, family_of
from tilewright_model.hugging_face_tensors import (
    MIXTRAL_NAMES,
    QWEN3_MOE_NAMES,
    TensorOnDisk,
)
from tilewright_model.hugging_face_tensors import tensors_on_disk as _tensors_on_disk
from tilewright_model.rope_scaling import RopeScaling, RopeType, ntk_theta

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys that belong to the tokenizer and travel through a model untouched."""

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)

# What a configuration may say besides the fields of ModelConfig, and the one value of each that
# this model computes. All are written; on reading, another value is refused, not ignored.
_FIXED: Mapping[str, Any] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}

# What some checkpoints of other families say, null or the one value that is computed here. Two of
# them are fields of ours, for the family "tilewright".
_NEUTRAL: Mapping[str, Any] = {
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "logits_scaling": 1.0,
}

_ROUTER_LOSS_KEYS = ("router_aux_loss_coef", "router_aux_loss_layers", "router_z_loss_coef")

_SCALING_KEYS: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
    ),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
}


def tensors_on_disk(config: ModelConfig) -> dict[str, TensorOnDisk]:
    """Every tensor of a checkpoint by the name that its family gives it."""
    names = MIXTRAL_NAMES if family_of(config) == "mixtral" else QWEN3_MOE_NAMES
    return _tensors_on_disk(config, names)


def to_hugging_face(
    config: ModelConfig, dtype: torch.dtype, token_ids: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The contents of `config.json`, every default written out.

    Both spellings of the rotary constants and of the dtype are there: transformers before 5 reads
    `rope_theta`, `rope_scaling` and `torch_dtype`, later ones `rope_parameters` and `dtype`, and a
    reader that finds neither of its own silently takes theta 10000. NTK-aware scaling, which they
    have not, is written as the base that it amounts to.

    Args:
        config: of the model.
        dtype: of the weights.
        token_ids: `TOKEN_IDS` of the tokenizer. Left out they are null: transformers would
            otherwise take 1 and 2.
    """
    family, dtype_name = family_of(config), str(dtype).removeprefix("torch.")
    values: dict[str, Any] = {
        "model_type": family,
        "architectures": [ARCHITECTURES[family]],
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
        **dict.fromkeys(TOKEN_IDS),
        **(token_ids or {}),
        **_FIXED,
    }
    shared = (*_REQUIRED, "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
    shared += ("tie_word_embeddings", "initializer_range", "attention_dropout")
    values |= {name: getattr(config, name) for name in shared}
    values |= {"head_dim": config.attention_head_dim, **_rope_keys(config)}
    if family == "tilewright":
        ours = dataclasses.asdict(config)
        del ours["rope_theta"], ours["rope_scaling"]
        ours["head_dim"] = config.attention_head_dim
        return values | ours
    values |= _window_keys(config, family)
    if config.num_experts:
        values |= _expert_keys(config, family)
    return values


def _rope_keys(config: ModelConfig) -> dict[str, Any]:
    theta, scaling = config.rope_theta, config.rope_scaling
    if scaling is not None and scaling.rope_type == "ntk":
        theta, scaling = ntk_theta(config.attention_head_dim, theta, scaling.factor), None
    constants: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        constants = {"rope_type": scaling.rope_type}
        for key in _SCALING_KEYS[scaling.rope_type]:
            if getattr(scaling, key) is not None:
                constants[key] = getattr(scaling, key)
    return {
        "rope_theta": theta,
        "rope_scaling": None if scaling is None else constants,
        "rope_parameters": {**constants, "rope_theta": theta},
    }


def _window_keys(config: ModelConfig, family: str) -> dict[str, Any]:
    layers = range(config.num_hidden_layers)
    windows = [config.window(layer) for layer in layers]
    window = next((w for w in windows if w is not None), None)
    if family in ("mistral", "mixtral"):
        return {"sliding_window": window}
    if family == "qwen3":
        kinds = ["full_attention" if w is None else "sliding_attention" for w in windows]
        return {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": kinds.index("sliding_attention") if window else len(kinds),
            "layer_types": kinds,
        }
    if family == "qwen3_moe":
        return {"use_sliding_window": window is not None, "sliding_window": window}
    return {}


def _expert_keys(config: ModelConfig, family: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "num_experts_per_tok": config.num_experts_per_tok,
        "output_router_logits": False,
        **{key: getattr(config, key) for key in _ROUTER_LOSS_KEYS},
    }
    if family == "mixtral":
        return values | {
            "num_local_experts": config.num_experts,
            "intermediate_size": config.expert_size,
        }
    step = config.decoder_sparse_step
    dense = [
        layer
        for layer in range(config.num_hidden_layers)
        if (layer + 1) % step == 0 and not config.is_sparse(layer)
    ]
    return values | {
        "num_experts": config.num_experts,
        "num_local_experts": config.num_experts,  # transformers 5.23 and later
        "moe_intermediate_size": config.expert_size,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": step,
        "mlp_only_layers": dense,
    }


def from_hugging_face(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a `config.json` describes.

    What it leaves out takes the default of transformers' class for its family, not ours: in
    particular embeddings are then not tied.

    Raises:
        ValueError: an unknown family (the message lists the known), a missing key, or something
            that this model does not compute.
        TypeError: a value of the wrong type.
    """
    family = values.get("model_type", "llama")
    if family not in ARCHITECTURES:
        raise ValueError(f"model_type is {family!r}: known are {', '.join(ARCHITECTURES)}")
    for key in _REQUIRED:
        if values.get(key) is None:
            raise ValueError(f"{key} is {'null' if key in values else 'missing'}")
    for key, expected in _FIXED.items():
        if values.get(key, expected) != expected:
            raise ValueError(f"{key} is {values[key]!r}: only {expected!r} is computed here")
    ours = {field.name for field in dataclasses.fields(ModelConfig)}
    for key, expected in _NEUTRAL.items():
        if family == "tilewright" and key in ours:
            continue
        if values.get(key) not in (None, expected):
            raise ValueError(
                f"{key} is {values[key]!r}: for {family} only {expected!r} is computed here"
            )
    if values.get("quantization_config") is not None:
        raise ValueError("quantization_config is set: only unquantized weights are read")
    values = {**DEFAULTS.get(family, {}), **values}
    if family == "tilewright":
        return _from_ours(values)
    head_dim, heads = values.get("head_dim"), values["num_attention_heads"]
    fields = {key: values[key] for key in _REQUIRED}
    fields |= _optional(values, "rms_norm_eps", "initializer_range", "attention_dropout")
    return ModelConfig(
        **fields,
        num_key_value_heads=values.get("num_key_value_heads") or heads,
        max_position_embeddings=values["max_position_embeddings"],
        head_dim=_derived_head_dim(values["hidden_size"], heads, head_dim),
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        **_rope_fields(values),
        **_window_fields(values, family),
        **_expert_fields(values, family),
    )


def _from_ours(values: Mapping[str, Any]) -> ModelConfig:
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    fields = {key: values[key] for key in names if key in values} | _rope_fields(values)
    for key in ("layer_types", "mlp_only_layers"):
        if isinstance(fields.get(key), list):
            fields[key] = tuple(fields[key])
    fields["head_dim"] = _derived_head_dim(
        values["hidden_size"], values["num_attention_heads"], values.get("head_dim")
    )
    return ModelConfig(**fields)


def _derived_head_dim(hidden: int, heads: int, head_dim: int | None) -> int | None:
    """None where head_dim follows from the others, and may follow them in dataclasses.replace."""
    return None if isinstance(head_dim, int) and head_dim * heads == hidden else head_dim


def _optional(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: values[key] for key in keys if key in values}


def _window_fields(values: Mapping[str, Any], family: str) -> dict[str, Any]:
    window = values.get("sliding_window")
    if family in ("mistral", "mixtral"):
        return {"sliding_window": window}
    if family == "llama" or not values.get("use_sliding_window", False):
        return {}
    if family == "qwen3_moe":
        return {"sliding_window": values.get("sliding_window", 4096)}
    window, layers = values.get("sliding_window", 4096), values["num_hidden_layers"]
    kinds = values.get("layer_types")
    if kinds is None:
        first = values.get("max_window_layers", 28)
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if set(kinds) == {"full_attention"}:
        return {}
    every = set(kinds) == {"sliding_attention"}
    return {"sliding_window": window, "layer_types": None if every else tuple(kinds)}


def _expert_fields(values: Mapping[str, Any], family: str) -> dict[str, Any]:
    if family not in ("mixtral", "qwen3_moe"):
        return {}
    fields = _optional(values, "num_experts_per_tok", *_ROUTER_LOSS_KEYS)
    default = 8 if family == "mixtral" else 128
    fields["num_experts"] = values.get("num_experts", values.get("num_local_experts", default))
    if family == "mixtral":
        return fields
    return {
        **fields,
        "norm_topk_prob": values["norm_topk_prob"],
        "moe_intermediate_size": values["moe_intermediate_size"],
        "decoder_sparse_step": values.get("decoder_sparse_step", 1),
        "mlp_only_layers": tuple(values.get("mlp_only_layers") or ()),
    }


def _rope_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling from either spelling, or from both where they agree."""
    newer, older = values.get("rope_parameters"), values.get("rope_scaling")
    for name, given in (("rope_parameters", newer), ("rope_scaling", older)):
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(f"{name} is {given!r}: it must be an object or null")
    parameters = newer or older or {}
    kind = _rope_type(parameters)
    if newer and older and _rope_type(older) != kind:
        raise ValueError(f"rope_parameters says {kind!r}, rope_scaling {_rope_type(older)!r}")
    if newer and older:
        for key in sorted(newer.keys() & older.keys() - {"type", "rope_type"}):
            if newer[key] != older[key]:
                raise ValueError(
                    f"rope_parameters says {key} {newer[key]}, rope_scaling {older[key]}"
                )
    if kind != "default" and kind not in _SCALING_KEYS:
        raise ValueError(
            f"rope_type is {kind!r}: computed here are default, {', '.join(_SCALING_KEYS)}"
        )
    if kind != "default" and "factor" not in parameters:
        raise ValueError(f"rope_type is {kind!r} and its factor is missing")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor is {parameters['partial_rotary_factor']}: only whole heads turn"
        )
    found = [source["rope_theta"] for source in (parameters, values) if "rope_theta" in source]
    if len(set(found)) > 1:
        raise ValueError(f"rope_parameters says rope_theta {found[0]}, config.json {found[1]}")
    default = DEFAULT_THETA.get(values.get("model_type", "llama"), 10000.0)
    theta = found[0] if found else default
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    constants = {key: parameters[key] for key in _SCALING_KEYS[kind] if key in parameters}
    if kind == "yarn":
        constants = _yarn_constants(values, parameters, constants)
    return {
        "rope_theta": theta,
        "rope_scaling": RopeScaling(rope_type=cast(RopeType, kind), **constants),
    }


def _rope_type(parameters: Mapping[str, Any]) -> Any:
    return parameters.get("rope_type", parameters.get("type", "default"))


def _yarn_constants(
    values: Mapping[str, Any], parameters: Mapping[str, Any], constants: dict[str, Any]
) -> dict[str, Any]:
    """With the length and the factor of scores that transformers derives where they are missing."""
    length = parameters.get("original_max_position_embeddings")
    constants["original_max_position_embeddings"] = length or values["max_position_embeddings"]
    scale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if constants.get("attention_factor") is None and scale and all_dim:
        log = 0.1 * math.log(parameters["factor"])
        constants["attention_factor"] = (scale * log + 1) / (all_dim * log + 1)
    return {key: value for key, value in constants.items() if value is not None}
