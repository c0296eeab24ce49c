import math
from typing import Any

import pytest
import torch

from tilewright_model import RopeScaling, preset
from tilewright_model.rope_scaling import rotary_frequencies
from tilewright_model.rotary import rotary_tables

D, THETA = 16, 10000.0


def plain() -> torch.Tensor:
    return rotary_frequencies(D, THETA)


def scaled(**values: Any) -> torch.Tensor:
    return rotary_frequencies(D, THETA, RopeScaling(**values))


def test_unscaled_frequencies_are_those_of_the_formula() -> None:
    expected = [THETA ** (-2 * i / D) for i in range(D // 2)]
    torch.testing.assert_close(plain(), torch.tensor(expected))


def test_linear_divides_every_frequency() -> None:
    torch.testing.assert_close(scaled(rope_type="linear", factor=4.0), plain() / 4)


def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest() -> None:
    frequencies = scaled(rope_type="ntk", factor=4.0)
    ratio = plain() / frequencies
    assert ratio[0] == 1
    assert ratio[-1].item() == pytest.approx(4.0, rel=1e-5)
    assert (ratio[1:] > ratio[:-1]).all()


def test_yarn_stays_between_keeping_and_dividing() -> None:
    frequencies = scaled(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=256, truncate=False
    )
    turns = 256 * plain() / (2 * math.pi)
    fast, slow = turns > 32, turns < 1
    assert fast.any()
    assert slow.any()
    assert (~fast & ~slow).any()
    torch.testing.assert_close(frequencies[fast], plain()[fast])
    torch.testing.assert_close(frequencies[slow], plain()[slow] / 4)
    between = plain()[~fast & ~slow] / frequencies[~fast & ~slow]
    assert ((between > 1) & (between < 4)).all()


def test_yarn_scales_the_tables_so_that_scores_grow() -> None:
    scaling = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    cos, sin = rotary_tables(D, 300, THETA, scaling)
    factor = 0.1 * math.log(4.0) + 1
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, factor**2))
    given = RopeScaling(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=2.0
    )
    cos, sin = rotary_tables(D, 300, THETA, given)
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, 4.0))


def test_llama3_divides_long_waves_and_keeps_short_ones() -> None:
    frequencies = scaled(
        rope_type="llama3",
        factor=8.0,
        original_max_position_embeddings=256,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    waves = 2 * math.pi / plain()
    long, short = waves > 256, waves < 64
    assert long.any()
    assert short.any()
    torch.testing.assert_close(frequencies[long], plain()[long] / 8)
    torch.testing.assert_close(frequencies[short], plain()[short])
    for i in torch.nonzero(~long & ~short).flatten():
        smooth = (256 / waves[i] - 1) / 3
        expected = (1 - smooth) * plain()[i] / 8 + smooth * plain()[i]
        torch.testing.assert_close(frequencies[i], expected)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, ValueError, "'dynamic': choose one of linear"),
        ({"rope_type": "linear", "factor": 0.5}, ValueError, "factor is 0.5: give 1 or more"),
        ({"rope_type": "linear", "factor": "2"}, TypeError, "factor is '2'"),
        ({"rope_type": "yarn", "factor": 2.0}, ValueError, "yarn needs original_max_position"),
        ({"rope_type": "llama3", "factor": 2.0}, ValueError, "llama3 needs original_max_position"),
        (
            {
                "rope_type": "llama3",
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "low_freq_factor": 4.0,
            },
            ValueError,
            "low_freq_factor 4.0 must be below high_freq_factor 4.0",
        ),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0},
            ValueError,
            "original_max_position_embeddings is 0",
        ),
    ],
    ids=str,
)
def test_bad_constants_are_refused(values: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RopeScaling(**values)


def test_yarn_with_a_base_of_one_is_refused() -> None:
    scaling = RopeScaling(rope_type="yarn", factor=2.0, original_max_position_embeddings=128)
    with pytest.raises(ValueError, match=r"rope_theta is 1\.0 and rope_type 'yarn'"):
        preset("nano", rope_theta=1.0, rope_scaling=scaling)
