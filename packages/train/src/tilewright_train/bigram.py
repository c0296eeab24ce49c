"""The bigram model that a run is compared with: it knows the token before, and nothing else.

P(b | a) = (c(a, b) + u(a) · P(b)) / (c(a) + u(a)),   P(b) = (c(b) + 1) / (N + V)

with counts c in the training tokens and u(a) the number of different tokens seen after a
(Witten & Bell 1991): the more kinds of successors a token has shown, the more weight goes to those
that it has not. There is no constant to tune, so none can be tuned on the validation tokens, and
no probability is zero. At the end of a run it is fitted on the first 2²⁴ = 16,777,216 training
tokens, or on all where there are fewer, also on those that a short run never reaches.
"""

from collections.abc import Iterable, Sequence

import torch

from tilewright_train.batches import IGNORE_INDEX, Batch

_TOGETHER = 1 << 20  # tokens whose pairs are counted at once, in 50 MB


class BigramModel:
    """Witten-Bell bigram probabilities of token streams."""

    def __init__(self, streams: Sequence[torch.Tensor], vocab_size: int) -> None:
        """Count the pairs of `streams`, a part at a time: they need not fit in memory.

        Args:
            streams: [N] integer each, at least one of them with two tokens.
            vocab_size: V.
        """
        self.vocab_size = vocab_size
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        last = counts.clone()
        pairs = pair_counts = torch.zeros(0, dtype=torch.int64)
        for stream in streams:
            for start in range(0, stream.numel(), _TOGETHER):
                flat = stream[start : start + _TOGETHER + 1].long()  # and the next part's first
                counts += torch.bincount(flat[:_TOGETHER], minlength=vocab_size)
                pairs, pair_counts = _merged(
                    (pairs, pair_counts),
                    torch.unique(flat[:-1] * vocab_size + flat[1:], return_counts=True),
                )
            last += torch.bincount(stream[-1:].long(), minlength=vocab_size)
        self.unigram = (counts.double() + 1) / (counts.sum() + vocab_size)  # [V]
        self.pairs, self.pair_counts = pairs, pair_counts.double()
        first = self.pairs // vocab_size
        self.followers = torch.bincount(first, minlength=vocab_size).double()  # u(a)
        # c(a) as a first token: the last token of a stream has no successor.
        self.as_first = (counts - last).double()

    def log_prob(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """ln P(second | first), elementwise, in float64."""
        wanted = first * self.vocab_size + second
        place = torch.searchsorted(self.pairs, wanted).clamp(max=self.pairs.numel() - 1)
        seen = torch.where(self.pairs[place] == wanted, self.pair_counts[place], 0.0)
        weight = self.followers[first]
        total = self.as_first[first] + weight
        known = (seen + weight * self.unigram[second]) / total.clamp(min=1.0)
        return torch.where(total > 0, known, self.unigram[second]).log()

    def loss(self, batches: Iterable[Batch]) -> float:
        """Mean -ln P over all predictions, each from the token before it."""
        total = torch.zeros((), dtype=torch.float64)
        targets = 0
        for batch in batches:
            second = batch.labels[:, 1:]
            predicted = second != IGNORE_INDEX
            first = batch.input_ids[:, :-1][predicted]
            total -= self.log_prob(first, second[predicted]).sum()
            targets += batch.targets
        return float(total) / targets


def _merged(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values, ascending, and how often each is there, of two such counts."""
    values, places = torch.unique(torch.cat([one[0], other[0]]), return_inverse=True)
    counts = torch.zeros_like(values).index_add_(0, places, torch.cat([one[1], other[1]]))
    return values, counts
