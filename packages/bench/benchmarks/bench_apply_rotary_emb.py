"""apply_rotary_emb beside its peers: q and k once in and once out, forward and backward alike.

Shapes are batch x tokens x query heads x key heads x head dimension. The tables are 1/(batch ·
heads) of q and k: not counted. Peers get them as Hugging Face makes them once for all layers, each
angle twice and rounded to the activations' dtype; ours stay float32.
"""

import pytest
import torch

from tilewright_bench import Case, Variant, Work, by_device, run, usual_providers, variants
from tilewright_kernels import apply_rotary_emb, apply_rotary_emb_reference, rotary_table

SHAPES = by_device(
    gpu=[(8, 4096, 16, 8, 128), (8, 2048, 12, 12, 128), (1, 256, 8, 8, 64)], cpu=[(2, 16, 4, 2, 32)]
)


def ours(q, k, cos, sin, cos_twice, sin_twice):
    return apply_rotary_emb(q, k, cos, sin)


def exact(q, k, cos, sin, cos_twice, sin_twice):
    return apply_rotary_emb_reference(q, k, cos, sin)


def eager(q, k, cos, sin, cos_twice, sin_twice):
    def turn(x):
        first, second = x.chunk(2, -1)
        return x * cos_twice[:, None] + torch.cat((-second, first), -1) * sin_twice[:, None]

    return turn(q), turn(k)


def liger():
    function = pytest.importorskip("liger_kernel.ops.rope").LigerRopeFunction

    # In place: from the second call on it turns what it turned before, at the same speed.
    def turn(q, k, cos, sin, cos_twice, sin_twice):
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        q, k = function.apply(q, k, cos_twice[None], sin_twice[None])
        return q.transpose(1, 2), k.transpose(1, 2)

    return turn


def case(
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    def make_inputs(device, generator):
        options = {"device": device, "dtype": dtype, "generator": generator}
        q = torch.randn(batch, tokens, heads, head_dim, **options).requires_grad_()
        k = torch.randn(batch, tokens, kv_heads, head_dim, **options).requires_grad_()
        tables = rotary_table(head_dim, tokens, device=device)
        return q, k, *tables, *(torch.cat((table, table), -1).to(dtype) for table in tables)

    size = batch * tokens * (heads + kv_heads) * head_dim
    # Six operations a pair. The gradient is the same rotation the other way round.
    work = Work(bytes=2 * size * dtype.itemsize, flops=3 * size)
    return Case(
        operator="apply_rotary_emb",
        shape=(batch, tokens, heads, kv_heads, head_dim),
        dtype=dtype,
        make_inputs=make_inputs,
        reference=exact,
        forward=work,
        backward=work,
    )


PROVIDERS = usual_providers(ours, eager, liger=liger)


@pytest.mark.parametrize("variant", variants(PROVIDERS), ids=str)
@pytest.mark.parametrize("case", [case(*shape) for shape in SHAPES], ids=str)
def bench_apply_rotary_emb(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)
