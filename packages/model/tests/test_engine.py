import dataclasses
from collections.abc import Generator
from typing import Any, Literal

import pytest
import torch

from tilewright_kernels import use_backend
from tilewright_kernels.testing import count_launches
from tilewright_model import CausalLM, Engine, ModelConfig, SamplingParams
from tilewright_model.stop_strings import StopStrings

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    max_position_embeddings=40,
)
# What the five launches of a step have to know of: each differs from a plain Llama in one thing.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qk norm": {"qk_norm": True},
    "window": {"sliding_window": 6, "layer_types": ("sliding_attention", "full_attention")},
    "softcaps": {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
    "experts": {"num_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "learned positions": {"position_embedding": "learned"},
    "sinusoidal positions": {"position_embedding": "sinusoidal"},
    "no positions": {"position_embedding": "none"},
    "free head": {"tie_word_embeddings": False, "logits_scaling": 2.0},
    "wide heads": {"head_dim": 8},
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2], [7, 1, 8, 2]]
GREEDY = SamplingParams(max_new_tokens=12, temperature=0)


def build(device: torch.device | str = "cpu", **changes: Any) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(dataclasses.replace(CONFIG, **changes))
    # Fresh weights predict nearly the same token everywhere; larger ones make the continuation
    # depend on what came before, so that a wrong cache shows.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20)
    return model.to(device)


def without_cache(model: CausalLM, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities from the whole forward of all before."""
    ids, log_probs = torch.tensor([prompt], device=model.embed_tokens.weight.device), []
    with torch.no_grad():
        for _ in range(tokens):
            logits = model(ids).logits
            assert logits is not None
            best, token = logits[:, -1].float().log_softmax(-1).max(-1)
            log_probs.append(best.item())
            ids = torch.cat([ids, token[:, None]], dim=1)
    return ids[0, len(prompt) :].tolist(), log_probs


@pytest.mark.parametrize("variant", VARIANTS)
def test_unequal_prompts_equal_the_forward_without_cache(
    variant: str, device: torch.device
) -> None:
    model = build(device, **VARIANTS[variant])
    engine = Engine(model, max_batch_size=3)
    completions = engine.generate(PROMPTS, GREEDY)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids, log_probs = without_cache(model, prompt, 12)
        assert completion.token_ids == ids
        torch.testing.assert_close(completion.log_probs, log_probs, rtol=1e-4, atol=1e-4)
        assert completion.finish_reason == "length"
    assert len({t for c in completions for t in c.token_ids}) > 3  # not the same token throughout


@pytest.mark.smoke
def test_alone_and_in_a_batch(device: torch.device) -> None:
    engine = Engine(build(device), max_batch_size=3)
    params = [
        SamplingParams(max_new_tokens=8, temperature=1.3, seed=5),
        SamplingParams(max_new_tokens=12, temperature=0),
        SamplingParams(max_new_tokens=10, temperature=0.9, top_k=9, top_p=0.9, seed=6),
    ]
    together = engine.generate(PROMPTS, params)
    for prompt, request, expected in zip(PROMPTS, params, together, strict=True):
        (alone,) = engine.generate([prompt], request)
        assert alone.token_ids == expected.token_ids
        assert len(alone.token_ids) == request.max_new_tokens
    backwards = engine.generate(PROMPTS[::-1], params[::-1])
    assert [c.token_ids for c in backwards[::-1]] == [c.token_ids for c in together]


@pytest.mark.parametrize("chunk", [1, 2, 4, 9, 100])
def test_prompts_in_chunks(chunk: int, device: torch.device) -> None:
    model = build(device)
    whole = Engine(model, max_batch_size=3).generate(PROMPTS, GREEDY)
    chunked = Engine(model, max_batch_size=3, prefill_chunk=chunk).generate(PROMPTS, GREEDY)
    assert [c.token_ids for c in chunked] == [c.token_ids for c in whole]


def test_kernels_decode_as_torch_does() -> None:
    # The five launches a block of a step, in the interpreter.
    model, request = build(qk_norm=True), SamplingParams(max_new_tokens=4, temperature=0)
    engine = Engine(model, max_batch_size=2)
    with use_backend("torch"):
        expected = engine.generate(PROMPTS[:2], request)
    with use_backend("triton"), count_launches() as launches:
        ours = engine.generate(PROMPTS[:2], request)
    assert [c.token_ids for c in ours] == [c.token_ids for c in expected]
    # Three steps after the prompts; four products a block and the head.
    assert launches["skinny_linear"] == 3 * (2 * 4 + 1)
    assert launches["flash_attn_with_kvcache"] == 3 * 2
    assert launches["sample_categorical"] == 4


def test_stream_brings_what_generate_collects(device: torch.device) -> None:
    engine = Engine(build(device), max_batch_size=3)
    params = [dataclasses.replace(GREEDY, max_new_tokens=n) for n in (3, 1, 7)]
    completions = engine.generate(PROMPTS, params)
    tokens = list(engine.stream(PROMPTS, params))
    for i, completion in enumerate(completions):
        mine = [token for token in tokens if token.index == i]
        assert [token.token_id for token in mine] == completion.token_ids
        assert [token.log_prob for token in mine] == completion.log_probs
        assert [token.finish_reason for token in mine][:-1] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == "length"
    # All requests move together.
    assert [token.index for token in tokens] == [0, 1, 2, 0, 2, 0, 2, 2, 2, 2, 2]


def test_a_stream_may_be_left(device: torch.device) -> None:
    engine = Engine(build(device), max_batch_size=3)
    expected = engine.generate(PROMPTS, GREEDY)
    for token in engine.stream(PROMPTS, GREEDY):
        if token.index == 1:
            break
    assert [c.token_ids for c in engine.generate(PROMPTS, GREEDY)] == [
        c.token_ids for c in expected
    ]


def test_stop_tokens_end_one_request_and_not_the_others() -> None:
    engine = Engine(build(), max_batch_size=3)
    free = engine.generate(PROMPTS, GREEDY)
    end = free[0].token_ids[2]
    first = free[0].token_ids.index(end)
    params = [dataclasses.replace(GREEDY, stop_token_ids=(end, 31)), GREEDY, GREEDY]
    stopped = engine.generate(PROMPTS, params)
    assert stopped[0].token_ids == free[0].token_ids[: first + 1]
    assert stopped[0].finish_reason == "stop"
    assert stopped[1:] == free[1:]


def test_stop_strings_end_the_text_before_them() -> None:
    def decode(ids: list[int]) -> str:
        return "".join(chr(ord("a") + i) if i < 26 else " " for i in ids)

    engine = Engine(build(), max_batch_size=1, decode=decode)
    (free,) = engine.generate(PROMPTS[:1], GREEDY)
    assert free.text == decode(free.token_ids)
    # Two tokens' text, so that neither alone is the string.
    assert free.text is not None
    stop = free.text[4:6]
    at = free.text.index(stop)
    params = dataclasses.replace(GREEDY, stop=("never there", stop))
    (stopped,) = engine.generate(PROMPTS[:1], params)
    assert stopped.text == free.text[:at]
    assert stopped.token_ids == free.token_ids[: at + 2]
    assert stopped.finish_reason == "stop"
    # A stop token is no part of the text.
    params = dataclasses.replace(GREEDY, stop_token_ids=(free.token_ids[0],))
    (ended,) = engine.generate(PROMPTS[:1], params)
    assert (ended.text, ended.token_ids) == ("", free.token_ids[:1])


def test_repetition_penalty_knows_prompt_and_continuation(device: torch.device) -> None:
    engine = Engine(build(device), max_batch_size=2)
    prompts = [[3, 1, 4], [2, 7, 1, 8, 2, 8]]
    params = SamplingParams(max_new_tokens=20, temperature=0, repetition_penalty=1e6)
    for prompt, completion in zip(prompts, engine.generate(prompts, params), strict=True):
        # Nothing is repeated as long as a token with a positive logit is left.
        assert len(set(completion.token_ids[:5]) | set(prompt)) == 5 + len(set(prompt))
    # Log-probabilities are the model's own.
    (ours,) = engine.generate(prompts[:1], params)
    ids = torch.tensor([prompts[0] + ours.token_ids], device=device)
    with torch.no_grad():
        logits = engine.model(ids).logits
    assert logits is not None
    expected = logits[0, 2:-1].float().log_softmax(-1)
    expected = expected.gather(1, ids[0, 3:, None])[:, 0].tolist()
    torch.testing.assert_close(ours.log_probs, expected, rtol=1e-4, atol=1e-4)


def test_a_full_cache_is_used_to_its_last_row(device: torch.device) -> None:
    # 9 + 12 - 1 rows are written; the others end earlier and stay where they are.
    engine = Engine(build(device), max_batch_size=3, max_length=21)
    roomy = Engine(build(device), max_batch_size=3)
    params = [GREEDY, dataclasses.replace(GREEDY, max_new_tokens=20), GREEDY]
    expected = [c.token_ids for c in roomy.generate(PROMPTS, params)]
    assert [c.token_ids for c in engine.generate(PROMPTS, params)] == expected


def test_the_cache_is_allocated_once(device: torch.device) -> None:
    engine = Engine(build(device), max_batch_size=3)
    address = engine.cache.keys.data_ptr()
    for batch in (3, 1, 2, 3):
        engine.generate(PROMPTS[:batch], GREEDY)
    assert engine.cache.keys.data_ptr() == address
    assert (engine.cache.keys[:, 0, :9] != 0).any(-1).all()


def test_new_weights_are_seen(device: torch.device) -> None:
    model = build(device)
    engine = Engine(model, max_batch_size=3)
    before = engine.generate(PROMPTS, GREEDY)
    other = build(device)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.7)
    expected = [without_cache(other, prompt, 12)[0] for prompt in PROMPTS]
    model.load_state_dict(other.state_dict(), assign=True)
    after = engine.generate(PROMPTS, GREEDY)
    assert [c.token_ids for c in after] == expected != [c.token_ids for c in before]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1 / 0.7)
    again = engine.generate(PROMPTS, GREEDY)
    assert [c.token_ids for c in again] == [c.token_ids for c in before]


def test_autocast_and_weights_of_two_dtypes(device: torch.device) -> None:
    model = build(device)
    with torch.autocast(device.type, torch.bfloat16):
        (mixed,) = Engine(model).generate(PROMPTS[:1], GREEDY)
        ids, _ = without_cache(model, PROMPTS[0], 1)
    assert mixed.token_ids[:1] == ids
    assert len(mixed.token_ids) == 12


def test_the_plain_forward_serves_unequal_prompts_too() -> None:
    # Dropout in training takes the model's own forward: with p this small nothing is dropped.
    model = build(residual_dropout=1e-9).train()
    params = [GREEDY, dataclasses.replace(GREEDY, max_new_tokens=3), GREEDY]
    ours = Engine(model, max_batch_size=3, max_length=21).generate(PROMPTS, params)
    expected = Engine(model.eval(), max_batch_size=3).generate(PROMPTS, params)
    assert [c.token_ids for c in ours] == [c.token_ids for c in expected]


def test_nothing_asked_nothing_done() -> None:
    engine = Engine(build())
    assert engine.generate([]) == []
    assert list(engine.stream([])) == []


@pytest.mark.parametrize(
    ("prompts", "params", "error", "message"),
    [
        ([[]], {}, ValueError, "prompt 0 is empty"),
        ([[1], [2]], {}, ValueError, "2 prompts for an engine of 1: .* max_batch_size=2"),
        ([[3, 40]], {}, ValueError, "token 40 is outside the vocabulary of 32"),
        ([[3, -1]], {}, ValueError, "token -1 is outside"),
        ([[3.0]], {}, TypeError, "token 3.0 of prompt 0 is no int"),
        ([[1]], {"stop_token_ids": (99,)}, ValueError, "token 99 is outside"),
        ([[1] * 5], {"max_new_tokens": 16}, ValueError,
         "5 prompt tokens and max_new_tokens 16 exceed max_length 20: .* max_length=21"),
        ([[1]], {"stop": ("x",)}, ValueError, "build the engine with decode="),
    ],
    ids=str,
)  # fmt: skip
def test_bad_requests_are_refused(
    prompts: Any, params: dict[str, Any], error: type[Exception], message: str
) -> None:
    engine = Engine(build(), max_length=20)
    options: dict[str, Any] = {"max_new_tokens": 2} | params
    request = SamplingParams(**options)
    with pytest.raises(error, match=message):
        engine.stream(prompts, request)


def test_bad_engines_are_refused() -> None:
    with pytest.raises(ValueError, match="max_length 41 exceeds max_position_embeddings 40"):
        Engine(build(), max_length=41)
    with pytest.raises(ValueError, match="prefill_chunk is 0"):
        Engine(build(), prefill_chunk=0)
    with pytest.raises(ValueError, match="1 prompts and 2 params"):
        Engine(build()).generate([[1]], [GREEDY, GREEDY])


@pytest.mark.gpu
def test_a_graph_gives_what_steps_of_their_own_give() -> None:
    model = build("cuda")
    params = SamplingParams(max_new_tokens=12, temperature=1.2, top_k=20, seed=3)
    params = dataclasses.replace(params, repetition_penalty=1.1)
    plain = Engine(model, max_batch_size=3, cuda_graph=False).generate(PROMPTS, params)
    engine = Engine(model, max_batch_size=3)
    for _ in range(2):
        assert engine.generate(PROMPTS, params) == plain
    # The second run replayed what the first captured: no launch of ours but those of the prompt.
    with count_launches() as launches:
        engine.generate(PROMPTS, params)
    assert launches["skinny_linear"] == 0


def test_a_second_stream_is_refused_while_one_is_open(device: torch.device) -> None:
    engine = Engine(build(device), max_batch_size=3)
    expected = [c.token_ids for c in engine.generate(PROMPTS, GREEDY)]
    first = engine.stream(PROMPTS, GREEDY)
    begun = next(first)
    for other in (
        lambda: engine.generate(PROMPTS[:1], GREEDY),
        lambda: next(engine.stream([[1]], GREEDY)),
    ):
        with pytest.raises(RuntimeError, match="a stream of this engine is open"):
            other()
    ours = [[begun.token_id], [], []]
    for token in first:
        ours[token.index].append(token.token_id)
    assert ours == expected
    left = engine.stream(PROMPTS, GREEDY)
    next(left)
    assert isinstance(left, Generator)
    left.close()
    assert [c.token_ids for c in engine.generate(PROMPTS, GREEDY)] == expected


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_more_rows_than_the_fused_step_takes(backend: Literal["torch", "triton"]) -> None:
    model = build(num_hidden_layers=1)
    prompts = [[3, 1]] * 64 + [[5]]
    request = SamplingParams(max_new_tokens=2, temperature=0)
    with use_backend("torch"):
        expected = Engine(model, max_batch_size=2).generate(prompts[-2:], request)
    with use_backend(backend):
        ours = Engine(model, max_batch_size=65, max_length=4).generate(prompts, request)
    assert [c.token_ids for c in ours[-2:]] == [c.token_ids for c in expected]


def test_autocast_and_new_dtypes_of_an_engine_that_is_there(device: torch.device) -> None:
    model = build(device)
    engine = Engine(model, max_batch_size=3)
    expected = engine.generate(PROMPTS, GREEDY)
    with torch.autocast(device.type, torch.bfloat16):
        mixed = engine.generate(PROMPTS, GREEDY)
        assert engine.cache.keys.dtype == torch.bfloat16
        assert mixed == Engine(model, max_batch_size=3).generate(PROMPTS, GREEDY)
    assert engine.generate(PROMPTS, GREEDY) == expected
    model.bfloat16()
    engine.generate(PROMPTS, GREEDY)
    assert engine.cache.keys.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_end_with_an_error(
    backend: Literal["torch", "triton"], temperature: float
) -> None:
    model = build(num_hidden_layers=1)
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    engine = Engine(model, max_length=8)
    request = SamplingParams(max_new_tokens=3, temperature=temperature)
    for _ in range(2):
        with (
            use_backend(backend),
            pytest.raises(FloatingPointError, match="new token 0 of prompt 0 are not finite"),
        ):
            engine.generate([[1]], request)


@pytest.mark.parametrize("between", [0, 1, 9, 300])
def test_tokens_without_text_hide_no_stop_string(between: int) -> None:
    def decode(ids: list[int]) -> str:
        return "".join("abc"[i] for i in ids if i < 3)

    stop = StopStrings(decode, ("never", "ab"))
    assert not any(stop.found_with(token) for token in [*[2] * 100, 0, *[9] * between])
    assert stop.found_with(1)


def test_a_long_text_is_not_decoded_again_for_every_token() -> None:
    seen = []

    def decode(ids: list[int]) -> str:
        seen.append(len(ids))
        return "x" * len(ids)

    stop = StopStrings(decode, ("ab",))
    assert not any(stop.found_with(0) for _ in range(2000))
    assert max(seen) < 100
