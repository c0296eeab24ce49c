"""Causal self-attention with rotary positions and grouped key/value heads.

Shapes: B batch, T new tokens, S tokens attended to (S = T without a cache), C hidden_size,
H query heads, K key/value heads, D head dimension.
"""

from torch import Tensor, nn

from tilewright_kernels import (
    Linear,
    RMSNorm,
    apply_rotary_emb,
    flash_attn_decode,
    flash_attn_varlen_func,
    scaled_dot_product_attention,
)
from tilewright_model.config import ModelConfig
from tilewright_model.kv_cache import LayerCache
from tilewright_model.positions import Positions


class Attention(nn.Module):
    """softmax(q·kᵀ/√D + causal mask)·v for each head, between a fused q/k/v and an output product.

    Query head h reads key/value head h // (H / K) (GQA: Ainslie et al. 2023, arXiv:2305.13245).
    `qkv_proj.weight` is [(H + 2K)·D, C]: the rows of q, then k, then v; one product instead of
    three forward, and one sum of input gradients less twice backward.

    Args:
        config: of the model.
        layer: index of the block, which decides on a sliding window.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.head_dim = config.attention_head_dim
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.softcap = config.attn_logit_softcapping
        self.dropout = config.attention_dropout
        window = config.window(layer)
        self.window_size = None if window is None else (window - 1, 0)
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, rows, bias=False)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = None

    def forward(
        self, x_BTC: Tensor, positions: Positions, cache: LayerCache | None = None
    ) -> Tensor:
        """Each token's mixture of the values up to and including its own.

        Args:
            x_BTC: normalized hidden states.
            positions: of the tokens, and which of them belong together.
            cache: earlier keys and values of this layer; the new ones are written to it.

        Returns:
            [B, T, C].
        """
        qkv = self.qkv_proj(x_BTC).unflatten(-1, (-1, self.head_dim))
        q_BTHD, k_BTKD, v_BTKD = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        if positions.cos is not None and positions.sin is not None:
            q_BTHD, k_BTKD = apply_rotary_emb(
                q_BTHD, k_BTKD, positions.cos, positions.sin, position_ids=positions.ids
            )
        if cache is not None:
            y_BTHD = self._attend_to_cache(q_BTHD, k_BTKD, v_BTKD, cache)
        elif positions.cu_seqlens is not None:
            y_BTHD = self._attend_within(q_BTHD, k_BTKD, v_BTKD, positions)
        else:
            y_BTHD = self._attend(q_BTHD, k_BTKD, v_BTKD)
        return self.o_proj(y_BTHD.flatten(-2))

    def _attend(self, q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> Tensor:
        return causal_attention(
            q_BTHD,
            k_BSKD,
            v_BSKD,
            window_size=self.window_size,
            softcap=self.softcap,
            dropout_p=self.dropout if self.training else 0.0,
        )

    def _attend_within(
        self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, positions: Positions
    ) -> Tensor:
        """Attention within each of the packed sequences: views, nothing is copied."""
        q_NHD, k_NKD, v_NKD = (x.flatten(0, 1) for x in (q_BTHD, k_BTKD, v_BTKD))
        cu_seqlens, longest = positions.cu_seqlens, positions.max_seqlen
        assert cu_seqlens is not None
        y_NHD = flash_attn_varlen_func(
            *(q_NHD, k_NKD, v_NKD, cu_seqlens, cu_seqlens, longest, longest),
            is_causal=True,
            window_size=self.window_size,
            softcap=self.softcap,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return y_NHD.unflatten(0, q_BTHD.shape[:2])

    def _attend_to_cache(
        self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, cache: LayerCache
    ) -> Tensor:
        k_BSKD, v_BSKD = cache.append(k_BTKD, v_BTKD)
        if q_BTHD.shape[1] > 1 and cache.rows is None:
            return self._attend(q_BTHD, k_BSKD, v_BSKD)
        # All of the cache, so that one compiled kernel serves every length, and unequal ones.
        return flash_attn_decode(
            *(q_BTHD, cache.keys, cache.values, cache.lengths),
            window_size=self.window_size,
            softcap=self.softcap,
        )

    def extra_repr(self) -> str:
        """Heads and options, in the module's printed form."""
        window = "" if self.window_size is None else f", window={self.window_size[0] + 1}"
        cap = "" if self.softcap is None else f", softcap={self.softcap}"
        return f"heads={self.heads}/{self.kv_heads} of {self.head_dim}{window}{cap}"


def causal_attention(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    *,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
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
        window_size=window_size,
        softcap=softcap,
        dropout_p=dropout_p,
    )
    return y_BHTD.transpose(1, 2)
