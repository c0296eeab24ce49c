"""Attention of 12 query heads of 128 with 12, 4 and 1 key/value heads, in training and in decoding.

    python packages/bench/benchmarks/key_value_heads.py > RECORD

Training: 16 sequences of 2048 tokens, causal. Decoding: one new token of each of 32 sequences to
a cache of 4096. Medians of samples of ten calls; decoding is replayed from a CUDA graph.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright_bench.environment import describe
from tilewright_kernels import flash_attn_decode, scaled_dot_product_attention

HEADS, WIDTH = 12, 128
BATCH, TOKENS = 16, 2048
SEQUENCES, CACHED = 32, 4096
CALLS, SAMPLES = 10, 9


def microseconds(call: Callable[[], Any]) -> float:
    """Median time of a call."""
    call()
    samples = []
    for _ in range(SAMPLES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / CALLS * 1000)
    return round(sorted(samples)[SAMPLES // 2], 1)


def training(kv_heads: int) -> dict[str, float]:
    """Times of forward and backward."""
    shapes = [(BATCH, TOKENS, heads, WIDTH) for heads in (HEADS, kv_heads, kv_heads)]
    q, k, v = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for shape in shapes
    )

    def forward() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    out = forward()
    gradient = torch.randn_like(out)
    return {
        "forward_us": microseconds(forward),
        "backward_us": microseconds(
            lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)
        ),
    }


def decoding(kv_heads: int) -> dict[str, float]:
    """Time of a step of attention."""
    shape = (SEQUENCES, CACHED, kv_heads, WIDTH)
    keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(SEQUENCES, 1, HEADS, WIDTH, device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((SEQUENCES,), CACHED, dtype=torch.int32, device="cuda")
    flash_attn_decode(q, keys, values, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flash_attn_decode(q, keys, values, lengths)
    return {"decode_us": microseconds(graph.replay)}


def main() -> None:
    """Measure and print a record."""
    with_heads = {str(kv): {**training(kv), **decoding(kv)} for kv in (12, 4, 1)}
    shapes = {"training": [BATCH, TOKENS, HEADS, WIDTH], "decoding": [SEQUENCES, CACHED]}
    print(json.dumps({**describe(), **shapes, "key_value_heads": with_heads}, indent=1))


if __name__ == "__main__":
    main()
