import pytest
import torch

from tilewright_model import CausalLM, KVCache, ModelConfig

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
)


def test_is_allocated_once() -> None:
    torch.manual_seed(0)
    model, cache = CausalLM(CONFIG), KVCache(CONFIG, 3, 8)
    assert cache.keys.shape == cache.values.shape == (2, 3, 8, 2, 4)  # [L, B, S, K, D]
    assert (cache.batch_size, cache.max_length, cache.position) == (3, 8, 0)
    addresses = cache.keys.data_ptr(), cache.values.data_ptr()
    with torch.no_grad():
        model(torch.randint(32, (3, 5)), cache=cache)
        model(torch.randint(32, (3, 1)), cache=cache)
    assert (cache.keys.data_ptr(), cache.values.data_ptr()) == addresses
    assert cache.position == 6
    assert (cache.keys[:, :, :6] != 0).any(-1).all()
    assert (cache.keys[:, :, 6:] == 0).all()


def test_starts_over_after_reset() -> None:
    torch.manual_seed(0)
    model, cache = CausalLM(CONFIG), KVCache(CONFIG, 1, 8)
    first, second = torch.randint(32, (2, 1, 8)).unbind(0)
    with torch.no_grad():
        model(first, cache=cache)
        cache.reset()
        assert cache.position == 0
        again = model(second[:, :3], cache=cache).logits
        torch.testing.assert_close(again, model(second[:, :3]).logits)


def test_overflow_names_the_lengths_and_writes_nothing() -> None:
    model, cache = CausalLM(CONFIG), KVCache(CONFIG, 1, 6)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.int64), cache=cache)
        before = cache.keys.clone()
        with pytest.raises(ValueError, match=r"holds 4 of 6 tokens and 3 more .* max_length=7"):
            model(torch.ones(1, 3, dtype=torch.int64), cache=cache)
    assert torch.equal(cache.keys, before)
    assert cache.position == 4


def test_another_batch_size_is_refused() -> None:
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="batch size 2 for a cache of batch size 1"),
    ):
        CausalLM(CONFIG)(torch.zeros(2, 4, dtype=torch.int64), cache=KVCache(CONFIG, 1, 6))


def test_another_dtype_is_refused() -> None:
    cache = KVCache(CONFIG, 1, 6, dtype=torch.bfloat16)
    with torch.no_grad(), pytest.raises(TypeError, match=r"build it with dtype=torch\.float32"):
        CausalLM(CONFIG)(torch.zeros(1, 4, dtype=torch.int64), cache=cache)


@pytest.mark.parametrize(
    ("batch_size", "max_length", "message"),
    [
        (0, 4, "batch_size 0"),
        (1, 0, "max_length 0"),
        (1, 13, "max_length 13 exceeds max_position_embeddings 12"),
    ],
)
def test_impossible_sizes_are_refused(batch_size: int, max_length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVCache(CONFIG, batch_size, max_length)
