import dataclasses
from typing import Literal

import pytest
import torch
from torch import Tensor

from tilewright_kernels import use_backend
from tilewright_model import ModelConfig
from tilewright_model.attention import Attention, causal_attention
from tilewright_model.positions import Positions
from tilewright_model.rotary import rotary_tables

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=24,
    num_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
)


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head by head, query by query, in float64: the last query sees all keys."""
    B, T, H, D = q.shape
    S, group = k.shape[1], H // k.shape[2]
    q, k, v = q.double(), k.double(), v.double()
    y = torch.zeros(B, T, H, D, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            seen = S - T + t + 1
            for h in range(H):
                scores = k[b, :seen, h // group] @ q[b, t, h] / D**0.5
                y[b, t, h] = scores.softmax(0) @ v[b, :seen, h // group]
    return y


# T = S: training; T = 1: decoding; 1 < T < S: a prompt read in chunks, where torch's own causal
# mask would be aligned at the wrong corner. K = H, 1 < K < H and K = 1.
@pytest.mark.parametrize(("new", "total"), [(5, 5), (1, 5), (3, 5), (1, 1)])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_each_query_sees_the_keys_up_to_its_own(
    backend: Literal["torch", "triton"], new: int, total: int, kv_heads: int, device: torch.device
) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, new, 4, 6)
    k, v = torch.randn(2, 2, total, kv_heads, 6).unbind(0)
    with use_backend(backend):
        y = causal_attention(q.to(device), k.to(device), v.to(device))
    torch.testing.assert_close(y.cpu(), naive(q, k, v).float())


def test_grouped_heads_equal_repeated_heads(device: torch.device) -> None:
    torch.manual_seed(0)
    grouped = Attention(CONFIG).to(device)
    repeated = Attention(dataclasses.replace(CONFIG, num_key_value_heads=6)).to(device)
    with torch.no_grad():
        q, k, v = grouped.qkv_proj.weight.split([24, 8, 8])
        k, v = (w.unflatten(0, (2, 4)).repeat_interleave(3, dim=0).flatten(0, 1) for w in (k, v))
        repeated.qkv_proj.weight.copy_(torch.cat([q, k, v]))
        repeated.o_proj.weight.copy_(grouped.o_proj.weight)
    x = torch.randn(2, 7, 24, device=device)
    cos, sin = (table.to(device) for table in rotary_tables(4, 7, 10000.0))
    torch.testing.assert_close(grouped(x, Positions(cos, sin)), repeated(x, Positions(cos, sin)))


def test_heads_may_be_wider_than_the_residual_stream() -> None:
    torch.manual_seed(0)
    attention = Attention(dataclasses.replace(CONFIG, head_dim=8))
    cos, sin = rotary_tables(8, 5, 10000.0)
    y = attention(torch.randn(1, 5, 24), Positions(cos, sin))
    assert y.shape == (1, 5, 24)
    assert attention.qkv_proj.weight.shape == ((6 + 2 * 2) * 8, 24)
    assert attention.o_proj.weight.shape == (24, 6 * 8)


def test_only_distances_matter() -> None:
    torch.manual_seed(0)
    attention = Attention(CONFIG).double()
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    cos, sin = rotary_tables(4, 16, 10000.0)
    shifted = attention(x, Positions(cos[9:14], sin[9:14]))
    # Angles in float32 near 13 carry 1e-6.
    torch.testing.assert_close(
        shifted, attention(x, Positions(cos[:5], sin[:5])), rtol=1e-5, atol=1e-6
    )
    # ... and they do matter: without rotation the result is another.
    still = attention(x, Positions(torch.ones_like(cos[:5]), torch.zeros_like(sin[:5])))
    assert (shifted - still).abs().max() > 1e-3


def test_position_ids_choose_the_rows() -> None:
    torch.manual_seed(0)
    attention = Attention(CONFIG)
    x = torch.randn(2, 3, 24)
    cos, sin = rotary_tables(4, 16, 10000.0)
    ids = torch.tensor([[4, 5, 6], [0, 2, 9]])
    y = attention(x, Positions(cos, sin, ids))
    for row in range(2):
        alone = attention(x[row : row + 1], Positions(cos[ids[row]], sin[ids[row]]))
        torch.testing.assert_close(y[row : row + 1], alone)
