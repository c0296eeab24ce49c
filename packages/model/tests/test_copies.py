"""What a forward copies and what it does not: views share memory all the way to the kernels."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tilewright_model.attention as attention_module
from tilewright_model import CausalLM, KVCache, ModelConfig

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
    head_dim=8,
)
B, T, H, K, D = 2, 9, 4, 2, 8


class Seen:
    """Arguments and results of an operator that attention calls."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str) -> None:
        self.arguments: list[Tensor] = []
        self.results: list[Tensor] = []
        operator = getattr(attention_module, name)

        def spy(*args: Any, **kwargs: Any) -> Any:
            results = operator(*args, **kwargs)
            self.arguments += [a for a in args if isinstance(a, Tensor)]
            self.results += list(results) if isinstance(results, tuple) else [results]
            return results

        patch.setattr(attention_module, name, spy)


def storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def run(monkeypatch: pytest.MonkeyPatch, operator: str, **arguments: Any) -> tuple[Seen, Seen, Any]:
    """A forward, what rotation and attention saw, and the input of the output projection."""
    torch.manual_seed(0)
    model = CausalLM(CONFIG).eval()
    rotation, attention = Seen(monkeypatch, "apply_rotary_emb"), Seen(monkeypatch, operator)
    projected: list[Tensor] = []
    model.get_submodule("layers.0.self_attn.o_proj").register_forward_pre_hook(
        lambda _module, args: projected.append(args[0])
    )
    rows = 1 if "cu_seqlens" in arguments else B
    with torch.no_grad():
        model(torch.randint(32, (rows, T)), **arguments)
    return rotation, attention, projected[0]


def test_queries_keys_and_values_are_views_of_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    rotation, attention, _ = run(monkeypatch, "scaled_dot_product_attention")
    q, k = rotation.arguments[:2]
    v_BKTD = attention.arguments[2]
    assert storage(q) == storage(k) == storage(v_BKTD)
    row = (H + 2 * K) * D
    assert q.stride() == (T * row, row, D, 1)
    assert k.stride() == (T * row, row, D, 1)
    assert v_BKTD.transpose(1, 2).stride() == (T * row, row, D, 1)


def test_rotation_writes_what_attention_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    rotation, attention, _ = run(monkeypatch, "scaled_dot_product_attention")
    for rotated, read in zip(rotation.results, attention.arguments, strict=False):
        assert rotated.is_contiguous()  # [B, T, heads, D]
        assert storage(read) == storage(rotated)  # [B, heads, T, D], a transposed view
        assert torch.equal(read.transpose(1, 2), rotated)


def test_padded_and_packed_tokens_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.ones(B, T)
    mask[0, :3] = 0
    for arguments in (
        {"attention_mask": mask},
        {"cu_seqlens": torch.tensor([0, 4, T], dtype=torch.int32)},
    ):
        with pytest.MonkeyPatch.context() as patch:
            rotation, attention, projected = run(patch, "flash_attn_varlen_func", **arguments)
        q, k = rotation.results
        v_NKD = attention.arguments[2]
        assert storage(attention.arguments[0]) == storage(q)
        assert storage(attention.arguments[1]) == storage(k)
        assert storage(v_NKD) == storage(rotation.arguments[0])
        assert projected.shape[-1] == H * D


def test_the_cache_is_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(CONFIG, B, 20)
    _, attention, _ = run(monkeypatch, "scaled_dot_product_attention", cache=cache)
    assert storage(attention.arguments[1]) == storage(cache.keys)
    assert storage(attention.arguments[2]) == storage(cache.values)


def test_a_tied_head_and_the_tables_are_no_copies() -> None:
    model = CausalLM(CONFIG)
    assert model._head().data_ptr() == model.embed_tokens.weight.data_ptr()
    assert model.rotary is not None
    cos, sin = model.rotary(3, 5)
    assert storage(cos) == storage(model.rotary.cos)
    assert storage(sin) == storage(model.rotary.sin)
