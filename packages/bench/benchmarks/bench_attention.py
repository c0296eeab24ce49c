"""scaled_dot_product_attention and flash_attn_varlen_func beside torch's implementations.

Shapes are batch x tokens x query heads x key heads x head dimension, 16384 tokens in all. A visible
pair of query and key takes two products of D in the forward (scores, output) and five in the
backward (scores again, dv, dp, dq, dk). What a provider computes beyond that is not counted: the
deterministic backward's two more products, or masked parts of tiles.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, TypedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from tilewright_bench import Case, Variant, Work, by_device, run, variants
from tilewright_kernels import (
    attention_reference,
    flash_attention_reference,
    flash_attn_varlen_func,
    scaled_dot_product_attention,
    varlen_attention_reference,
)

CAUSAL = by_device(
    gpu=[
        *((16, 1024, 16, 16, 128), (4, 4096, 16, 16, 128), (1, 16384, 16, 16, 128)),
        *((16, 1024, 32, 32, 64), (4, 4096, 32, 32, 64), (1, 16384, 32, 32, 64)),
        (4, 4096, 32, 8, 128),
    ],
    cpu=[(1, 16, 2, 1, 16)],
)
LADDER = by_device(gpu=[(16, 1024, 16, 16, 128)], cpu=[(1, 16, 2, 2, 16)])
WINDOWED = by_device(gpu=[(1, 16384, 16, 16, 128)], cpu=[(1, 16, 2, 1, 16)])
CAPPED = by_device(gpu=[(4, 4096, 16, 16, 128)], cpu=[(1, 16, 2, 1, 16)])
PACKED = by_device(gpu=[(16384, 16, 16, 128)], cpu=[(24, 2, 1, 16)])
WINDOW = by_device(gpu=1024, cpu=4)
"""Keys that a query sees, itself among them."""

SOFTCAP = 20.0
DOCUMENTS = by_device(gpu=(8192, 4096, 2048, 1024, 512, 256, 128, 128), cpu=(13, 8, 3))
CHECKED_TOKENS = 512
"""Float64 scores of all tokens take 32 GiB a head; the comparison takes fewer, in one batch."""

Build = Callable[[], Callable[..., Any]]


def ours(**options: Any) -> Build:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, **options)

    return lambda: attention


def torchs(backend: SDPBackend) -> Build:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return lambda: attention


@cache
def block_mask(tokens: int, window: int | None, device: torch.device) -> Any:
    def seen(batch, head, query, key):
        causal = query >= key
        return causal if window is None else causal & (query - key < window)

    return create_block_mask(seen, None, None, tokens, tokens, device=device)


def capped(score, batch, head, query, key):
    return SOFTCAP * torch.tanh(score / SOFTCAP)


def flex(window: int | None = None, score_mod: Callable[..., Tensor] | None = None) -> Build:
    def build():
        compiled = torch.compile(flex_attention, dynamic=False)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return compiled(
                q, k, v,
                score_mod=score_mod,
                block_mask=block_mask(q.shape[-2], window, q.device),
                enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip

        return attention

    return build


class LeastWork(TypedDict):
    """What a `Case` is told of both directions."""

    forward: Work
    backward: Work


def work(pairs: int, dim: int, inputs: int, out: int) -> LeastWork:
    """Least work: bytes of q, k and v, of the output, and their gradients in the backward."""
    return LeastWork(
        forward=Work(bytes=inputs + out, flops=4 * pairs * dim),
        backward=Work(bytes=2 * inputs + out, flops=10 * pairs * dim),
    )


def case(
    shape: tuple[int, ...],
    operator: str = "scaled_dot_product_attention",
    window: int | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    batch, tokens, heads, kv_heads, dim = shape
    span = tokens if window is None else min(window, tokens)
    checked = min(tokens, CHECKED_TOKENS if window is None else 2 * window)

    def inputs_of(batch, tokens, device, generator):
        options = {"device": device, "dtype": dtype, "generator": generator}
        return tuple(
            torch.randn(batch, n, tokens, dim, **options).requires_grad_()
            for n in (heads, kv_heads, kv_heads)
        )

    def reference(q, k, v):
        window_size = None if window is None else (window - 1, 0)
        return attention_reference(
            q, k, v, is_causal=True, window_size=window_size, softcap=softcap
        )

    return Case(
        operator=operator,
        shape=shape,
        dtype=dtype,
        make_inputs=lambda device, generator: inputs_of(batch, tokens, device, generator),
        check_inputs=lambda device, generator: inputs_of(1, checked, device, generator),
        reference=reference,
        **work(
            pairs=batch * heads * (tokens * span - span * (span - 1) // 2),
            dim=dim,
            inputs=batch * tokens * (heads + 2 * kv_heads) * dim * dtype.itemsize,
            out=batch * tokens * heads * dim * dtype.itemsize,
        ),
    )


def packed_case(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Case:
    tokens, heads, kv_heads, dim = shape

    def inputs_of(documents, device, generator):
        options = {"device": device, "dtype": dtype, "generator": generator}
        lengths = torch.tensor((0, *documents), device=device)
        q, k, v = (
            torch.randn(sum(documents), n, dim, **options).requires_grad_()
            for n in (heads, kv_heads, kv_heads)
        )
        return q, k, v, lengths.cumsum(0, dtype=torch.int32), max(documents)

    return Case(
        operator="flash_attn_varlen_func",
        shape=shape,
        dtype=dtype,
        make_inputs=lambda device, generator: inputs_of(DOCUMENTS, device, generator),
        check_inputs=lambda device, generator: inputs_of(DOCUMENTS[-4:], device, generator),
        reference=packed_reference,
        **work(
            pairs=heads * sum(n * (n + 1) // 2 for n in DOCUMENTS),
            dim=dim,
            inputs=tokens * (heads + 2 * kv_heads) * dim * dtype.itemsize,
            out=tokens * heads * dim * dtype.itemsize,
        ),
    )


def packed_reference(q, k, v, cu_seqlens, longest):
    return varlen_attention_reference(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, is_causal=True
    )


def packed_ours(deterministic: bool) -> Build:
    def attention(q, k, v, cu_seqlens, longest):
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, is_causal=True,
            deterministic=deterministic,
        )  # fmt: skip

    return lambda: attention


def packed_torchs(q, k, v, cu_seqlens, longest):
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0))


PROVIDERS = {
    "tilewright": ours(deterministic=False),
    "deterministic": ours(deterministic=True),
    "flash": torchs(SDPBackend.FLASH_ATTENTION),
    "cudnn": torchs(SDPBackend.CUDNN_ATTENTION),
    "efficient": torchs(SDPBackend.EFFICIENT_ATTENTION),
    "flex": flex(),
}
BLOCK = 256
"""Queries and keys of a tile in plain torch: smaller ones are more launches."""


def scores_written_out(q, k, v):
    return attention_reference(q, k, v, is_causal=True)


def tiles_in_torch(q, k, v):
    return flash_attention_reference(q, k, v, is_causal=True, block_q=BLOCK, block_k=BLOCK)


LADDER_PROVIDERS = {
    "tilewright": ours(deterministic=False),
    "torch": lambda: scores_written_out,
    "compile": lambda: torch.compile(scores_written_out, dynamic=False),
    "tiles": lambda: tiles_in_torch,
    "tiles compiled": lambda: torch.compile(tiles_in_torch, dynamic=False),
}
WINDOW_PROVIDERS = {
    "tilewright": ours(deterministic=False, window_size=(WINDOW - 1, 0)),
    "deterministic": ours(deterministic=True, window_size=(WINDOW - 1, 0)),
    "flex": flex(window=WINDOW),
}
SOFTCAP_PROVIDERS = {
    "tilewright": ours(deterministic=False, softcap=SOFTCAP),
    "deterministic": ours(deterministic=True, softcap=SOFTCAP),
    "flex": flex(score_mod=capped),
}
PACKED_PROVIDERS = {
    "tilewright": packed_ours(deterministic=False),
    "deterministic": packed_ours(deterministic=True),
    "varlen_attn": lambda: packed_torchs,
}


@pytest.mark.parametrize("variant", variants(PROVIDERS), ids=str)
@pytest.mark.parametrize("case", [case(shape) for shape in CAUSAL], ids=str)
def bench_attention(benchmark, case: Case, variant: Variant):
    # torch's memory-efficient kernel does not share key heads.
    if variant.provider == "efficient" and case.shape[2] != case.shape[3]:
        pytest.skip("key heads are not shared by this one")
    run(benchmark, case, variant)


@pytest.mark.parametrize("variant", variants(LADDER_PROVIDERS), ids=str)
@pytest.mark.parametrize("case", [case(shape, "attention_ladder") for shape in LADDER], ids=str)
def bench_attention_ladder(benchmark, case: Case, variant: Variant):
    """The rungs in plain torch, eager and compiled, below the kernel."""
    run(benchmark, case, variant)


@pytest.mark.parametrize("variant", variants(WINDOW_PROVIDERS), ids=str)
@pytest.mark.parametrize(
    "case", [case(shape, "attention_window", window=WINDOW) for shape in WINDOWED], ids=str
)
def bench_attention_window(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)


@pytest.mark.parametrize("variant", variants(SOFTCAP_PROVIDERS), ids=str)
@pytest.mark.parametrize(
    "case", [case(shape, "attention_softcap", softcap=SOFTCAP) for shape in CAPPED], ids=str
)
def bench_attention_softcap(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)


@pytest.mark.parametrize("variant", variants(PACKED_PROVIDERS), ids=str)
@pytest.mark.parametrize("case", [packed_case(shape) for shape in PACKED], ids=str)
def bench_attention_packed(benchmark, case: Case, variant: Variant):
    run(benchmark, case, variant)
