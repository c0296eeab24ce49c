"""Bytes in closed form against what autograd packs and what a cache allocates."""

import dataclasses

import pytest
import torch
from torch import Tensor

from tilewright_kernels import use_backend
from tilewright_model import (
    CausalLM,
    KVCache,
    ModelConfig,
    activation_bytes,
    count_parameters,
    kv_cache_bytes,
    logits_bytes,
    memory_estimate,
    optimizer_bytes,
    preset,
)
from tilewright_model.memory import Recompute

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
)
VARIANTS = {
    "grouped": CONFIG,
    "qk-norm": dataclasses.replace(CONFIG, qk_norm=True, head_dim=16),
    "unrotated": dataclasses.replace(CONFIG, position_embedding="none"),
    "experts": dataclasses.replace(
        CONFIG, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}
BATCH, LENGTH = 2, 16


def packed_bytes(model: CausalLM) -> int:
    """What autograd keeps of a forward besides parameters, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own |= {b.untyped_storage().data_ptr() for b in model.buffers()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if (pointer := x.untyped_storage().data_ptr()) not in own:
            kept[pointer] = x
        return x

    ids = torch.randint(40, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(ids, labels=ids).loss
    # The gradient of the weight that the loss computes is a gradient, counted as one.
    shape = model.embed_tokens.weight.shape
    found = sum(x.untyped_storage().nbytes() for x in kept.values() if x.shape != shape)
    del loss
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_activations_are_what_autograd_packs(variant: str) -> None:
    torch.manual_seed(0)
    config = VARIANTS[variant]
    found = packed_bytes(CausalLM(config))
    expected = activation_bytes(config, BATCH, LENGTH, dtype=torch.float32)
    # Targets, seeds and sums of a few numbers are not counted.
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_keeps_what_is_left(mode: Recompute) -> None:
    torch.manual_seed(0)
    model = CausalLM(CONFIG)
    model.recompute = mode
    found = packed_bytes(model)
    expected = activation_bytes(CONFIG, BATCH, LENGTH, dtype=torch.float32, recompute=mode)
    # The hooks see what is kept between forward and backward; the block under way comes on top.
    whole = activation_bytes(CONFIG, BATCH, LENGTH, dtype=torch.float32)
    one = dataclasses.replace(CONFIG, num_hidden_layers=1)
    block = activation_bytes(one, BATCH, LENGTH, dtype=torch.float32)
    assert found < expected < whole
    assert expected - found < block


def test_activations_grow_with_tokens_and_no_faster() -> None:
    config = preset("0.5b")
    once = activation_bytes(config, 1, 512)
    assert activation_bytes(config, 4, 512) == activation_bytes(config, 1, 2048) == 4 * once


@pytest.mark.parametrize(
    ("optimizer", "master", "bytes_each"),
    [
        ("none", True, 0),
        ("adamw", False, 8),
        ("adamw", True, 10),
        ("adamw_bf16", True, 6),
        ("adamw_int8", True, 2 + 2 + 2 * 4 / 256),
    ],
)
def test_states_of_adam(optimizer, master: bool, bytes_each: float) -> None:
    total = count_parameters(CONFIG).total
    expected = pytest.approx(bytes_each * total, abs=1)
    assert optimizer_bytes(CONFIG, optimizer, master=master) == expected


def test_muon_keeps_one_momentum_of_hidden_matrices() -> None:
    count = count_parameters(CONFIG)
    hidden = count.attention + count.mlp
    expected = 4 * hidden + 8 * (count.total - hidden)
    assert optimizer_bytes(CONFIG, "muonw", dtype=torch.float32) == expected


def test_the_cache_is_as_large_as_said() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        cache = KVCache(CONFIG, 3, 20, dtype=dtype)
        assert kv_cache_bytes(CONFIG, 3, 20, dtype=dtype) == cache.keys.nbytes + cache.values.nbytes


def test_logits_come_in_chunks_unless_kept() -> None:
    whole = 32768 * 32768 * 2
    assert logits_bytes(preset("0.5b"), 32768, kept=True) == whole
    assert logits_bytes(preset("0.5b"), 32768) == whole // 5
    assert logits_bytes(preset("0.5b"), 2048) == 64 * 2**20
    assert logits_bytes(preset("0.5b"), 16) == 16 * 32768 * 2


def test_an_estimate_is_the_sum_of_its_parts() -> None:
    config = preset("0.5b")
    estimate = memory_estimate(config, 16, 2048)
    assert estimate.weights == estimate.gradients == 2 * 503_367_168
    assert estimate.optimizer == 10 * 503_367_168
    parts = estimate.weights + estimate.gradients + estimate.optimizer
    assert estimate.total == parts + estimate.activations + estimate.logits
    less = memory_estimate(config, 16, 2048, recompute="full")
    assert less.activations < 0.15 * estimate.activations


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 0"):
        memory_estimate(CONFIG, 0, 16)
    with pytest.raises(ValueError, match="optimizer is 'sgd': choose one of none, adamw"):
        optimizer_bytes(CONFIG, "sgd")  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match="recompute is 'some'"):
        activation_bytes(CONFIG, 1, 1, recompute="some")  # pyrefly: ignore[bad-argument-type]
    for batch_size, tokens in ((-1, 5), (1, 0), (1, 10**6)):
        with pytest.raises(ValueError, match="max_length"):
            kv_cache_bytes(CONFIG, batch_size, tokens)
    with pytest.raises(ValueError, match="seq_len 1000000 exceeds max_position_embeddings"):
        memory_estimate(CONFIG, 1, 10**6)
