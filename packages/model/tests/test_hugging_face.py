import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tilewright_model import CausalLM, ModelConfig
from tilewright_model.hugging_face import from_hugging_face, tensors_on_disk, to_hugging_face

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


def test_tensors_on_disk_tile_the_parameters(config: ModelConfig) -> None:
    state = CausalLM(config).state_dict()
    covered = {name: torch.zeros(parameter.shape) for name, parameter in state.items()}
    for name, place in tensors_on_disk(config).items():
        rows = covered[place.parameter].narrow(0, place.start, place.shape[0])
        assert rows.shape == place.shape, name
        rows += 1
    for name, count in covered.items():
        assert (count == 1).all(), name


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
        ({"model_type": "qwen3"}, "model_type is 'qwen3': only 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu': only 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling is"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0}}, "rope_parameters is"),
        ({"rope_theta": 10000.0}, "rope_parameters says rope_theta 500.0, config.json 10000.0"),
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
