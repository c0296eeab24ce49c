"""Pairs as rows: padded or joined, whole or in parts, they give the same losses and gradients."""

import pytest
import torch

from tilewright_model import CausalLM, preset
from tilewright_train.batches import BatchSampler, MixedRows
from tilewright_train.config import DpoOptions
from tilewright_train.dpo import SequenceLogProbs
from tilewright_train.errors import InputError
from tilewright_train.objectives import DirectPreference
from tilewright_train.pairs import PairBatch, PairRows, plan_pairs
from tilewright_train.reference import FrozenReference
from tilewright_train.samples import Samples


def pairs(count: int, seed: int = 0) -> Samples:
    """Pairs of sides of 4 to 12 tokens, of which the first 2 or 3 are the prompt."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 13, (2 * count,), generator=draw)
    prompts = torch.randint(2, 4, (count,), generator=draw).repeat_interleave(2)
    tokens = torch.randint(1, 50, (int(lengths.sum()),), generator=draw).int()
    targets = torch.cat(
        [(torch.arange(int(n)) >= p).byte() for n, p in zip(lengths, prompts, strict=True)]
    )
    return Samples(tokens, lengths.cumsum(0), targets)


def rows(samples: Samples, *, padding: int | None = 0, seq_len: int = 16) -> PairRows:
    return PairRows(samples, plan_pairs(samples, seq_len), seed=0, padding=padding)


@pytest.fixture
def model() -> CausalLM:
    torch.manual_seed(0)
    shape = preset(
        "nano", vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    return CausalLM(shape).double()


def sequence(samples: Samples, number: int) -> tuple[list[int], list[int]]:
    end = int(samples.ends[number])
    begin = end - int(samples.lengths[number])
    assert samples.targets is not None
    return samples.tokens[begin:end].tolist(), samples.targets[begin:end].tolist()


def gradients_and_loss(
    model: CausalLM, batches: list[PairBatch], items: int
) -> tuple[float, list[torch.Tensor], dict[str, float]]:
    """Of a step whose micro-batches these are."""
    other = CausalLM(model.config).double()
    torch.manual_seed(1)
    other.reset_parameters()
    objective = DirectPreference(DpoOptions(), FrozenReference(other))
    model.zero_grad()
    scorer = SequenceLogProbs(model)
    parts = [objective.loss(scorer, batch, items) for batch in batches]
    total = torch.stack([loss for loss, _ in parts]).sum()
    total.backward()
    sums = torch.stack([of_batch for _, of_batch in parts]).sum(dim=0).tolist()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return float(total.detach()), gradients, objective.means(sums, items)


@pytest.mark.parametrize("padding", [0, None])
def test_predictions_are_the_completions_and_nothing_else(padding: int | None) -> None:
    samples = pairs(5)
    batch = PairRows(samples, plan_pairs(samples, 16), seed=None, padding=padding).read([1, 3])
    ids = batch.input_ids.flatten()
    at = 0
    for place, number in enumerate((2, 6, 3, 7)):  # the chosen sides, then the rejected ones
        tokens, targets = sequence(samples, number)
        wanted = [t for t, target in zip(tokens, targets, strict=True) if target]
        mine = batch.sequences == place
        assert batch.labels[mine].tolist() == wanted
        assert int(batch.lengths[place]) == len(wanted)
        # Each is predicted behind the token before it.
        before = [tokens[i - 1] for i, target in enumerate(targets) if target]
        assert ids[batch.places[mine]].tolist() == before
        if padding is None:
            bounds = batch.cu_seqlens
            assert bounds is not None
            assert ids[bounds[place] : bounds[place + 1]].tolist() == tokens
        else:
            assert batch.input_ids[place, : len(tokens)].tolist() == tokens
        at += len(tokens)
    assert batch.tokens == at
    assert batch.targets == 2


def test_padded_and_joined_pairs_give_the_same_step(model: CausalLM) -> None:
    samples = pairs(6)
    padded, joined = (rows(samples, padding=p).read(range(6)) for p in (0, None))
    assert joined.input_ids.numel() == joined.tokens < padded.input_ids.numel()
    one, other = (gradients_and_loss(model, [batch], 6) for batch in (padded, joined))
    assert one[0] == pytest.approx(other[0], rel=1e-12)
    torch.testing.assert_close(one[1], other[1])
    assert one[2] == pytest.approx(other[2], rel=1e-9)


@pytest.mark.parametrize("padding", [0, None])
def test_any_split_into_parts_and_processes_gives_the_same_step(
    model: CausalLM, padding: int | None
) -> None:
    """1 × 16 = 4 × 4 = 16 × 1, in one process or in two."""
    made = rows(pairs(40), padding=padding)
    whole = BatchSampler(made, batch_size=16).batch(2)
    assert isinstance(whole, PairBatch)
    expected = gradients_and_loss(model, [whole], 16)
    assert expected[2]["rewards/accuracies"] not in (0.0, 1.0)
    for world_size, parts in ((1, 4), (1, 16), (2, 1), (2, 4)):
        batches = []
        for rank in range(world_size):
            sampler = BatchSampler(made, batch_size=16, rank=rank, world_size=world_size)
            assert sampler.targets(2) == 16
            batches += [sampler.batch(2, part, parts) for part in range(parts)]
        assert all(isinstance(batch, PairBatch) for batch in batches)
        loss, gradients, metrics = gradients_and_loss(model, batches, 16)  # pyrefly: ignore
        assert loss == pytest.approx(expected[0], rel=1e-12)
        torch.testing.assert_close(gradients, expected[1])
        assert metrics == pytest.approx(expected[2], rel=1e-9)


@pytest.mark.parametrize("padding", [0, None])
def test_several_sources_give_one_batch(model: CausalLM, padding: int | None) -> None:
    parts = [rows(pairs(9, seed), padding=padding) for seed in (0, 1)]
    mixed = MixedRows(parts, [1, 2], seed=0).read(range(7))
    assert isinstance(mixed, PairBatch)
    halves = [part.read(range(n)) for part, n in zip(parts, (3, 4), strict=True)]
    expected = gradients_and_loss(model, halves, 7)
    joined = gradients_and_loss(model, [PairBatch.joined(halves)], 7)
    assert joined[0] == pytest.approx(expected[0], rel=1e-12)
    torch.testing.assert_close(joined[1], expected[1])
    assert joined[2] == pytest.approx(expected[2], rel=1e-9)
    assert mixed.targets == 7


def test_sides_are_cut_off_and_pairs_without_a_completion_left_out() -> None:
    lengths = torch.tensor([6, 5, 6, 12, 9, 6])  # three pairs, prompts of 3, 3 and 8 tokens
    prompts = [3, 3, 3, 3, 8, 2]
    targets = torch.cat(
        [(torch.arange(int(n)) >= p).byte() for n, p in zip(lengths, prompts, strict=True)]
    )
    samples = Samples(torch.arange(44).int(), lengths.cumsum(0), targets)
    plan = plan_pairs(samples, 8)
    # The second pair loses the end of its rejected side; of the third's chosen one nothing is left.
    assert (plan.numbers.tolist(), plan.truncated, plan.dropped) == ([0, 1], 1, 1)
    batch = PairRows(samples, plan, seed=None, padding=0).read([1])
    assert batch.lengths.tolist() == [3, 5]
    assert batch.input_ids.shape == (2, 8)
    with pytest.raises(InputError, match="within 3 tokens on both sides, of the 3 for validation"):
        plan_pairs(samples, 3, "validation")


def test_equal_sides_are_trained_on_with_a_margin_of_zero(model: CausalLM) -> None:
    tokens = torch.tensor([1, 2, 3, 4, 1, 2, 3, 4]).int()
    targets = torch.tensor([0, 0, 1, 1] * 2).byte()
    samples = Samples(tokens, torch.tensor([4, 8]), targets)
    loss, gradients, metrics = gradients_and_loss(model, [rows(samples).read([0])], 1)
    assert loss == pytest.approx(0.6931471805599453)
    assert metrics["rewards/margins"] == metrics["rewards/accuracies"] == 0
    assert max(float(g.abs().max()) for g in gradients) < 1e-12
