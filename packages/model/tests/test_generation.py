import dataclasses
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tilewright_model import CausalLM, ModelConfig, decode_step, generate

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    max_position_embeddings=24,
)


def build(device: torch.device | str = "cpu", config: ModelConfig = CONFIG) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(config)
    # Fresh weights predict nearly the same token everywhere; larger ones make the continuation
    # depend on what came before, so that a wrong cache shows.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(20)
    return model.to(device)


def prompts(batch: int = 3, length: int = 5, device: torch.device | str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(32, (batch, length), generator=generator).to(device)


@pytest.mark.smoke
def test_greedy_with_a_cache_equals_greedy_without(device: torch.device) -> None:
    model, ids = build(device), prompts(device=device)
    generated = generate(model, ids, max_new_tokens=10, temperature=0)
    with torch.no_grad():
        for _ in range(10):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, ids)
    assert len(generated[:, 5:].unique()) > 3  # not the same token throughout


def test_norms_that_products_hand_on_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where there is no Hopper they are made by operators one by one.
    model, ids = build(config=dataclasses.replace(CONFIG, hidden_size=64)), prompts()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand(parameter.shape) + 0.5)
    expected = generate(model, ids, max_new_tokens=10, temperature=0)
    asked: list[bool] = []
    monkeypatch.setattr(decode_step, "hands_norm_on", lambda *_: not asked.append(True))
    assert torch.equal(generate(model, ids, max_new_tokens=10, temperature=0), expected)
    assert asked


def test_a_batch_equals_its_rows() -> None:
    model, ids = build(), prompts()
    together = generate(model, ids, max_new_tokens=8, temperature=0)
    for row in range(3):
        alone = generate(model, ids[row : row + 1], max_new_tokens=8, temperature=0)
        assert torch.equal(together[row : row + 1], alone)


def test_a_seed_fixes_the_sample(device: torch.device) -> None:
    model, ids = build(device), prompts(device=device)

    def draw(seed: int | list[int] | None) -> torch.Tensor:
        return generate(model, ids, max_new_tokens=12, temperature=1.5, seed=seed)

    assert torch.equal(draw(0), draw(0))
    assert torch.equal(draw(0), draw([0, 1, 2]))
    assert not torch.equal(draw(0), draw(1))
    torch.manual_seed(3)
    first = draw(None)
    assert not torch.equal(first, draw(None))
    torch.manual_seed(3)
    assert torch.equal(first, draw(None))


def test_rows_draw_apart() -> None:
    ids = prompts(batch=1).expand(4, 5)
    drawn = generate(build(), ids, max_new_tokens=12, temperature=1.5, seed=0)
    assert len(drawn.unique(dim=0)) == 4


def test_a_row_that_has_ended_is_filled_and_the_last_one_ends_the_batch() -> None:
    model, ids = build(), prompts()
    free = generate(model, ids, max_new_tokens=10, temperature=0)
    # End at a token that the first row produces early.
    end = int(free[0, 6])
    ended = generate(model, ids, max_new_tokens=10, temperature=0, eos_token_id=end)
    first = [(row[5:] == end).nonzero() for row in free]
    lengths = [int(hits[0]) + 1 if len(hits) else 10 for hits in first]
    assert ended.shape[1] == 5 + max(lengths)
    for row, length in enumerate(lengths):
        assert torch.equal(ended[row, : 5 + length], free[row, : 5 + length])
        assert (ended[row, 5 + length :] == end).all()


def test_compiled_blocks_are_not_compiled_again_for_every_length() -> None:
    model, ids = build(), prompts()
    expected = generate(model, ids, max_new_tokens=6, temperature=0)
    torch.compiler.reset()
    counter = CompileCounter()
    for block in model.layers:
        block.compile(fullgraph=True, dynamic=False, backend=counter)
    assert torch.equal(generate(model, ids, max_new_tokens=6, temperature=0), expected)
    assert counter.frame_count == 0
    with torch.no_grad():
        model(ids)
    assert counter.frame_count == 1


def test_autocast_is_honoured(device: torch.device) -> None:
    model, ids = build(device), prompts(device=device)
    with torch.autocast(device.type, torch.bfloat16):
        mixed = generate(model, ids, max_new_tokens=4, temperature=0)
        first = model(ids).logits[:, -1].argmax(-1)
    assert torch.equal(mixed[:, 5], first)


def test_result_may_be_trained_on() -> None:
    model = build()
    ids = generate(model, prompts(), max_new_tokens=3)
    model(ids, labels=ids).loss.backward()
    assert model.embed_tokens.weight.grad is not None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "temperature is -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"top_k": 0}, ValueError, "top_k is 0"),
        ({"top_p": 0.0}, ValueError, "top_p is 0.0"),
        ({"top_p": 1.5}, ValueError, "top_p is 1.5"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
        ({"max_new_tokens": 20}, ValueError, "5 prompt tokens and max_new_tokens 20 exceed .* 24"),
        ({"seed": [1, 2]}, ValueError, "2 seeds for 3 rows"),
        ({"eos_token_id": 32}, ValueError, "token 32 is outside the vocabulary of 32"),
        ({"input_ids": torch.tensor([[3, 40]])}, ValueError, "token 40 is outside"),
        ({"input_ids": torch.tensor([[3, -1]])}, ValueError, "token -1 is outside"),
        ({"input_ids": torch.tensor([3, 4])}, ValueError, r"input_ids is \[2\]"),
        ({"input_ids": torch.tensor([[3.0]])}, TypeError, "input_ids is torch.float32"),
    ],
    ids=str,
)
def test_bad_requests_are_refused(options: dict, error: type[Exception], message: str) -> None:
    request: dict[str, Any] = {"input_ids": prompts(), "max_new_tokens": 2, **options}
    with pytest.raises(error, match=message):
        generate(build(), request.pop("input_ids"), **request)
