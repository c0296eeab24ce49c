import pytest
import torch

from tilewright_model import PRESETS, CausalLM, count_parameters, preset

# What each name promises, in parameters, and how far the count may be from it.
PROMISED = {
    "nano": (1.5e6, 0.34),  # between one and two million
    "tiny": (10e6, 0.05),
    "small": (30e6, 0.05),
    "100m": (100e6, 0.05),
    "0.5b": (503_367_168, 0.0),  # exactly the 16 layers of 1536 that figures are quoted for
    "1b": (1e9, 0.05),
    "2.7b": (2.7e9, 0.01),
}


def test_every_preset_is_promised_something() -> None:
    assert PRESETS.keys() == PROMISED.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_name_says(name: str) -> None:
    parameters, tolerance = PROMISED[name]
    assert count_parameters(preset(name)).total == pytest.approx(parameters, rel=tolerance, abs=0)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_be_built(name: str) -> None:
    with torch.device("meta"):
        model = CausalLM(preset(name))
    count = count_parameters(preset(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == count.total
    assert count.embedding == model.embed_tokens.weight.numel()
    assert count.lm_head == 0
    assert model.lm_head is None


def test_overrides_replace_fields() -> None:
    config = preset("nano", hidden_size=256, vocab_size=100)
    assert (config.hidden_size, config.vocab_size) == (256, 100)
    assert config.attention_head_dim == 64
    assert config.num_hidden_layers == PRESETS["nano"].num_hidden_layers


def test_an_unknown_preset_lists_the_names_and_the_closest() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'nano'\?.*nano, tiny, small, 100m, 0.5b"):
        preset("nanno")


def test_an_unknown_field_names_the_closest() -> None:
    with pytest.raises(TypeError, match=r"no field 'hidden_dim'.*did you mean 'hidden_size'"):
        preset("nano", hidden_dim=64)


def test_overrides_are_checked() -> None:
    with pytest.raises(ValueError, match="hidden_size 130 is not a multiple"):
        preset("nano", hidden_size=130)
