"""Batches of requests with unequal prompts and options, from one cache and one graph a batch size.

    engine = Engine(model, max_batch_size=8, max_length=2048)
    for completion in engine.generate([[1, 5, 9], [1, 7]], SamplingParams(temperature=0.7)):
        print(completion.token_ids, completion.finish_reason)

Prompts are padded at the end and read together, in chunks; then all sequences go on token by token.
The host launches a step before it looks at the tokens of the one before, so it is never waited for.
What a request gets does not depend on the others in its batch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from tilewright_model.causal_lm import CausalLM
from tilewright_model.kv_cache import KVCache, computed_dtype
from tilewright_model.prefill import padded, prefill, uncompiled
from tilewright_model.sampling import Sampler, SamplingParams, candidates_for
from tilewright_model.stop_strings import StopStrings
from tilewright_model.token_step import Readback, TokenStep

FinishReason = Literal["stop", "length"]
"""A stop token or string, or as many tokens as were asked for."""


class Token(NamedTuple):
    """One token of a stream."""

    index: int
    """Of its request in the batch."""
    token_id: int
    """In the vocabulary."""
    log_prob: float
    """In the model's own distribution, whatever the sampling."""
    finish_reason: FinishReason | None
    """Why it is the last of its request, or None if it is not."""


@dataclass
class Completion:
    """What a request was continued with."""

    token_ids: list[int] = field(default_factory=list)
    """New tokens; a stop token is the last of them."""
    log_probs: list[float] = field(default_factory=list)
    """Of each new token, in the model's own distribution."""
    finish_reason: FinishReason | None = None
    """Why it ended; None while it has not."""
    text: str | None = None
    """The new tokens' text where the engine can decode: without the stop token, and up to a stop
    string."""


class Engine:
    """Generates from a model.

    Args:
        model: where it computes and in which precision; torch.autocast around a call is honoured,
            at the price of the graph, and a cache of another dtype than before is allocated anew.
        max_batch_size: most requests at a time.
        max_length: most tokens of a sequence, prompt and continuation; by default as many as the
            model has positions.
        decode: text of token ids, needed for stop strings.
        prefill_chunk: tokens of each prompt that are read at a time, which bounds the memory for
            them; None reads prompts whole.
        cuda_graph: whether steps are captured in a graph, where the model is on a GPU.

    Attributes:
        cache: of the largest batch, allocated once for a device and a dtype.

    Raises:
        ValueError: a size below 1, or more tokens than the model has positions.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        max_batch_size: int = 1,
        max_length: int | None = None,
        decode: Callable[[list[int]], str] | None = None,
        prefill_chunk: int | None = None,
        cuda_graph: bool = True,
    ) -> None:
        if prefill_chunk is not None and prefill_chunk < 1:
            raise ValueError(f"prefill_chunk is {prefill_chunk}: give 1 or more, or None")
        self.model, self.decode = model, decode
        self.prefill_chunk, self.cuda_graph = prefill_chunk, cuda_graph
        self._steps: dict[tuple[object, ...], TokenStep] = {}
        self._runs = False
        longest = model.config.max_position_embeddings if max_length is None else max_length
        self.cache = self._new_cache(max_batch_size, longest)

    def _new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """For what the model computes in now."""
        weight = self.model.embed_tokens.weight
        dtype = computed_dtype(weight)
        return KVCache(self.model.config, batch_size, max_length, device=weight.device, dtype=dtype)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Continue prompts, all of them to their end.

        Args:
            prompts: token ids of each request, at least one token each.
            params: of all requests, or one for each; by default `SamplingParams()`.

        Returns:
            One completion a prompt.

        Raises:
            TypeError: a token that is no integer.
            ValueError: more prompts than fit in a batch, a prompt that is empty or too long with
                its new tokens, a token outside the vocabulary, stop strings without `decode`.
            RuntimeError: a stream of this engine is open.
            FloatingPointError: logits that are not finite.
        """
        requests = self._check(prompts, params)
        completions = [Completion() for _ in prompts]
        for _ in self._run(prompts, requests, completions):
            pass
        return completions

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[Token]:
        """As `generate`, token by token as they come. One stream of an engine runs at a time.

        Requests are checked at the call, before the first token is asked for. From that one on the
        stream is open, until its last token or its `close()`, and another one raises.
        """
        return self._run(prompts, self._check(prompts, params), [Completion() for _ in prompts])

    @torch.no_grad()
    def _begin(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[SamplingParams]
    ) -> TokenStep:
        """Read the prompts and draw the first token of each."""
        step = self._step(requests)
        lengths = [len(prompt) for prompt in prompts]
        prompts_BT = padded(prompts, self.cache.lengths.device)
        with uncompiled():
            last_BC = prefill(self.model, prompts_BT, lengths, step.cache, chunk=self.prefill_chunk)
            logits_BV = self.model.project_logits(last_BC)
        step.sampler.load(requests, prompts_BT, step.cache.lengths)
        step.draw(logits_BV, step.cache.lengths)
        last = step.cache.max_length - 1
        limits = [
            min(n + r.max_new_tokens - 1, last) for n, r in zip(lengths, requests, strict=True)
        ]
        step.limits.copy_(torch.tensor(limits, dtype=torch.int32))
        return step

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[SamplingParams],
        completions: list[Completion],
    ) -> Iterator[Token]:
        if not prompts:
            return
        if self._runs:
            raise RuntimeError(
                "a stream of this engine is open, and its cache is in use: read it to its end, "
                "close() it, or build an engine for each"
            )
        self._runs = True
        try:
            yield from self._tokens(prompts, requests, completions)
        finally:
            self._runs = False

    def _tokens(
        self,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[SamplingParams],
        completions: list[Completion],
    ) -> Iterator[Token]:
        decode = self.decode or (lambda ids: "")
        stops = [StopStrings(decode, request.stop) for request in requests]
        step = self._begin(prompts, requests)
        readback = Readback(step.result)
        readback.send(step.result)
        longest = max(request.max_new_tokens for request in requests)
        for count in range(1, longest + 1):
            if count < longest:
                step.run()
                readback.send(step.result)
            result = readback.receive()
            ids = result[0].tolist()
            log_probs = result[1].view(torch.float32).tolist()[: len(ids)]
            for i, completion in enumerate(completions):
                if completion.finish_reason is None:
                    if math.isnan(log_probs[i]):
                        raise FloatingPointError(
                            f"the logits for new token {count - 1} of prompt {i} are not finite: "
                            f"check the model's weights, or compute in a wider dtype"
                        )
                    self._add(completion, requests[i], stops[i], ids[i], log_probs[i])
                    yield Token(i, ids[i], log_probs[i], completion.finish_reason)
            if all(completion.finish_reason for completion in completions):
                return

    def _add(
        self,
        completion: Completion,
        request: SamplingParams,
        strings: StopStrings,
        token: int,
        log_prob: float,
    ) -> None:
        """Append a token, and see whether it is the last."""
        completion.token_ids.append(token)
        completion.log_probs.append(log_prob)
        stops = token in request.stop_token_ids
        if strings.found_with(token) or stops:
            completion.finish_reason = "stop"
        elif len(completion.token_ids) == request.max_new_tokens:
            completion.finish_reason = "length"
        if completion.finish_reason is not None and self.decode is not None:
            text = self.decode(completion.token_ids[: -1 if stops else None])
            found = [at for at in map(text.find, request.stop) if at >= 0]
            completion.text = text[: min(found)] if found else text

    def _step(self, requests: Sequence[SamplingParams]) -> TokenStep:
        """The step for such a batch, its cache empty; built once while the weights stay."""
        weight = self.model.embed_tokens.weight
        if (self.cache.keys.dtype, self.cache.keys.device) != (
            computed_dtype(weight),
            weight.device,
        ):
            self._steps.clear()
            self.cache = self._new_cache(self.cache.batch_size, self.cache.max_length)
        candidates = candidates_for(requests, self.model.config.vocab_size)
        penalizes = any(request.repetition_penalty != 1 for request in requests)
        kind = self.cache.lengths.device.type
        key = (
            *(len(requests), candidates, penalizes, self.model.training),
            *(torch.is_autocast_enabled(kind), self.cuda_graph),
        )
        weights = tuple(p.data_ptr() for p in self.model.parameters())
        if (key, weights) not in self._steps:
            # A graph of other weights would read what is no longer theirs.
            self._steps = {k: s for k, s in self._steps.items() if k[1] == weights}
            sampler = Sampler(
                *(len(requests), self.model.config.vocab_size, self.cache.lengths.device),
                candidates=candidates,
                penalizes=penalizes,
            )
            self._steps[key, weights] = TokenStep(
                *(self.model, self.cache.first(len(requests)), sampler), graph=self.cuda_graph
            )
        step = self._steps[key, weights]
        step.cache.reset()
        return step

    def _check(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[SamplingParams]:
        """Raise on requests that cannot be run; one SamplingParams a prompt."""
        if params is None or isinstance(params, SamplingParams):
            requests = [params or SamplingParams()] * len(prompts)
        else:
            requests = list(params)
        if len(requests) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(requests)} params: give one each")
        if len(prompts) > self.cache.batch_size:
            raise ValueError(
                f"{len(prompts)} prompts for an engine of {self.cache.batch_size}: build it with "
                f"max_batch_size={len(prompts)}"
            )
        for i, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
            self._check_request(i, prompt, request)
        return requests

    def _check_request(self, index: int, prompt: Sequence[int], request: SamplingParams) -> None:
        vocab_size, room = self.model.config.vocab_size, self.cache.max_length
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty: give one token at least")
        end = len(prompt) + request.max_new_tokens
        if end > room:
            positions = self.model.config.max_position_embeddings
            limit = "max_position_embeddings" if room == positions else "max_length"
            raise ValueError(
                f"{len(prompt)} prompt tokens and max_new_tokens {request.max_new_tokens} exceed "
                f"{limit} {room}: ask for fewer"
                + ("" if room == positions else f", or build the engine with max_length={end}")
            )
        for token in (*prompt, *request.stop_token_ids):
            if not isinstance(token, int):
                raise TypeError(f"token {token!r} of prompt {index} is no int")
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"token {token} is outside the vocabulary of {vocab_size}: is this the model's "
                    f"tokenizer?"
                )
        if request.stop and self.decode is None:
            raise ValueError(f"stop {request.stop!r} needs the text: build the engine with decode=")
