"""flash_attn_decode: one new token a sequence against a cache of at least 131072 in all.

The cache is read once, [B, S, K, D] of keys and as much of values, and beside it a row of queries
is read and one of outputs written. torch's function takes no lengths, so every sequence here fills
its cache.
"""

import pytest
import torch
import torch.nn.functional as F

from tilewright_bench import Case, Variant, Work, by_device, run, usual_providers, variants
from tilewright_kernels import flash_attn_decode

GROUP = 8
"""Query heads that share a key head."""

# Sequences, capacity, key heads, head dimension.
SHAPES = by_device(
    gpu=[(1, 131072, 8, 128), (32, 4096, 8, 128), (32, 4096, 8, 64)], cpu=[(2, 64, 1, 16)]
)


def eager(q, k_cache, v_cache, lengths):
    q, k, v = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def case(
    batch: int, capacity: int, heads: int, width: int, dtype: torch.dtype = torch.bfloat16
) -> Case:
    def make_inputs(device, generator, capacity=capacity):
        options = {"device": device, "dtype": dtype, "generator": generator}
        q = torch.randn(batch, 1, heads * GROUP, width, **options)
        k = torch.randn(batch, capacity, heads, width, **options)
        v = torch.randn(batch, capacity, heads, width, **options)
        return q, k, v, torch.full((batch,), capacity, dtype=torch.int32, device=device)

    cached = batch * capacity * heads * width
    new = batch * heads * GROUP * width
    work = Work(bytes=2 * (cached + new) * dtype.itemsize, flops=4 * cached * GROUP)
    return Case(
        operator="flash_attn_decode",
        shape=(batch, capacity, heads, GROUP, width),
        dtype=dtype,
        make_inputs=make_inputs,
        reference=eager,
        forward=work,
        backward=work,  # there is none
        # The reference writes scores out, and keys and values once a query head, in float64.
        check_inputs=lambda device, generator: make_inputs(device, generator, min(capacity, 8192)),
    )


PROVIDERS = usual_providers(flash_attn_decode, eager)


@pytest.mark.parametrize("variant", variants(PROVIDERS, ("fwd",)), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_flash_attn_decode(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)
