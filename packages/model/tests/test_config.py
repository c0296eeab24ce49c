import dataclasses
import math

import pytest

from tilewright_model import ModelConfig

SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=16,
)


def test_head_dim_follows_hidden_size_unless_given() -> None:
    assert SMALL.attention_head_dim == 8
    assert dataclasses.replace(SMALL, hidden_size=64).attention_head_dim == 16
    assert dataclasses.replace(SMALL, head_dim=6).attention_head_dim == 6
    assert dataclasses.replace(SMALL, head_dim=6, hidden_size=33).attention_head_dim == 6


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.hidden_size = 64  # pyrefly: ignore[read-only]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_size": 34}, ValueError, "hidden_size 34 .* num_attention_heads 4: .* 32 or 40"),
        ({"hidden_size": 3}, ValueError, "use hidden_size 8,"),
        ({"hidden_size": 36}, ValueError, "head_dim 9 is odd.* head_dim 10"),
        ({"head_dim": 7}, ValueError, "head_dim 7 is odd"),
        ({"num_key_value_heads": 3}, ValueError, "num_key_value_heads 3: .* 1, 2, 4"),
        ({"num_key_value_heads": 8}, ValueError, "num_key_value_heads 8: .* 1, 2, 4"),
        ({"vocab_size": 0}, ValueError, "vocab_size is 0"),
        ({"num_hidden_layers": -1}, ValueError, "num_hidden_layers is -1"),
        ({"head_dim": 0}, ValueError, "head_dim is 0"),
        ({"intermediate_size": 48.0}, TypeError, "intermediate_size is 48.0 of type float"),
        ({"max_position_embeddings": True}, TypeError, "max_position_embeddings is True"),
        ({"rms_norm_eps": 0.0}, ValueError, "rms_norm_eps is 0.0"),
        ({"rope_theta": math.nan}, ValueError, "rope_theta is nan"),
        ({"rope_theta": "10000"}, TypeError, "rope_theta is '10000' of type str"),
        ({"tie_word_embeddings": 1}, TypeError, "tie_word_embeddings is 1"),
    ],
)
def test_contradictions_name_the_value_and_the_remedy(
    change: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize("hidden_size", [1, 7, 9, 63, 65])
def test_proposed_hidden_sizes_are_valid(hidden_size: int) -> None:
    with pytest.raises(ValueError, match="use hidden_size") as caught:
        dataclasses.replace(SMALL, hidden_size=hidden_size)
    proposal = str(caught.value).split("use hidden_size ")[1].split(",")[0]
    for proposed in map(int, proposal.split(" or ")):
        assert dataclasses.replace(SMALL, hidden_size=proposed).hidden_size == proposed
