import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tilewright_model import CausalLM, ModelConfig, count_parameters, flops_per_token

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=40,
    max_position_embeddings=16,
)
VARIANTS = {
    "grouped": CONFIG,
    "untied": dataclasses.replace(CONFIG, tie_word_embeddings=False),
    "wide heads": dataclasses.replace(CONFIG, head_dim=10),
    "multi-head": dataclasses.replace(CONFIG, num_key_value_heads=6),
}


@pytest.fixture(params=list(VARIANTS.values()), ids=list(VARIANTS))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return request.param


def test_parts_equal_the_module(config: ModelConfig) -> None:
    model = CausalLM(config)

    def numel(*parts: str) -> int:
        return sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if any(part in name for part in parts)
        )

    count = count_parameters(config)
    assert count.embedding == numel("embed_tokens")
    assert count.attention == numel("qkv_proj", "o_proj")
    assert count.mlp == numel("gate_up_proj", "down_proj")
    assert count.norm == numel("norm")
    assert count.lm_head == numel("lm_head")
    assert count.total == numel("")
    assert count.non_embedding == numel("layers.", "norm")


def test_flops_equal_those_counted_by_torch(config: ModelConfig) -> None:
    model = CausalLM(config)
    ids = torch.randint(config.vocab_size, (2, 16))
    # As plain products, so that the counter sees them; they compute the masked half as well.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    width = config.num_attention_heads * config.attention_head_dim
    masked_half = 6 * config.num_hidden_layers * 16 * width
    norms = 6 * count_parameters(config).norm  # no products, counted by custom
    expected = flops_per_token(config, 16) + masked_half - norms
    assert counter.get_total_flops() == expected * ids.numel()


def test_flops_of_a_length_that_cannot_be_are_refused() -> None:
    for seq_len in (0, 17):
        with pytest.raises(ValueError, match=f"seq_len {seq_len} is not between 1 and .* 16"):
            flops_per_token(CONFIG, seq_len)
