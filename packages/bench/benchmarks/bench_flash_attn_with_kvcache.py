"""flash_attn_with_kvcache: one new token a sequence, from its projections to attention's result.

The cache is read once, and beside it a row of q, k and v is read, one of keys and values written
and one of outputs. torch's functions rotate, write the row and attend to all of the cache: every
sequence here fills it.
"""

import pytest
import torch
import torch.nn.functional as F

from tilewright_bench import Case, Variant, Work, by_device, run, usual_providers, variants
from tilewright_kernels import apply_rotary_emb_reference, flash_attn_with_kvcache

# Sequences, capacity, query heads, key heads, head dimension: a 0.5 B decoder's, and a long cache.
SHAPES = by_device(
    gpu=[(1, 256, 12, 12, 128), (32, 256, 12, 12, 128), (32, 4096, 64, 8, 128)],
    cpu=[(32, 64, 2, 1, 16)],
)


def ours(q, k, v, k_cache, v_cache, seqlens, cos, sin):
    return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, seqlens, cos=cos, sin=sin)


def eager(q, k, v, k_cache, v_cache, seqlens, cos, sin):
    q, k = apply_rotary_emb_reference(q, k, cos, sin, position_ids=seqlens[:, None])
    batch, last = torch.arange(len(q), device=q.device), seqlens.long()
    k_cache[batch, last], v_cache[batch, last] = k[:, 0], v[:, 0]
    q, keys, values = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True).transpose(1, 2)


def case(
    batch: int, capacity: int, heads: int, kv_heads: int, width: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:  # fmt: skip
    def make_inputs(device, generator, capacity=capacity):
        options = {"device": device, "dtype": dtype, "generator": generator}
        qkv = torch.randn(batch, 1, heads + 2 * kv_heads, width, **options)
        caches = [torch.randn(batch, capacity, kv_heads, width, **options) for _ in range(2)]
        angles = torch.rand(capacity, width // 2, device=device, generator=generator)
        seqlens = torch.full((batch,), capacity - 1, dtype=torch.int32, device=device)
        split = qkv.split([heads, kv_heads, kv_heads], dim=2)
        return *split, *caches, seqlens, angles.cos(), angles.sin()

    cached = 2 * batch * capacity * kv_heads * width
    new = batch * (2 * heads + 2 * kv_heads) * width
    work = Work(bytes=(cached + new) * dtype.itemsize, flops=2 * cached * heads // kv_heads)
    return Case(
        operator="flash_attn_with_kvcache",
        shape=(batch, capacity, heads, kv_heads, width),
        dtype=dtype,
        make_inputs=make_inputs,
        reference=eager,
        forward=work,
        backward=work,  # there is none
        check_inputs=lambda device, generator: make_inputs(device, generator, min(capacity, 1024)),
    )


PROVIDERS = usual_providers(ours, eager)


@pytest.mark.parametrize("variant", variants(PROVIDERS, ("fwd",)), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_flash_attn_with_kvcache(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)
