"""Causal self-attention with rotary positions and grouped key/value heads.

Shapes: B batch, T new tokens, S tokens attended to (S = T without a cache), C hidden_size,
H query heads, K key/value heads, D head dimension.
"""

from torch import Tensor, nn

from tilewright_kernels import (
    apply_rotary_emb,
    flash_attn_decode,
    scaled_dot_product_attention,
)
from tilewright_model.config import ModelConfig
from tilewright_model.kv_cache import LayerCache


class Attention(nn.Module):
    """softmax(q·kᵀ/√D + causal mask)·v for each head, between a fused q/k/v and an output product.

    Query head h reads key/value head h // (H / K) (GQA: Ainslie et al. 2023, arXiv:2305.13245).
    `qkv_proj.weight` is [(H + 2K)·D, C]: the rows of q, then k, then v; one product instead of
    three forward, and one sum of input gradients less twice backward.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.attention_head_dim
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        x_BTC: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Each token's mixture of the values up to and including its own.

        Args:
            x_BTC: normalized hidden states.
            cos: rotary table, [P, D/2] float32; row t is token t's unless position_ids says.
            sin: as cos.
            position_ids: [B, T] int64, rows of the tables.
            cache: earlier keys and values of this layer; the new ones are written to it.

        Returns:
            [B, T, C].
        """
        qkv = self.qkv_proj(x_BTC).unflatten(-1, (-1, self.head_dim))
        q_BTHD, k_BTKD, v_BTKD = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
        q_BTHD, k_BTKD = apply_rotary_emb(q_BTHD, k_BTKD, cos, sin, position_ids=position_ids)
        if cache is None:
            y_BTHD = causal_attention(q_BTHD, k_BTKD, v_BTKD)
        else:
            k_BSKD, v_BSKD = cache.append(k_BTKD, v_BTKD)
            if q_BTHD.shape[1] == 1:
                # All of the cache, so that one compiled kernel serves every length.
                y_BTHD = flash_attn_decode(q_BTHD, cache.keys, cache.values, cache.lengths)
            else:
                y_BTHD = causal_attention(q_BTHD, k_BSKD, v_BSKD)
        return self.o_proj(y_BTHD.flatten(-2))


def causal_attention(q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> Tensor:
    """Scaled dot-product attention in which the last query sees all S keys, the one before S - 1.

    Returns:
        [B, T, H, D], a transposed view.
    """
    y_BHTD = scaled_dot_product_attention(
        q_BTHD.transpose(1, 2),
        k_BSKD.transpose(1, 2),
        v_BSKD.transpose(1, 2),
        is_causal=True,
        causal_alignment="bottom_right",
        enable_gqa=True,
    )
    return y_BHTD.transpose(1, 2)
