import dataclasses
from typing import Any

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


@pytest.mark.parametrize("head_dim", [4, 8, 10])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rows_are_written_where_they_belong(head_dim: int, dtype: torch.dtype) -> None:
    # From a joint projection, whose rows lie apart; of 10 or 4 no whole number is 16 bytes.
    config = dataclasses.replace(CONFIG, head_dim=head_dim)
    cache = KVCache(config, 2, 12, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 5, 8, head_dim, generator=generator).to(dtype)
    cache.advance(3)
    layer = cache.layers(5)[1]
    keys, values = layer.append(qkv[:, :, 4:6], qkv[:, :, 6:])
    assert keys.shape == (2, 8, 2, head_dim)
    for held, new in ((keys, qkv[:, :, 4:6]), (values, qkv[:, :, 6:])):
        assert torch.equal(held[:, 3:], new)
        assert (held[:, :3] == 0).all()
    assert (cache.keys[0] == 0).all()
    assert (cache.values[1, :, 8:] == 0).all()


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


def test_sequences_of_unequal_lengths_go_on_from_their_ends() -> None:
    torch.manual_seed(0)
    model, cache = CausalLM(CONFIG), KVCache(CONFIG, 2, 12)
    padded, more, one = (torch.randint(32, (2, n)) for n in (6, 3, 1))
    with torch.no_grad():
        model(padded, cache=cache)
        cache.truncate([6, 2])
        assert (cache.position, cache.ragged, cache.lengths.tolist()) == (6, True, [6, 2])
        several = model(more, cache=cache).logits
        single = model(one, cache=cache).logits
        assert cache.lengths.tolist() == [10, 6]
        for row, length in enumerate((6, 2)):
            ids = torch.cat([padded[row, :length], more[row], one[row]])[None]
            expected = model(ids).logits
            assert several is not None
            assert single is not None
            assert expected is not None
            torch.testing.assert_close(several[row], expected[0, length : length + 3])
            torch.testing.assert_close(single[row], expected[0, length + 3 :])


def test_equal_lengths_are_not_ragged() -> None:
    cache = KVCache(CONFIG, 2, 12)
    cache.advance(7)
    assert cache.truncate([5, 5]).position_ids(2) is None
    cache.truncate([5, 3])
    assert cache.ragged
    ids = cache.position_ids(2)
    assert ids is not None
    assert ids.tolist() == [[5, 6], [3, 4]]
    cache.reset()
    assert (cache.position, cache.ragged, cache.lengths.tolist()) == (0, False, [0, 0])


def test_a_part_shares_the_memory_and_not_the_lengths() -> None:
    cache = KVCache(CONFIG, 3, 8)
    part = cache.first(2)
    part.keys += 1
    part.advance(4)
    assert part.batch_size == 2
    assert (cache.keys[:, :2] == 1).all()
    assert (cache.keys[:, 2:] == 0).all()
    assert cache.lengths.tolist() == [0, 0, 0]
    assert cache.nbytes == 2 * 2 * 3 * 8 * 2 * 4 * 4
    with pytest.raises(ValueError, match="batch_size 4 of a cache of 3"):
        cache.first(4)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([5], "1 lengths for 2 sequences"),
        ([5, 8], "length 8 of a sequence of 7 tokens: give 0 to 7"),
        ([-1, 5], "length -1"),
    ],
)
def test_impossible_lengths_are_refused(lengths: list[int], message: str) -> None:
    cache = KVCache(CONFIG, 2, 12)
    cache.advance(7)
    with pytest.raises(ValueError, match=message):
        cache.truncate(lengths)


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


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 3}, {"head_dim": 2}], ids=str)
def test_the_cache_of_another_model_is_refused_at_the_door(fields: dict[str, Any]) -> None:
    cache = KVCache(dataclasses.replace(CONFIG, **fields), 1, 6)
    with torch.no_grad(), pytest.raises(ValueError, match=r"the cache is for .* build it with"):
        CausalLM(CONFIG)(torch.zeros(1, 4, dtype=torch.int64), cache=cache)
    assert not cache.keys.any()


def test_a_cache_of_integers_is_refused() -> None:
    with pytest.raises(TypeError, match=r"dtype is torch\.int64"):
        KVCache(CONFIG, 1, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    "given",
    [
        {"attention_mask": torch.tensor([[0, 0, 1, 1, 1]])},
        {"cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32)},
    ],
    ids=["padded", "packed"],
)
def test_padding_and_packing_are_refused_with_an_empty_cache(given: dict[str, Any]) -> None:
    ids, cache = torch.arange(5)[None], KVCache(CONFIG, 1, 8)
    with torch.no_grad(), pytest.raises(ValueError, match=r"without a cache.* with Engine"):
        CausalLM(CONFIG)(ids, cache=cache, **given)
    assert cache.position == 0
