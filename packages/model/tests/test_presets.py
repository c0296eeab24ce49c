import pytest
import torch

from tilewright_model import PRESETS, CausalLM, count_parameters, preset

# What each name promises, in parameters in all and, where it says so, active for a token; and how
# far the count may be from it.
PROMISED = {
    "nano": (1.5e6, None, 0.34),  # between one and two million
    "26m": (26e6, None, 0.02),
    "100m": (100e6, None, 0.02),
    "125m": (125e6, None, 0.02),
    "350m": (350e6, None, 0.02),
    "0.5b": (503_367_168, None, 0.0),  # exactly the 16 layers of 1536 that figures are quoted for
    "1.3b": (1.3e9, None, 0.02),
    "2.7b": (2.7e9, None, 0.01),
    "moe-nano": (2.8e6, 1.05e6, 0.05),  # active as large as nano
    "moe-0.5b-a0.15b": (0.5e9, 0.15e9, 0.06),
    "moe-7b-a1b": (6.82e9, 1.18e9, 0.01),
    "llama3-8b": (8_030_261_248, None, 0.0),  # as published
    "qwen3-0.6b": (596_049_920, None, 0.0),
}


def test_every_preset_is_promised_something() -> None:
    assert PRESETS.keys() == PROMISED.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_name_says(name: str) -> None:
    parameters, active, tolerance = PROMISED[name]
    count = count_parameters(preset(name))
    assert count.total == pytest.approx(parameters, rel=tolerance, abs=0)
    assert count.active == pytest.approx(active or parameters, rel=tolerance, abs=0)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_be_built(name: str) -> None:
    with torch.device("meta"):
        model = CausalLM(preset(name))
    count = count_parameters(preset(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == count.total
    assert count.embedding == model.embed_tokens.weight.numel()
    assert (count.lm_head == 0) == (model.lm_head is None)


def test_a_small_vocabulary_makes_768_by_12_no_half_billion() -> None:
    # 12 layers of hidden size 768 at vocabulary 6400 are four times too small for that name.
    config = preset("125m", vocab_size=6400, intermediate_size=3072)
    assert count_parameters(config).total == pytest.approx(118e6, rel=0.01)
    assert 400e6 < count_parameters(preset("0.5b")).total < 600e6


def test_overrides_replace_fields() -> None:
    config = preset("nano", hidden_size=256, vocab_size=100)
    assert (config.hidden_size, config.vocab_size) == (256, 100)
    assert config.attention_head_dim == 64
    assert config.num_hidden_layers == PRESETS["nano"].num_hidden_layers


def test_an_unknown_preset_lists_the_names_and_the_closest() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'nano'\?.*nano, 26m, 100m, 125m, 350m"):
        preset("nanno")


def test_an_unknown_field_names_the_closest() -> None:
    with pytest.raises(TypeError, match=r"no field 'hidden_dim'.*did you mean 'hidden_size'"):
        preset("nano", hidden_dim=64)


def test_overrides_are_checked() -> None:
    with pytest.raises(ValueError, match="hidden_size 130 is not a multiple"):
        preset("nano", hidden_size=130)
