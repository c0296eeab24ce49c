"""What is first to be not finite, by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tilewright_model import CausalLM, ModelConfig
from tilewright_train.batches import Batch
from tilewright_train.guilty import MOST_KEPT, LeftOut, find_guilty, keep_batch

NAN = float("nan")
CONFIG = ModelConfig(
    vocab_size=20,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=16,
    max_position_embeddings=16,
)


@pytest.fixture
def model() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(CONFIG)


def guilty(model: CausalLM) -> str | None:
    ids = torch.arange(8).view(1, 8)

    def loss() -> Tensor:
        value = model(ids, labels=ids).loss
        assert value is not None
        return value

    return find_guilty(model, loss)


def test_a_sound_model_is_not_accused_and_nothing_is_left_behind(model: CausalLM) -> None:
    state = torch.get_rng_state()
    assert guilty(model) is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())


def test_the_first_broken_parameter_is_named(model: CausalLM) -> None:
    with torch.no_grad():
        model.get_parameter("layers.1.mlp.down_proj.weight")[0, :3] = NAN
        model.get_parameter("norm.weight")[0] = NAN
    assert guilty(model) == ("parameter layers.1.mlp.down_proj.weight (3 of 256 values not finite)")


def test_the_first_module_that_returns_it_is_named(model: CausalLM) -> None:
    broken = model.layers[1].get_submodule("self_attn.o_proj")
    broken.register_forward_hook(lambda module, inputs, output: output * NAN)
    assert guilty(model) == "output of layers.1.self_attn.o_proj"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_blocks_are_looked_into(model: CausalLM) -> None:
    with torch.no_grad():
        for weight in model.layers[0].get_submodule("mlp").parameters():
            weight.fill_(3e38)  # finite, and no product with it is
    expected = guilty(model)
    assert expected is not None
    assert expected.startswith("output of layers.0.mlp")
    for layer in model.layers:
        layer.compile(fullgraph=True, backend="eager")
    model(torch.arange(8).view(1, 8))
    assert guilty(model) == expected


class _NanBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        return gradients[0] * NAN


def test_of_gradients_the_one_nearest_to_the_loss_is_named(model: CausalLM) -> None:
    def hook(module: nn.Module, inputs: tuple, output: tuple) -> tuple:
        return _NanBackward.apply(output[0]), output[1]

    model.layers[0].register_forward_hook(hook)
    assert guilty(model) == "gradient of layers.0.mlp.down_proj.weight"


def test_a_batch_is_kept_with_what_is_known(tmp_path: Path) -> None:
    ids = torch.arange(6).view(2, 3)
    batch = Batch(input_ids=ids, labels=ids, targets=4, tokens=6)
    for step in range(1, MOST_KEPT + 1):
        left_out = LeftOut(step, "not finite", NAN, 1.5, 0.1, 1, 1.0)
        place = keep_batch(tmp_path, left_out, "loss", 0, batch)
        assert place is not None
    facts = json.loads((tmp_path / "step-000003" / "step.json").read_text())
    assert (facts["step"], facts["loss"], facts["norm"], facts["guilty"]) == (3, "nan", 1.5, "loss")
    kept = load_file(tmp_path / "step-000003" / "batch.safetensors")
    assert torch.equal(kept["input_ids"], ids)
    assert keep_batch(tmp_path, LeftOut(99, "spike", 1.0, 1.0, 0.1, 1, 1.0), None, 0, batch) is None


def test_an_overflow_of_the_loss_scale_is_no_fault() -> None:
    assert LeftOut(1, "not finite", 2.0, float("inf"), 0.1, 1, 65536.0).is_overflow
    assert not LeftOut(1, "not finite", NAN, NAN, 0.1, 1, 65536.0).is_overflow
    assert not LeftOut(1, "not finite", 2.0, NAN, 0.1, 1, 1.0).is_overflow
    assert not LeftOut(1, "spike", 9.0, 1.0, 0.1, 1, 65536.0).is_overflow
