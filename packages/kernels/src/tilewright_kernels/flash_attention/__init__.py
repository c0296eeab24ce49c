"""Attention without the matrix of scores, as a ladder of four rungs.

    softmax(scale · q·kᵀ) · v

Read in this order: `reference` (scores written out: what every option means), `tiled_reference`
(FlashAttention-2 in plain torch), `masks` (who sees whom), `forward`, `backward` and `decode` (the
portable kernels), `forward_hopper`, `backward_queries_hopper`, `backward_keys_hopper` and
`backward_hopper` (what takes their place on one architecture), `registration` (the gradient),
`functional`, `varlen` and `with_kvcache` (the public functions).
"""

from tilewright_kernels.flash_attention.functional import scaled_dot_product_attention
from tilewright_kernels.flash_attention.reference import (
    attention_reference,
    decode_attention_reference,
    varlen_attention_reference,
)
from tilewright_kernels.flash_attention.tiled_reference import flash_attention_reference
from tilewright_kernels.flash_attention.varlen import flash_attn_decode, flash_attn_varlen_func
from tilewright_kernels.flash_attention.with_kvcache import (
    attention_with_kvcache_reference,
    flash_attn_with_kvcache,
)

__all__ = [
    "attention_reference",
    "attention_with_kvcache_reference",
    "decode_attention_reference",
    "flash_attention_reference",
    "flash_attn_decode",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "scaled_dot_product_attention",
    "varlen_attention_reference",
]
