"""What a model's inference reaches: decoding, prefill, and a cache that is not concatenated.

    python packages/bench/benchmarks/inference_rates.py --commit COMMIT --out FILE

The 0.5 B decoder in bfloat16 with random weights. Decoding takes prompts of 128 tokens on to 256
new ones, greedily, by an `Engine` that has run before; what its first call took is noted beside.
Prefill is 8 prompts of 4096, beside a large product of matrices in the same seconds. The cache is
compared with concatenation, both by launches from the host and without a graph: the same blocks,
and keys and values that are either written to their rows or joined to all that came before.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright_bench.environment import describe
from tilewright_kernels import apply_rotary_emb
from tilewright_model import CausalLM, Engine, KVCache, SamplingParams, preset
from tilewright_model.attention import causal_attention
from tilewright_model.block import Block
from tilewright_model.decode_step import counters_for, decode_step
from tilewright_model.prefill import prefill

REPEATS = 5


def build(name: str, device: torch.device) -> CausalLM:
    """A preset with random weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = CausalLM(preset(name))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return model.to(dtype).materialize(device).eval()


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device, repeats: int = REPEATS) -> float:
    """Median time of a call, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def decoding(model: CausalLM, batch: int, prompt: int, new: int, **options: Any) -> dict[str, Any]:
    """Tokens a second of a batch, from the first new token to the last, and with the prompts."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, prompt)
    prompts = torch.randint(model.config.vocab_size, shape, generator=generator).tolist()
    params = SamplingParams(max_new_tokens=new, **options)
    start = time.perf_counter()
    engine = Engine(model, max_batch_size=batch, max_length=prompt + new)
    engine.generate(prompts, params)
    first_call = time.perf_counter() - start
    decode, whole = [], []
    for _ in range(REPEATS):
        start = time.perf_counter()
        times = [time.perf_counter() for token in engine.stream(prompts, params) if not token.index]
        decode.append(batch * (new - 1) / (times[-1] - times[0]))
        whole.append(batch * new / (times[-1] - start))
    return {
        "batch": batch,
        "prompt": prompt,
        "new": new,
        "options": options,
        "tokens_per_s": round(statistics.median(decode), 1),
        "tokens_per_s_with_prompts": round(statistics.median(whole), 1),
        "first_call_s": round(first_call, 2),
    }


def prompts_read(model: CausalLM, batch: int, length: int) -> dict[str, Any]:
    """Operations a second of a prefill, causal attention counted by half, beside a product's."""
    config, device = model.config, model.embed_tokens.weight.device
    dtype = model.embed_tokens.weight.dtype
    ids = torch.randint(config.vocab_size, (batch, length), device=device)
    cache = KVCache(config, batch, length, device=device, dtype=dtype)

    @torch.no_grad()
    def read() -> Tensor:
        cache.reset()
        return model.project_logits(prefill(model, ids, [length] * batch, cache))

    matrices = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    width = config.num_attention_heads * config.attention_head_dim
    attention = 2 * config.num_hidden_layers * batch * length * length * width
    flops = 2 * matrices * batch * length + attention
    size = 8192 if device.type == "cuda" else 256
    a, b = torch.randn(2, size, size, device=device, dtype=dtype).unbind()
    # Before and after: a card that has cooled multiplies faster.
    before = seconds(lambda: a @ b, device)
    rate = flops / seconds(read, device)
    product = 2 * size**3 / min(before, seconds(lambda: a @ b, device))
    return {
        "batch": batch,
        "length": length,
        "tflop_per_s": round(rate / 1e12, 2),
        "matmul_tflop_per_s": round(product / 1e12, 2),
        "share": round(rate / product, 3),
        "tokens_per_s": round(batch * length * rate / flops),
    }


@torch.no_grad()
def concatenating_step(
    model: CausalLM, tokens_B: Tensor, cache: list[tuple[Tensor, Tensor]], position: int
) -> Tensor:
    """As `decode_step`, with keys and values that are concatenated."""
    h_B1C = F.embedding(tokens_B[:, None], model.embed_tokens.weight)
    assert model.rotary is not None
    cos, sin = model.rotary(position, 1)
    for i, module in enumerate(model.layers):
        block = cast(Block, module)
        attention = block.self_attn
        qkv = attention.qkv_proj(block.input_layernorm(h_B1C))
        heads = [attention.heads, attention.kv_heads, attention.kv_heads]
        q, k, v = qkv.unflatten(-1, (-1, attention.head_dim)).split(heads, dim=-2)
        q, k = apply_rotary_emb(q, k, cos, sin)
        k_cache, v_cache = cache[i]
        cache[i] = torch.cat([k_cache, k], dim=1), torch.cat([v_cache, v], dim=1)
        y = attention.o_proj(causal_attention(q, *cache[i]).flatten(-2))
        x, h_B1C = block.post_attention_layernorm(y, h_B1C)
        h_B1C = h_B1C + cast(Tensor, block.mlp(x))
    return model.project_logits(model.norm(h_B1C))[:, -1]


@torch.no_grad()
def caches(model: CausalLM, batch: int, tokens: int) -> list[dict[str, Any]]:
    """Time and memory of so many tokens: by rows of one allocation, and by concatenation."""
    config, weight = model.config, model.embed_tokens.weight
    device, dtype = weight.device, weight.dtype
    first = torch.zeros(batch, dtype=torch.int64, device=device)
    counters = counters_for(model, batch)
    shape = (batch, 0, config.num_key_value_heads, config.attention_head_dim)

    def allocated() -> int:
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def run(kind: str, tokens: int) -> tuple[list[float], list[int]]:
        before = allocated()
        rows = (
            KVCache(config, batch, tokens, device=device, dtype=dtype) if kind == "rows" else None
        )
        empty = torch.empty(shape, device=device, dtype=dtype)
        joined = [(empty, empty) for _ in model.layers]
        ids, times, memory = first, [], []
        for position in range(tokens):
            if rows is None:
                logits = concatenating_step(model, ids, joined, position)
            else:
                logits = decode_step(model, ids, rows, counters)
                rows.advance(1)
            ids = logits.argmax(-1)
            if position % 50 == 49:
                synchronize(device)
                times.append(time.perf_counter())
                memory.append(allocated() - before)
        return times, memory

    results = []
    for kind in ("rows", "concatenation"):
        run(kind, 50)  # what is compiled is compiled
        times, memory = run(kind, tokens)
        # Without the first 50, which have the start in them.
        elapsed = times[-1] - times[0]
        results.append(
            {
                "cache": kind,
                "batch": batch,
                "tokens": tokens,
                "tokens_per_s": round(batch * (tokens - 50) / elapsed, 1),
                "bytes_each_50_tokens": memory,
            }
        )
    return results


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--commit", default="", help="of the code, to be saved with the figures")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    name = "0.5b" if gpu else "nano"
    model = build(name, device)
    prompt, new = (128, 256) if gpu else (8, 8)
    warm = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 0}
    record: dict[str, Any] = {
        **describe(),
        "commit": options.commit,
        "command": "python packages/bench/benchmarks/inference_rates.py",
        "corpus": "random weights and prompts",
        "model": name,
        "dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch."),
        "decode": [
            decoding(model, batch, prompt, new, **choice)
            for choice in ({"temperature": 0}, warm)
            for batch in ((1, 8, 32) if gpu else (1, 2))
        ],
        "prefill": prompts_read(model, 8 if gpu else 1, 4096 if gpu else 32),
        "cache": caches(model, 1 if gpu else 2, 1000 if gpu else 100),
    }
    print(json.dumps(record, indent=1), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
