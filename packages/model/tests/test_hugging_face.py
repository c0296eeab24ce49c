import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tilewright_model import CausalLM, ModelConfig, RopeScaling
from tilewright_model.families import family_of
from tilewright_model.hugging_face import (
    from_hugging_face,
    tensors_on_disk,
    to_hugging_face,
)

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=28,
    max_position_embeddings=16,
    rms_norm_eps=1e-5,
    rope_theta=500.0,
)
VARIANTS = {
    "grouped": CONFIG,
    "untied": dataclasses.replace(CONFIG, tie_word_embeddings=False),
    "wide heads": dataclasses.replace(CONFIG, head_dim=6),
    "multi-query": dataclasses.replace(CONFIG, num_key_value_heads=1),
}


@pytest.fixture(params=list(VARIANTS.values()), ids=list(VARIANTS))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return request.param


def llama(directory: Path, input_ids: Tensor) -> Tensor:
    """A Llama written from its description, from the files alone: nothing of ours is called."""
    c: dict[str, Any] = json.loads((directory / "config.json").read_text())
    w = load_file(directory / "model.safetensors")
    B, T = input_ids.shape
    H, K, D = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt()

    def heads(x: Tensor, name: str, count: int) -> Tensor:
        return (x @ w[name].T).view(B, T, count, D).transpose(1, 2)

    def rotate(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * sin

    frequencies = c["rope_parameters"]["rope_theta"] ** -(torch.arange(0, D, 2) / D)
    angles = torch.arange(T)[:, None] * torch.cat([frequencies, frequencies])
    cos, sin = angles.cos(), angles.sin()
    future = torch.ones(T, T, dtype=torch.bool).triu(1)

    h = w["model.embed_tokens.weight"][input_ids]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        x = norm(h, w[f"{layer}.input_layernorm.weight"])
        q = rotate(heads(x, f"{layer}.self_attn.q_proj.weight", H))
        k = rotate(heads(x, f"{layer}.self_attn.k_proj.weight", K)).repeat_interleave(H // K, 1)
        v = heads(x, f"{layer}.self_attn.v_proj.weight", K).repeat_interleave(H // K, 1)
        scores = (q @ k.mT / D**0.5).masked_fill(future, -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, H * D)
        h = h + y @ w[f"{layer}.self_attn.o_proj.weight"].T
        x = norm(h, w[f"{layer}.post_attention_layernorm.weight"])
        gate, up = (x @ w[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        h = h + (F.silu(gate) * up) @ w[f"{layer}.mlp.down_proj.weight"].T
    tied = c["tie_word_embeddings"]
    head = w["model.embed_tokens.weight"] if tied else w["lm_head.weight"]
    assert tied == ("lm_head.weight" not in w)
    return norm(h, w["model.norm.weight"]) @ head.T


def test_logits_equal_an_independent_llamas(config: ModelConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norm weights too must not be all the same
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(tmp_path)
    ids = torch.randint(config.vocab_size, (2, 11))
    expected = llama(tmp_path, ids)
    assert expected.std() > 0.5
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_names_are_those_of_llama() -> None:
    names = list(tensors_on_disk(dataclasses.replace(CONFIG, tie_word_embeddings=False)))
    assert len(names) == 1 + 2 * 9 + 2
    assert names[:10] == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    ]
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]


def test_configuration_round_trip(config: ModelConfig) -> None:
    values = json.loads(json.dumps(to_hugging_face(config, torch.bfloat16)))
    assert from_hugging_face(values) == config


MOE = dataclasses.replace(CONFIG, num_experts=4, num_experts_per_tok=2)
QWEN3 = dataclasses.replace(CONFIG, qk_norm=True)
YARN = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=4)
FAMILIES = {
    "llama": dataclasses.replace(CONFIG, rope_scaling=YARN),
    "mistral": dataclasses.replace(CONFIG, sliding_window=3),
    "qwen3": dataclasses.replace(
        QWEN3, sliding_window=3, layer_types=("full_attention", "sliding_attention")
    ),
    "mixtral": dataclasses.replace(MOE, rope_scaling=RopeScaling(rope_type="linear", factor=2.0)),
    "qwen3_moe": dataclasses.replace(
        MOE, qk_norm=True, moe_intermediate_size=8, norm_topk_prob=False, mlp_only_layers=(1,)
    ),
    "tilewright": dataclasses.replace(
        MOE,
        position_embedding="learned",
        num_shared_experts=1,
        router_scoring="sigmoid",
        final_logit_softcapping=30.0,
        sliding_window=3,
        layer_types=("sliding_attention", "full_attention"),
        first_k_dense_replace=1,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_comes_back(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]
    assert family_of(config) == family
    values = json.loads(json.dumps(to_hugging_face(config, torch.float32)))
    assert values["model_type"] == family
    assert from_hugging_face(values) == config
    torch.manual_seed(0)
    model, ids = CausalLM(config).eval(), torch.randint(config.vocab_size, (2, 9))
    model.save_pretrained(tmp_path)
    assert torch.equal(CausalLM.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_of_each_family_tile_its_parameters(family: str) -> None:
    state = CausalLM(FAMILIES[family]).state_dict()
    covered = {name: torch.zeros(parameter.shape) for name, parameter in state.items()}
    for name, place in tensors_on_disk(FAMILIES[family]).items():
        assert place.of(covered[place.parameter]).shape == place.shape, name
        place.of(covered[place.parameter]).add_(1)
    for name, count in covered.items():
        assert (count == 1).all(), name


@pytest.mark.parametrize(
    ("change", "family"),
    [
        ({"attn_logit_softcapping": 20.0}, "tilewright"),
        ({"position_embedding": "none"}, "tilewright"),
        ({"logits_scaling": 8.0}, "tilewright"),
        ({"residual_dropout": 0.1}, "tilewright"),
        ({"num_experts": 4, "norm_topk_prob": False}, "tilewright"),
        ({"num_experts": 4, "mlp_only_layers": (0,)}, "tilewright"),
        ({"num_experts": 4, "qk_norm": True, "first_k_dense_replace": 1}, "qwen3_moe"),
        # transformers' Llama refuses a width that its heads do not divide; Mistral is the same.
        ({"hidden_size": 20, "head_dim": 4}, "mistral"),
    ],
    ids=str,
)
def test_the_family_is_one_that_computes_the_same(change: dict, family: str) -> None:
    assert family_of(dataclasses.replace(CONFIG, **change)) == family


def test_ntk_is_written_as_the_base_that_it_amounts_to() -> None:
    config = dataclasses.replace(
        CONFIG, head_dim=8, rope_scaling=RopeScaling(rope_type="ntk", factor=4.0)
    )
    again = from_hugging_face(to_hugging_face(config, torch.float32))
    assert again.rope_scaling is None
    assert again.rope_theta == pytest.approx(500.0 * 4 ** (8 / 6))


def test_yarns_length_and_factor_are_derived_where_left_out() -> None:
    values = to_hugging_face(CONFIG, torch.float32)
    del values["rope_parameters"]
    scaled = {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    scaling = from_hugging_face({**values, "rope_scaling": scaled}).rope_scaling
    assert scaling is not None
    assert scaling.original_max_position_embeddings == CONFIG.max_position_embeddings
    log = 0.1 * math.log(4.0)
    assert scaling.attention_factor == pytest.approx((log + 1) / (0.5 * log + 1))


def test_both_spellings_are_written() -> None:
    values = to_hugging_face(CONFIG, torch.bfloat16)
    assert values["architectures"] == ["LlamaForCausalLM"]
    assert values["model_type"] == "llama"
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 500.0
    assert values["rope_parameters"]["rope_type"] == "default"
    assert values["torch_dtype"] == values["dtype"] == "bfloat16"
    assert values["head_dim"] == 4
    assert values["attention_bias"] is values["mlp_bias"] is False


def test_what_is_left_out_has_the_defaults_of_llama() -> None:
    values = {
        "vocab_size": 40,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "intermediate_size": 28,
    }
    config = from_hugging_face(values)
    assert config.num_key_value_heads == 6
    assert config.max_position_embeddings == 2048
    assert config.tie_word_embeddings is False
    assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 10000.0)
    assert from_hugging_face({**values, "rope_theta": 5e5}).rope_theta == 5e5
    later = {"rope_type": "default", "rope_theta": 5e5}
    assert from_hugging_face({**values, "rope_parameters": later}).rope_theta == 5e5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model_type is 'gpt2': known are llama, mistral, qwen3, mixtral, qwen3_moe, tilewright",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu': only 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        (
            {"rope_scaling": {"type": "yarn"}},
            "rope_parameters says 'default', rope_scaling 'yarn'",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0}},
            "rope_type is 'llama3' and its factor is missing",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
            "rope_type is 'longrope': computed here are default, linear, yarn, llama3",
        ),
        (
            {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        ({"rope_theta": 10000.0}, "rope_parameters says rope_theta 500.0, config.json 10000.0"),
        ({"rope_parameters": "x"}, "rope_parameters is 'x': it must be an object or null"),
        ({"rope_scaling": ["x"]}, r"rope_scaling is \['x'\]"),
        (
            {
                "rope_parameters": {"rope_type": "linear", "factor": 2.0},
                "rope_scaling": {"type": "linear", "factor": 8.0},
            },
            "rope_parameters says factor 2.0, rope_scaling 8.0",
        ),
        ({"num_attention_heads": None}, "num_attention_heads is null"),
        ({"pretraining_tp": 4}, "pretraining_tp is 4: for llama only 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"final_logit_softcapping": 3.0}, "final_logit_softcapping is 3.0: for llama only None"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hugging_face({**to_hugging_face(CONFIG, torch.float32), **change})


def test_a_missing_key_is_named() -> None:
    values = to_hugging_face(CONFIG, torch.float32)
    del values["intermediate_size"]
    with pytest.raises(ValueError, match="intermediate_size is missing"):
        from_hugging_face(values)
