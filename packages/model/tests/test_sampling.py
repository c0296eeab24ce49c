from typing import Any, Literal

import pytest
import torch

from tilewright_kernels import truncation_threshold, use_backend
from tilewright_model.sampling import (
    Sampler,
    SamplingParams,
    candidates_for,
    penalize,
)

CPU = torch.device("cpu")


def draw(logits: torch.Tensor, requests: list[SamplingParams], steps: torch.Tensor) -> torch.Tensor:
    """One token a row of logits [B, V]."""
    batch, vocab = logits.shape
    sampler = Sampler(
        *(batch, vocab, CPU),
        candidates=candidates_for(requests, vocab),
        penalizes=False,
    )
    nothing = torch.zeros(batch, 1, dtype=torch.int64)
    sampler.load(requests, nothing, torch.ones(batch, dtype=torch.int32))
    tokens, log_probs = torch.empty(batch, dtype=torch.int64), torch.empty(batch)
    sampler.draw(logits, steps, tokens_B=tokens, log_probs_B=log_probs)
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
    return tokens


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0},
                {"temperature": 1e-4}], ids=str
)  # fmt: skip
def test_greedy_options_are_equivalent(options: dict[str, Any]) -> None:
    logits = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    request = SamplingParams(seed=0, **options)
    assert torch.equal(draw(logits, [request] * 6, torch.arange(6)), logits.argmax(-1))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        # 0.4 + 0.3 reach 0.7 exactly in the formula: asked for just more and just less.
        ({"top_p": 0.69}, [0, 1]),
        ({"top_p": 0.71}, [0, 1, 2]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        # Of the three kept by top_k, renormalised to 0.44, 0.33, 0.22, two reach 0.75.
        ({"top_k": 3, "top_p": 0.75}, [0, 1]),
        # Half of 0.4 is 0.2, a little more is not.
        ({"min_p": 0.49}, [0, 1, 2]),
        ({"min_p": 0.51}, [0, 1]),
        ({"min_p": 0.2, "top_k": 2}, [0, 1]),
        ({"temperature": 2.0}, [0, 1, 2, 3, 4]),
        # At temperature 2 the square roots count: √0.1 = 0.32 of the likeliest.
        ({"temperature": 2.0, "min_p": 0.3}, [0, 1, 2, 3, 4]),
        ({"temperature": 0.5, "min_p": 0.3}, [0, 1]),
    ],
    ids=str,
)
def test_samples_follow_the_distribution(options: dict[str, Any], kept: list[int]) -> None:
    p = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
    order = torch.tensor([3, 0, 4, 1, 2])  # likeliest first is not the order of the ids
    logits = torch.empty(5).scatter_(0, order, p.log())
    expected = torch.zeros(5)
    expected[order[kept]] = p[kept] ** (1 / options.get("temperature", 1.0))
    expected /= expected.sum()
    draws = 20_000
    requests = [SamplingParams(seed=1, **options)] * draws
    drawn = draw(logits.expand(draws, 5), requests, torch.arange(draws))
    frequencies = drawn.bincount(minlength=5) / draws
    assert (frequencies[expected == 0] == 0).all()
    # Four standard errors of the most uncertain frequency.
    assert (frequencies - expected).abs().max() < 4 * (0.25 / draws) ** 0.5


def test_rows_have_options_of_their_own() -> None:
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).expand(4, 64)
    requests = [
        SamplingParams(seed=9, temperature=0),
        SamplingParams(seed=9, temperature=1.2),
        SamplingParams(seed=9, temperature=1.2, top_k=3),
        SamplingParams(seed=9, temperature=0.7, top_p=0.8, min_p=0.05),
    ]
    for step in range(20):
        steps = torch.full((4,), step)
        together = draw(logits, requests, steps)
        for i, request in enumerate(requests):
            assert draw(logits[:1], [request], steps[:1]) == together[i]


def test_a_greedy_row_is_not_truncated_by_warmth_it_has_not() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0]])
    one = torch.ones(1)
    threshold = truncation_threshold(
        logits, temperature=one * 0, top_k=torch.tensor([3]), top_p=one * 2, min_p=one * 0
    )
    assert threshold.tolist() == [0.0]


def test_selecting_finds_what_sorting_finds() -> None:
    logits = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    options = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 1.0, 2.0]),
        "top_k": torch.tensor([64, 3, 16, 9, 16]),
        "top_p": torch.tensor([2.0, 2.0, 0.5, 0.9, 2.0]),
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.2, 0.1]),
    }
    few = truncation_threshold(logits, **options, candidates=16)
    all_of_them = truncation_threshold(logits, **options)
    assert torch.equal(few[1:], all_of_them[1:])
    assert few[0] <= logits[0].max()  # greedy: whatever is left, the likeliest is


@pytest.mark.parametrize(
    ("requests", "candidates"),
    [
        ([{}, {"temperature": 0, "top_p": 0.5}], 0),
        ([{"top_k": 5}], 8),
        ([{"top_k": 8}, {"temperature": 0}], 8),
        ([{"top_k": 5}, {}], 100),
        ([{"top_k": 5}, {"top_p": 0.9}], 100),
        ([{"top_k": 99}], 100),
        ([{"top_k": 1}], 1),
    ],
    ids=str,
)
def test_as_many_candidates_as_a_batch_needs(
    requests: list[dict[str, Any]], candidates: int
) -> None:
    assert candidates_for([SamplingParams(**r) for r in requests], 100) == candidates


def test_penalty_moves_seen_tokens_down_on_both_sides_of_zero() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0], [1.0, -1.0, 0.0, 3.0]])
    seen = torch.tensor([[True, True, False, False], [False, True, True, False]])
    expected = torch.tensor([[1.0, -4.0, 2.0, -2.0], [1.0, -4.0, 0.0, 3.0]])
    assert torch.equal(penalize(logits, seen, torch.tensor([2.0, 4.0])), expected)


def test_padding_is_not_seen() -> None:
    sampler = Sampler(2, 8, CPU, candidates=0, penalizes=True)
    prompts = torch.tensor([[1, 2, 7], [3, 7, 7]])
    sampler.load([SamplingParams()] * 2, prompts, torch.tensor([2, 1]))
    assert sampler.seen_BV.nonzero().tolist() == [[0, 1], [0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"stop": "end"}, "stop is 'end': give a tuple"),
        ({"stop": ("",)}, "give a tuple of strings that are not empty"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 2.5}, "top_k is 2.5: give an int or None"),
        ({"top_k": True}, "top_k is True"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5: give an int"),
        ({"max_new_tokens": None}, "max_new_tokens is None: give an int"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"temperature": "a"}, "temperature is 'a': give a number"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5: give a tuple of ints"),
        ({"stop_token_ids": (1.0,)}, "stop_token_ids is"),
        ({"stop": ("a", 1)}, "stop is .*: give a tuple of strings"),
    ],
    ids=str,
)
def test_options_of_another_type_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.9}, {"top_k": 3}], ids=str)
def test_the_coldest_rows_take_the_likeliest(
    backend: Literal["torch", "triton"], truncation: dict[str, Any]
) -> None:
    logits = torch.tensor([[30.0, 500.0, 1e4, 3e3, -1e4]])
    request = SamplingParams(temperature=1e-37, seed=3, **truncation)
    candidates = candidates_for([request], 5)
    sampler = Sampler(1, 5, torch.device("cpu"), candidates=candidates, penalizes=False)
    sampler.load([request], torch.tensor([[0]]), torch.tensor([1]))
    token, log_prob = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    with use_backend(backend):
        sampler.draw(logits, torch.tensor([1]), tokens_B=token, log_probs_B=log_prob)
    assert token.item() == 2
    assert log_prob.item() == 0
