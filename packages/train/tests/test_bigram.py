"""The bigram model against a case computed by hand, and as a distribution."""

import math
from collections import Counter

import pytest
import torch

from tilewright_train.batches import IGNORE_INDEX, Batch
from tilewright_train.bigram import BigramModel


def batch_of(rows: torch.Tensor, targets: int | None = None) -> Batch:
    labels = rows.clone()
    labels[:, 0] = IGNORE_INDEX
    return Batch(
        input_ids=rows, labels=labels, targets=targets or labels[:, 1:].numel(), tokens=rows.numel()
    )


def test_a_case_by_hand() -> None:
    # a b a b a c with V = 4: c(a) = 3 of 6, so P(a) = 4/10, P(b) = 3/10, P(c) = 2/10, P(d) = 1/10.
    model = BigramModel([torch.tensor([0, 1, 0, 1, 0, 2])], vocab_size=4)
    # After a: b twice, c once; two kinds of followers.
    assert model.log_prob(torch.tensor(0), torch.tensor(1)).exp() == pytest.approx(
        (2 + 2 * 3 / 10) / (3 + 2)
    )
    assert model.log_prob(torch.tensor(0), torch.tensor(3)).exp() == pytest.approx(
        (0 + 2 * 1 / 10) / (3 + 2)
    )
    # After b: always a. After c, which ends the stream, nothing was seen: the unigrams.
    assert model.log_prob(torch.tensor(1), torch.tensor(0)).exp() == pytest.approx(
        (2 + 1 * 4 / 10) / (2 + 1)
    )
    assert model.log_prob(torch.tensor(2), torch.tensor(1)).exp() == pytest.approx(3 / 10)
    rows = torch.tensor([[0, 1, 0], [2, 1, 0]])
    expected = [2.6 / 5, 2.4 / 3, 3 / 10, 2.4 / 3]
    assert model.loss([batch_of(rows)]) == pytest.approx(-sum(map(math.log, expected)) / 4)
    # In parts, and with a label that is not predicted.
    parts = [batch_of(rows[:1]), batch_of(rows[1:], targets=1)]
    parts[1].labels[0, 1] = IGNORE_INDEX
    del expected[2]
    assert model.loss(parts) == pytest.approx(-sum(map(math.log, expected)) / 3)


def test_the_probabilities_after_every_token_sum_to_one() -> None:
    tokens = torch.randint(0, 30, (500,), generator=torch.Generator().manual_seed(0))
    model = BigramModel([tokens], vocab_size=40)  # ten tokens never occur
    first, second = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    torch.testing.assert_close(
        model.log_prob(first, second).exp().sum(1), torch.ones(40, dtype=torch.float64)
    )


def test_it_learns_what_a_bigram_can_learn() -> None:
    # Each token decides the next one: a model of single tokens stays at ln 5.
    cycle = torch.arange(5).repeat(200)
    model = BigramModel([cycle], vocab_size=5)
    assert model.loss([batch_of(cycle[None, :50])]) < 0.02


@pytest.mark.parametrize("together", [1, 7, 90])
def test_it_counts_in_parts_what_it_counts_at_once(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [torch.randint(0, 9, (n,), generator=torch.Generator().manual_seed(n)) for n in
               (70, 1, 90)]  # fmt: skip
    pairs = Counter(
        pair for s in streams for pair in zip(s[:-1].tolist(), s[1:].tolist(), strict=True)
    )
    monkeypatch.setattr("tilewright_train.bigram._TOGETHER", together)
    model = BigramModel(streams, vocab_size=9)
    assert dict(zip(model.pairs.tolist(), model.pair_counts.tolist(), strict=True)) == {
        9 * a + b: count for (a, b), count in pairs.items()
    }
    firsts = Counter(a for a, _ in pairs.elements())
    assert model.as_first.tolist() == [firsts[a] for a in range(9)]
    counts = torch.bincount(torch.cat(streams), minlength=9)
    torch.testing.assert_close(model.unigram, (counts.double() + 1) / 170)
