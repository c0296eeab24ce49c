"""The validation loss is the mean over all predictions; a sample begins with its prompt."""

import dataclasses

import pytest
import torch

from tilewright_dist import DistributedEnvironment
from tilewright_model import CausalLM, preset
from tilewright_train.batches import WindowRows
from tilewright_train.data import ValidationRows
from tilewright_train.evaluation import draw_sample, validate
from tilewright_train.objectives import NextToken
from tilewright_train.samples import Samples
from tilewright_train.tokenizer import train_tokenizer

FP32 = torch.autocast("cpu", enabled=False)
ALONE = DistributedEnvironment(device=torch.device("cpu"))


@pytest.fixture
def model() -> CausalLM:
    torch.manual_seed(0)
    shape = preset(
        "nano", vocab_size=260, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32, max_position_embeddings=24,
    )  # fmt: skip
    return CausalLM(shape)


def test_the_loss_does_not_depend_on_how_rows_are_grouped(model: CausalLM) -> None:
    tokens = torch.randint(260, (7 * 8 + 1,), generator=torch.Generator().manual_seed(0))
    samples = Samples(tokens, torch.tensor([tokens.numel()]))
    rows = WindowRows(samples, seq_len=9, seed=None, document_mask=False)
    ids = rows.read(range(7)).input_ids
    expected = model(ids, labels=ids).loss.item()
    everything = ValidationRows(parts=((rows, tuple(range(7))),))
    two = ValidationRows(parts=((rows, (0, 1, 2)), (rows, (3, 4, 5, 6))))
    for batch_size in (1, 3, 7, 100):
        for parts in (everything, two):
            measured = validate(
                NextToken(), model, parts, batch_size=batch_size, environment=ALONE, autocast=FP32
            )
            assert measured.loss == pytest.approx(expected, rel=1e-6)


def test_what_belongs_to_training_alone_is_left_out(model: CausalLM) -> None:
    config = dataclasses.replace(model.config, num_experts=4, router_aux_loss_coef=1.0)
    torch.manual_seed(0)
    dry = CausalLM(config)
    wet = CausalLM(dataclasses.replace(config, residual_dropout=0.5, attention_dropout=0.5))
    wet.load_state_dict(dry.state_dict())
    tokens = torch.randint(260, (3 * 8 + 1,), generator=torch.Generator().manual_seed(0))
    samples = Samples(tokens, torch.tensor([tokens.numel()]))
    rows = WindowRows(samples, seq_len=9, seed=None, document_mask=False)
    parts = ValidationRows(parts=((rows, (0, 1, 2)),))
    ids = rows.read(range(3)).input_ids
    expected = dry.eval()(ids, labels=ids).loss.item()  # neither dropout nor the routers' losses
    measured = validate(NextToken(), wet, parts, batch_size=3, environment=ALONE, autocast=FP32)
    assert measured.metrics == {}
    assert measured.loss == pytest.approx(expected, rel=1e-6)
    assert wet.training


def test_a_sample_begins_with_its_prompt_and_depends_on_the_seed(model: CausalLM) -> None:
    tokenizer = train_tokenizer(["def f(): pass"] * 3, 260)

    def sample(prompt: str, seed: int, tokens: int = 10) -> str:
        return draw_sample(model, tokenizer, prompt=prompt, tokens=tokens, seed=seed, autocast=FP32)

    assert sample("def ", 0).startswith("def ")
    assert sample("def ", 0) == sample("def ", 0) != sample("def ", 1)
    assert sample("", 0) != ""
    # More than the model has positions: the prompt is cut from the left, the sample is shorter.
    assert sample("def f(): " * 20, 0, tokens=1000).startswith("def f(): " * 20)
