"""Rows of every packing: documents that do not see each other, weights, validation."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tilewright_model import CausalLM, preset
from tilewright_train.batches import IGNORE_INDEX
from tilewright_train.data import Packing, RowOptions, training_rows, validation_rows
from tilewright_train.errors import InputError
from tilewright_train.samples import Samples

END = 0
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def texts(lengths: list[int], seed: int = 0) -> Samples:
    """Random tokens with the end token behind each document."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randint(1, 90, (n - 1,), generator=generator) for n in lengths]
    tokens = torch.cat([t for part in parts for t in (part, torch.tensor([END]))])
    return Samples(tokens.int(), torch.tensor(lengths).cumsum(0))


def options(packing: Packing, *, seq_len: int = 24, document_mask: bool = True) -> RowOptions:
    return RowOptions(packing=packing, document_mask=document_mask, seq_len=seq_len, padding=END)


def segments(inputs: dict[str, Any]) -> Iterator[tuple[int, slice]]:
    """Row and columns of every segment; without bounds of the tokens before the padding."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    if "cu_seqlens" in inputs:
        for begin, end in itertools.pairwise(inputs["cu_seqlens"].tolist()):
            yield 0, slice(begin, end)
        return
    for row in range(ids.shape[0]):
        yield row, slice(0, int((labels[row] != IGNORE_INDEX).nonzero().max()) + 1)


@pytest.fixture
def model() -> CausalLM:
    torch.manual_seed(0)
    shape = preset(
        "nano", vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    return CausalLM(shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packing", ["concat", "best_fit", "none"])
def test_packed_documents_do_not_see_each_other(
    model: CausalLM, packing: Packing, device: str
) -> None:
    """Logits of a packed batch are those of each document alone; so is the loss."""
    assert_apart(model, texts([7, 30, 3, 12, 9, 20]), packing, device)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_packed_conversations_do_not_see_each_other(model: CausalLM, packing: Packing) -> None:
    """Of which some tokens are predicted: one in three, and no token across a boundary."""
    samples = texts([7, 22, 3, 12, 9, 20])
    every_third = (torch.arange(samples.tokens.numel()) % 3 == 0).to(torch.uint8)
    assert_apart(model, dataclasses.replace(samples, targets=every_third), packing, "cpu")


def assert_apart(model: CausalLM, samples: Samples, packing: Packing, device: str) -> None:
    """Logits and loss of packed rows against those of their segments, one by one."""
    rows = training_rows([samples], (), options(packing), 0).rows
    batch = rows.read(range(3)).to(torch.device(device))
    model = model.to(device)
    inputs = batch.inputs
    with torch.no_grad():
        packed = model(**inputs, return_logits=True)
        total = torch.zeros((), dtype=torch.float64, device=device)
        assert len(list(segments(inputs))) > (2 if packing == "none" else 3)
        for row, place in segments(inputs):
            ids, labels = (inputs[name][row : row + 1, place] for name in ("input_ids", "labels"))
            alone = model(ids, labels=labels, num_items=1, return_logits=True)
            torch.testing.assert_close(
                packed.logits[row : row + 1, place], alone.logits, rtol=1e-4, atol=1e-5
            )
            total += alone.loss
    assert float(packed.loss) == pytest.approx(float(total) / batch.targets, rel=1e-5)


def test_without_a_mask_rows_are_whole() -> None:
    rows = training_rows([texts([7, 30])], (), options("concat", document_mask=False), 0).rows
    assert rows.read([0, 1]).inputs.keys() == {"input_ids", "labels"}


def test_packing_wastes_less_than_padding() -> None:
    samples = texts([5, 9, 14, 7, 22, 3, 11, 6, 18, 4] * 20)
    packed, padded = (
        training_rows([samples], (), options(packing), 0) for packing in ("best_fit", "none")
    )
    assert packed.efficiency > 0.96
    assert padded.efficiency < 0.5
    assert padded.rows.count == 200
    assert training_rows([samples], (), options("concat"), 0).efficiency == 1.0


def test_weights_decide_on_the_share_of_each_source() -> None:
    sources = [texts([50] * 10), Samples(torch.full((5000,), 89).int(), torch.tensor([5000]))]

    def share(weights: tuple[float, ...]) -> float:
        mixed = training_rows(sources, weights, options("concat", document_mask=False), 0)
        ids = mixed.rows.read(range(1000)).input_ids
        return float((ids == 89).all(dim=1).float().mean())

    assert share((3, 1)) == pytest.approx(0.25)
    assert share((1, 3)) == pytest.approx(0.75)
    assert share(()) == pytest.approx(5000 / 5500, abs=0.01)  # by size
    with pytest.raises(InputError, match="3 weights for 2 sources"):
        share((1, 2, 3))


def test_validation_rows_are_spread_evenly_over_each_source() -> None:
    one = Samples(torch.arange(101).int(), torch.tensor([101]))
    other = Samples(torch.arange(1000, 1051).int(), torch.tensor([51]))
    whole = options("concat", seq_len=6, document_mask=False)

    def starts(splits: list[Samples], budget: int) -> list[int]:
        (batch,) = validation_rows(splits[:1], whole, budget).batches(100)
        return batch.input_ids[:, 0].tolist()

    assert starts([one], 20) == [0, 25, 50, 75]
    assert starts([one], 1) == [0]
    rows = validation_rows([one], whole, 10**6)
    (batch,) = rows.batches(100)
    assert torch.equal(batch.labels[:, 1:].flatten(), torch.arange(1, 101))
    assert rows.targets == 100
    # Two sources share the budget by their tokens, and processes share the rows.
    both = validation_rows([one, other], whole, 30)
    everything = torch.cat([b.input_ids for b in both.batches(2)])
    assert everything[:, 0].tolist() == [0, 30, 65, 1000, 1025]
    shares = [
        torch.cat([b.input_ids for b in both.batches(9, rank=r, world_size=2)]) for r in (0, 1)
    ]
    assert sorted(torch.cat(shares)[:, 0].tolist()) == everything[:, 0].tolist()


def test_few_validation_tokens_make_one_short_row() -> None:
    samples = Samples(torch.arange(3).int(), torch.tensor([3]))
    (batch,) = validation_rows([samples], options("concat", document_mask=False), 9).batches(4)
    assert batch.input_ids.tolist() == [[0, 1, 2]]
    samples = Samples(torch.arange(1).int(), torch.tensor([1]))
    with pytest.raises(InputError, match="has 1 validation tokens, too few"):
        validation_rows([samples], options("concat"), 9)
