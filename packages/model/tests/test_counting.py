import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tilewright_model import (
    CausalLM,
    ModelConfig,
    count_parameters,
    flops_per_token,
    model_flops_utilization,
    preset,
)

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
    "qk-norm": dataclasses.replace(CONFIG, qk_norm=True),
    "learned": dataclasses.replace(CONFIG, position_embedding="learned"),
    # Experts of 10 columns: torch's grouped product, which its counter does not know, takes none.
    "experts": dataclasses.replace(
        CONFIG, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=10
    ),
    "mixed": dataclasses.replace(
        CONFIG,
        num_experts=4,
        moe_intermediate_size=10,
        num_shared_experts=2,
        first_k_dense_replace=1,
    ),
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
    assert count.position == numel("embed_positions")
    assert count.attention == numel("qkv_proj", "o_proj")
    assert count.mlp == numel("mlp.gate_up_proj", "mlp.down_proj", "shared_experts")
    assert count.experts == numel(".experts.")
    assert count.router == numel("mlp.gate.")
    assert count.norm == numel("norm")
    assert count.lm_head == numel("lm_head")
    assert count.total == numel("")
    assert count.non_embedding == numel("layers.", "norm")


def test_active_parameters_are_those_that_one_token_gives_gradients(config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = CausalLM(config).eval()
    ids = torch.tensor([[3]])
    model(ids).logits.logsumexp(-1).sum().backward()
    active = 0
    for name, parameter in model.named_parameters():
        if ".experts." in name:  # those with a gradient
            assert parameter.grad is not None
            active += sum(e.numel() for e in parameter.grad if e.abs().sum() > 0)
        else:
            active += parameter.numel()
    assert count_parameters(config).active == active


def test_flops_equal_those_counted_by_torch(config: ModelConfig) -> None:
    model = CausalLM(config).eval()
    ids = torch.randint(config.vocab_size, (2, 16))
    # As plain products, so that the counter sees them; they compute the masked half as well.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    norms = 6 * count_parameters(config).norm  # no products, counted by custom
    expected = flops_per_token(config, 16, causal=False) - norms
    assert counter.get_total_flops() == expected * ids.numel()


def test_the_mask_hides_half_and_a_window_more() -> None:
    width, layers, length = 24, 3, 16
    full = flops_per_token(CONFIG, length, causal=False)
    assert full - flops_per_token(CONFIG, length) == 6 * layers * length * width
    narrow = dataclasses.replace(CONFIG, sliding_window=4)
    products = flops_per_token(CONFIG, length) - 6 * layers * length * width
    # Of 16 queries each sees 4 · (1 - 4/32) = 3.5 keys on average, half of the last counted.
    assert flops_per_token(narrow, length) == products + 12 * layers * width * 3.5
    kinds = ("sliding_attention", "full_attention", "full_attention")
    mixed = dataclasses.replace(narrow, layer_types=kinds)
    assert flops_per_token(mixed, length) == products + 12 * width * (3.5 + 8 + 8)


def test_utilization_is_a_share_of_the_peak() -> None:
    # Published: the 503 M decoder of 16 layers at 152 k tokens/s is 51 % of 989 TFLOP/s.
    assert model_flops_utilization(preset("0.5b"), 2048, 152e3) == pytest.approx(0.51, abs=0.005)
    assert model_flops_utilization(CONFIG, 8, 1.0, 1.0) == flops_per_token(CONFIG, 8)
    with pytest.raises(ValueError, match="tokens_per_second 0 and peak_flops"):
        model_flops_utilization(CONFIG, 8, 0)


def test_flops_of_a_length_that_cannot_be_are_refused() -> None:
    for seq_len in (0, 17):
        with pytest.raises(ValueError, match=f"seq_len {seq_len} is not between 1 and .* 16"):
            flops_per_token(CONFIG, seq_len)
