"""Attention of 12 query heads of 128 to a cache with 12, 4 and 1 key/value heads.

    python packages/bench/benchmarks/key_value_heads.py > RECORD

One new token of each of 32 sequences, 4096 tokens in the cache: medians of samples of ten replays
of a CUDA graph.
"""

import json
from collections.abc import Callable
from typing import Any

import torch

from tilewright_bench.environment import describe
from tilewright_kernels import flash_attn_decode

HEADS, WIDTH = 12, 128
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
    record: dict[str, Any] = {**describe(), "decoding": [SEQUENCES, CACHED, HEADS, WIDTH]}
    record["key_value_heads"] = {str(kv_heads): decoding(kv_heads) for kv_heads in (12, 4, 1)}
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
