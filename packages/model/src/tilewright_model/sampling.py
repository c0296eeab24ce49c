"""From logits to tokens, on the device: what each request asks for, and one draw for all of them.

Every option is one number a row, so a batch may mix greedy and warm requests and one CUDA graph
serves any of them. Top-k, top-p and min-p each keep the largest logits of a row; together they are
one threshold (`truncation_threshold`). Shapes: B batch, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewright_kernels import sample_categorical, truncation_threshold


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is continued.

    Raises:
        ValueError: a value out of range; the message names it and what would do.
        TypeError: a value of another type.
    """

    max_new_tokens: int = 128
    """Tokens to add, unless something ends the text before."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""

    top_k: int | None = None
    """Draw among so many likeliest tokens (and what is as likely as the last of them)."""

    top_p: float | None = None
    """Draw among the likeliest tokens that together have this probability, after top_k."""

    min_p: float | None = None
    """Draw among tokens of at least this share of the likeliest one's probability."""

    repetition_penalty: float = 1.0
    """Logits of tokens that the prompt or the continuation holds are divided by it where positive
    and multiplied where negative (Keskar et al. 2019, arXiv:1909.05858); 1 for none."""

    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the text; the one that did is the last of the result."""

    stop: tuple[str, ...] = ()
    """Strings that end the text, which needs `decode`; the result's text ends before them."""

    seed: int | None = None
    """What is drawn follows from it, the logits and the position alone, whatever else is in the
    batch; None takes one from torch's default generator."""

    def __post_init__(self) -> None:
        self._check_types()
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: give 1 or more")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}: give 0 (greedy) or a positive number"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}: give 1 or more, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: give a number above 0 and up to 1, or None")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}: give a number from 0 to 1, or None")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}: give a positive number, 1 for "
                f"none"
            )
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop is {self.stop!r}: give a tuple of strings that are not empty")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: give an integer of 64 bits, or None")

    def _check_types(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            optional = name != "max_new_tokens"
            if not (_is_int(value) or (optional and value is None)):
                raise TypeError(f"{name} is {value!r}: give an int{' or None' * optional}")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            optional = name in ("top_p", "min_p")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number or (optional and value is None)):
                raise TypeError(f"{name} is {value!r}: give a number{' or None' * optional}")
        for name, kind in (("stop_token_ids", "ints"), ("stop", "strings")):
            value = getattr(self, name)
            if name == "stop" and isinstance(value, str):
                continue
            fits = _is_int if kind == "ints" else lambda item: isinstance(item, str)
            if not isinstance(value, tuple | list) or not all(map(fits, value)):
                raise TypeError(f"{name} is {value!r}: give a tuple of {kind}")
            object.__setattr__(self, name, tuple(value))

    @property
    def truncates(self) -> bool:
        """Whether some tokens are not drawn at all."""
        some = self.top_k is not None or self.top_p is not None or bool(self.min_p)
        return self.temperature > 0 and some


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Sampler:
    """Draws for a batch; what it holds is on the device, in place, so that a graph may read it.

    Args:
        batch_size: B.
        vocab_size: V.
        device: of the logits.
        candidates: how many of a row's largest logits truncation looks at: no row may have a
            larger top_k. V looks at all of them, 0 truncates no row.
        penalizes: whether any row may have a repetition penalty: seen tokens are then kept.
    """

    def __init__(
        self,
        batch_size: int,
        vocab_size: int,
        device: torch.device,
        *,
        candidates: int,
        penalizes: bool,
    ) -> None:
        self.candidates, self.penalizes = candidates, penalizes
        one = torch.ones(batch_size, device=device)
        self.seeds = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.temperature, self.top_p, self.min_p = one.clone(), one.clone(), one * 0
        self.top_k = torch.full_like(self.seeds, vocab_size)
        self.penalty = one.clone()
        self.seen_BV = torch.zeros(
            batch_size if penalizes else 0, vocab_size, dtype=torch.bool, device=device
        )
        self.counters = torch.zeros(batch_size, dtype=torch.int32, device=device)

    def load(self, requests: Sequence[SamplingParams], prompts_BT: Tensor, lengths: Tensor) -> None:
        """Take what the requests ask for, and the tokens of their prompts.

        Args:
            requests: B of them.
            prompts_BT: int64, padded at the end.
            lengths: [B], tokens of each prompt.
        """
        V = self.seen_BV.shape[1]

        def fill(target: Tensor, values: list[float] | list[int]) -> None:
            target.copy_(torch.tensor(values, dtype=target.dtype))

        drawn = torch.randint(2**63 - 1, (len(requests),)).tolist()
        seeds = [d if r.seed is None else r.seed for r, d in zip(requests, drawn, strict=True)]
        fill(self.seeds, seeds)
        fill(self.temperature, [r.temperature for r in requests])
        fill(self.top_k, [V if r.top_k is None else min(r.top_k, V) for r in requests])
        # 2: the sum of all probabilities may come out above 1.
        fill(self.top_p, [2.0 if r.top_p in (None, 1) else r.top_p for r in requests])
        fill(self.min_p, [r.min_p or 0.0 for r in requests])
        fill(self.penalty, [r.repetition_penalty for r in requests])
        if self.penalizes:
            place = torch.arange(prompts_BT.shape[1], device=prompts_BT.device)
            # What pads a prompt counts as its first token.
            tokens = torch.where(place < lengths[:, None], prompts_BT, prompts_BT[:, :1])
            self.seen_BV.zero_().scatter_(1, tokens, True)

    def draw(
        self, logits_BV: Tensor, steps_B: Tensor, *, tokens_B: Tensor, log_probs_B: Tensor
    ) -> None:
        """One token a row.

        Args:
            logits_BV: of the model, no wider than float32.
            steps_B: int32 or int64: the position that each token will have.
            tokens_B: int64, gets the tokens.
            log_probs_B: float32, gets their log-probabilities in the model's distribution: at
                temperature 1, without truncation or penalty.
        """
        logits = penalize(logits_BV, self.seen_BV, self.penalty) if self.penalizes else logits_BV
        threshold = None
        if self.candidates:
            threshold = truncation_threshold(
                logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
                min_p=self.min_p, candidates=self.candidates,
            )  # fmt: skip
        sample_categorical(
            logits, self.seeds, steps_B, out=(tokens_B, log_probs_B),
            temperature=self.temperature, threshold=threshold, counters=self.counters,
        )  # fmt: skip
        if self.penalizes:
            self.seen_BV.scatter_(1, tokens_B[:, None], True)
            log_probs_BV = logits_BV.float().log_softmax(-1)
            log_probs_B.copy_(log_probs_BV.gather(1, tokens_B[:, None])[:, 0])


def penalize(logits_BV: Tensor, seen_BV: Tensor, penalty_B: Tensor) -> Tensor:
    """Logits, float32, of which those of seen tokens are moved towards less likely."""
    wide, penalty = logits_BV.float(), penalty_B[:, None]
    return torch.where(seen_BV, torch.where(wide > 0, wide / penalty, wide * penalty), wide)


def candidates_for(requests: Sequence[SamplingParams], vocab_size: int) -> int:
    """The `Sampler`'s candidates for a batch: a power of two, all tokens, or none.

    Where every row that is drawn has a top_k, no more than the largest of these need be looked at.
    """
    if not any(request.truncates for request in requests):
        return 0
    drawn = [request for request in requests if request.temperature > 0]
    largest = max(vocab_size if r.top_k is None else r.top_k for r in drawn)
    return min(vocab_size, 1 << (largest - 1).bit_length())
