import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tilewright_model import Block, CausalLM, ModelConfig, RopeScaling
from tilewright_model.config import PositionEmbedding
from tilewright_model.positions import SinusoidalPositions, padded_cu_seqlens

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
)


def build(**fields: Any) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(dataclasses.replace(CONFIG, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(32, (batch, length), generator=torch.Generator().manual_seed(1))


def test_padding_and_tokens_are_sequences_of_their_own() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert padded_cu_seqlens(mask).tolist() == [0, 2, 4, 8, 8, 9, 12, 16, 16]


@pytest.mark.parametrize("row", [[1, 0, 1, 1], [0, 1, 1, 0]], ids=str)
def test_padding_between_tokens_is_refused(row: list[int]) -> None:
    with pytest.raises(ValueError, match="row 1 has padding between or on both sides"):
        padded_cu_seqlens(torch.tensor([[1, 1, 1, 1], row]))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["rope", "learned", "sinusoidal", "none"])
def test_padding_changes_no_logits(kind: str, side: str) -> None:
    model, ids = build(position_embedding=kind), tokens()
    mask = torch.ones_like(ids)
    part = slice(3, None) if side == "left" else slice(0, 6)
    mask[1] = 0
    mask[1, part] = 1
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[0], model(ids[:1]).logits[0], rtol=1e-4, atol=1e-5)
    alone = model(ids[1:, part]).logits[0]
    torch.testing.assert_close(logits[1, part], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["rope", "learned", "sinusoidal", "none"])
def test_packed_documents_are_alone(kind: str) -> None:
    model, ids = build(position_embedding=kind), tokens(1)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    logits = model(ids, cu_seqlens=bounds).logits
    apart = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], dim=1)
    torch.testing.assert_close(logits, apart, rtol=1e-4, atol=1e-5)


def test_packed_loss_is_that_of_the_documents() -> None:
    model, ids = build(), tokens(1)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = model(ids, labels=ids, cu_seqlens=bounds).loss
    # 3 and 4 next tokens; none across the seam.
    losses = [model(part, labels=part).loss for part in (ids[:, :4], ids[:, 4:])]
    torch.testing.assert_close(packed, (3 * losses[0] + 4 * losses[1]) / 7)


def test_padded_loss_is_that_of_the_tokens() -> None:
    model, ids = build(), tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    loss = model(ids, labels=ids, attention_mask=mask).loss
    first, second = model(ids[:1, 4:], labels=ids[:1, 4:]).loss, model(ids[1:], labels=ids[1:]).loss
    torch.testing.assert_close(loss, (4 * first + 8 * second) / 12)


@torch.no_grad()
def test_no_positions_means_order_does_not_matter_to_the_last_token() -> None:
    ids = tokens(1)
    swapped = ids.clone()
    swapped[0, [0, 5]] = ids[0, [5, 0]]
    # One layer: the last token sees the same set of keys.
    model = build(position_embedding="none", num_hidden_layers=1)
    torch.testing.assert_close(model(ids).logits[:, -1], model(swapped).logits[:, -1])
    for kind in ("rope", "learned", "sinusoidal"):
        model = build(position_embedding=kind, num_hidden_layers=1)
        difference = (model(ids).logits[:, -1] - model(swapped).logits[:, -1]).abs().max()
        assert difference > 1e-3, kind


def test_sinusoids_have_the_variance_of_embeddings() -> None:
    table = SinusoidalPositions(500, 64, 0.02).table
    assert table.std().item() == pytest.approx(0.02, rel=0.1)
    assert table[7, 0].item() == pytest.approx(0.02 * math.sqrt(2) * math.sin(7.0))


@torch.no_grad()
def test_a_window_hides_what_lies_further_back() -> None:
    model = build(sliding_window=3, num_hidden_layers=1)
    ids = tokens(1)
    changed = ids.clone()
    changed[0, 2] = (ids[0, 2] + 1) % 32
    difference = (model(ids).logits - model(changed).logits).abs().amax(-1)[0]
    assert (difference[2:5] > 0).all()  # tokens 2, 3, 4 see token 2
    assert (difference[5:] == 0).all()


@torch.no_grad()
def test_windows_are_chosen_layer_by_layer() -> None:
    full = build(sliding_window=3, layer_types=("full_attention",) * 2)
    assert torch.equal(full(tokens()).logits, build()(tokens()).logits)
    mixed = build(sliding_window=3, layer_types=("sliding_attention", "full_attention"))
    windows = [cast(Block, block).self_attn.window_size for block in mixed.layers]
    assert windows == [(2, 0), None]


@torch.no_grad()
def test_softcaps_bound_scores_and_logits() -> None:
    model, ids = build(final_logit_softcapping=0.5), tokens()
    free = build()(ids).logits
    torch.testing.assert_close(model(ids).logits, 0.5 * torch.tanh(free / 0.5))
    capped = build(attn_logit_softcapping=0.01)(ids).logits
    assert (capped - free).abs().max() > 1e-4
    loose = build(attn_logit_softcapping=1e4)(ids).logits
    torch.testing.assert_close(loose, free, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [False, True])
def test_loss_sees_scaled_and_capped_logits(kept: bool) -> None:
    model, ids = build(final_logit_softcapping=2.0, logits_scaling=3.0), tokens()
    free = build()(ids).logits / 3.0
    torch.testing.assert_close(model(ids).logits, 2.0 * torch.tanh(free / 2.0))
    loss = model(ids, labels=ids, return_logits=kept).loss
    logits = 2.0 * torch.tanh(free / 2.0)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["rope", "learned", "sinusoidal", "none"])
def test_meta_and_direct_construction_draw_the_same(kind: PositionEmbedding) -> None:
    config = dataclasses.replace(CONFIG, position_embedding=kind, num_experts=3)
    torch.manual_seed(0)
    direct = CausalLM(config).eval()
    torch.manual_seed(0)
    with torch.device("meta"):
        model = CausalLM(config).eval()
    assert all(p.is_meta for p in model.parameters())
    model.materialize("cpu")
    assert torch.equal(model(tokens()).logits, direct(tokens()).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_embedding": "alibi"}, "'alibi': choose one of rope, learned"),
        (
            {
                "position_embedding": "none",
                "rope_scaling": RopeScaling(rope_type="linear", factor=2.0),
            },
            "position_embedding is 'none'",
        ),
        ({"layer_types": ("full_attention",)}, "one entry for each of num_hidden_layers 2"),
        ({"layer_types": ("full_attention", "none")}, r"layer_types\[1\] is 'none'"),
        ({"layer_types": ("full_attention", "sliding_attention")}, "sliding_window is None"),
    ],
    ids=str,
)
def test_contradicting_positions_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, "ascend from 0 to the 9 tokens"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens is torch.int64: give int32"),
        ({"max_seqlen": 4}, "max_seqlen 4 .* give cu_seqlens"),
        (
            {"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32), "max_seqlen": 4},
            "has 9 tokens, and max_seqlen is 4",
        ),
        ({"position_ids": torch.arange(8, 17)[None]}, "from 8 to 16, and max_position_emb.* is 16"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask \[1, 4\]"),
    ],
    ids=str,
)
def test_sequences_that_do_not_fit_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        build()(tokens(1), **arguments)


def test_packed_rows_are_one() -> None:
    with pytest.raises(ValueError, match="one row of packed sequences"):
        build()(tokens(2), cu_seqlens=torch.tensor([0, 18], dtype=torch.int32))


def test_a_token_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(ValueError, match="token 32 is outside the vocabulary of 32"):
        build()(tokens().clamp(max=31).index_fill(1, torch.tensor([2]), 32))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["rope", "learned", "sinusoidal", "none"])
def test_positions_follow_the_dtype_of_the_weights(kind: PositionEmbedding, tmp_path: Path) -> None:
    model, ids = build(position_embedding=kind), tokens()
    model.save_pretrained(tmp_path)
    loaded = CausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    cast_model = build(position_embedding=kind).to(torch.bfloat16)
    assert loaded(ids).logits.dtype == torch.bfloat16
    assert torch.equal(loaded(ids).logits, cast_model(ids).logits)
