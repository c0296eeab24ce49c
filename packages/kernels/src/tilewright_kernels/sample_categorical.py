"""Drawing from softmax(logits / temperature) without a sum: the Gumbel-max trick, in one launch.

    token = argmax_v (logit_v / temperature - log E_v)          E_v ~ Exp(1), one for each v

(Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030). E is Philox4x32-10 of (seed, step, v) and of
nothing else: what a sequence draws does not depend on who is in its batch, on the device, or on
what was drawn before. Temperature 0 is the argmax itself. Truncations such as top-k and top-p keep
the largest logits, so one `threshold` a row says all of them.

Each row is shared by programs that leave their best token and their part of the log-sum-exp; the
last to arrive puts them together.
"""

from typing import Any

import torch
from torch import Tensor

from tilewright_kernels import _math
from tilewright_kernels._launch import cdiv, is_hopper, next_power_of_2
from tilewright_kernels._operator import (
    Operator,
    accumulator,
    as_rows,
    check_floating,
    check_same_device,
)
from tilewright_kernels._overlap import await_previous_launch
from tilewright_kernels._triton import tl, triton
from tilewright_kernels.dropout import philox, philox_reference

_OP = Operator("sample_categorical")

BLOCK_V = 4096
"""Logits of a program."""


def sample_categorical_reference(
    logits: Tensor,
    seeds: Tensor,
    steps: Tensor,
    *,
    temperature: Tensor | None = None,
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition in plain torch; arguments as `sample_categorical`."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    score = wide
    if temperature is None:
        temperature = torch.ones_like(seeds, dtype=torch.float32)
    index = torch.arange(logits.shape[1], device=logits.device)
    words = philox_reference(seeds[:, None], (steps.long()[:, None] << 32) + index)[..., 0]
    uniform = (words.to(wide.dtype) * 2**-32 + 2**-33).clamp(max=1 - 2**-24)
    greedy = temperature[:, None] == 0
    warm = torch.where(greedy, 1.0, temperature[:, None])
    # Temperature times the sum where it is below 1, so that no logit overflows.
    noise = (-torch.log1p(-uniform)).log()
    score = torch.where(greedy, wide, wide / warm.clamp(min=1) - noise * warm.clamp(max=1))
    if threshold is not None:
        score = score.masked_fill(wide < threshold[:, None], -torch.inf)
    tokens = score.argmax(-1)
    return tokens, wide.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


@triton.jit
def _sample_categorical_kernel(
    logits_ptr, seeds_ptr, steps_ptr, temperature_ptr, threshold_ptr, tokens_ptr, log_probs_ptr,
    parts_ptr, part_tokens_ptr, counters_ptr, row_stride, V,
    BLOCKS: tl.constexpr, ROUNDED: tl.constexpr, ACC: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A row's best of BLOCK_V tokens and, by its last program, of all; grid (BLOCKS, B).

    parts is [B, 4, BLOCKS]: best score, its logit, the largest logit, Σ exp(logit - largest).
    part_tokens is [B, BLOCKS]: the best tokens.
    """
    await_previous_launch(OVERLAP)
    block, row = tl.program_id(0), tl.program_id(1)
    v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    at = logits_ptr + row.to(tl.int64) * row_stride + v
    given = tl.load(at, mask=v < V, other=float("-inf")).to(ACC)
    # What is no number is not drawn, and makes the log-probability none either, by the sum below.
    logit = tl.where(given == given, given, float("-inf"))
    score = logit
    temperature = tl.full((), 1.0, dtype=ACC)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row).to(ACC)
    if temperature > 0.0:
        counter = (tl.load(steps_ptr + row).to(tl.int64) << 32) + v
        word, _, _, _ = philox(tl.load(seeds_ptr + row), counter.to(tl.uint64))
        uniform = tl.minimum(word.to(ACC) * 2.3283064365386963e-10 + 1.1641532182693481e-10,
                             1 - 5.9604644775390625e-08)  # fmt: skip
        # Temperature times the sum where it is below 1, so that no logit overflows.
        noise = tl.log(-_math.log1p(-uniform))
        score = logit / tl.maximum(temperature, 1.0) - noise * tl.minimum(temperature, 1.0)
    if threshold_ptr is not None:
        score = tl.where(logit < tl.load(threshold_ptr + row).to(ACC), float("-inf"), score)
    score = tl.where(v < V, score, float("-inf"))

    best, index = tl.max(score, 0, return_indices=True)
    chosen = tl.max(tl.where(v == block * BLOCK_V + index, logit, float("-inf")), 0)
    largest = tl.max(logit, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp(given - base), 0)
    parts = parts_ptr + row * 4 * BLOCKS
    tl.store(parts + block, best)
    tl.store(parts + BLOCKS + block, chosen)
    tl.store(parts + 2 * BLOCKS + block, largest)
    tl.store(parts + 3 * BLOCKS + block, total)
    part_tokens = part_tokens_ptr + row * BLOCKS
    tl.store(part_tokens + block, block * BLOCK_V + index)
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + row, 1, sem="acq_rel") == BLOCKS - 1:
        _join(parts, part_tokens, tokens_ptr + row, log_probs_ptr + row, BLOCKS, ROUNDED)
        tl.store(counters_ptr + row, 0)


@triton.jit
def _join(parts, part_tokens, token_ptr, log_prob_ptr, BLOCKS: tl.constexpr, ROUNDED: tl.constexpr):
    """The best of a row's parts, the first of equals, and its log-probability."""
    each = tl.arange(0, ROUNDED)
    there = each < BLOCKS
    none = float("-inf")
    score = tl.load(parts + each, mask=there, other=none, cache_modifier=".cg")
    chosen = tl.load(parts + BLOCKS + each, mask=there, other=none, cache_modifier=".cg")
    top = tl.load(parts + 2 * BLOCKS + each, mask=there, other=none, cache_modifier=".cg")
    total = tl.load(parts + 3 * BLOCKS + each, mask=there, other=0.0, cache_modifier=".cg")
    tokens = tl.load(part_tokens + each, mask=there, other=0, cache_modifier=".cg")
    _, winner = tl.max(score, 0, return_indices=True)
    is_winner = each == winner
    peak = tl.max(top, 0)
    base = tl.where(peak == none, 0.0, peak)
    lse = base + tl.log(tl.sum(total * tl.exp(top - base), 0))
    tl.store(log_prob_ptr, tl.max(tl.where(is_winner, chosen, none), 0) - lse)
    tl.store(token_ptr, tl.sum(tl.where(is_winner, tokens, 0), 0).to(tl.int64))


def _fake(
    logits: Tensor, seeds: Tensor, steps: Tensor, temperature: Tensor | None,
    threshold: Tensor | None, counters: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    batch = logits.shape[0]
    return (
        torch.empty(batch, dtype=torch.int64, device=logits.device),
        torch.empty(batch, dtype=dtype, device=logits.device),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


def _grads(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    return (None,) * 6


def _into_fake(
    tokens: Tensor, log_probs: Tensor, logits: Tensor, seeds: Tensor, steps: Tensor,
    temperature: Tensor | None, threshold: Tensor | None, counters: Tensor | None,
) -> None:  # fmt: skip
    return None


@_OP.function(fake=_into_fake, mutates=("tokens", "log_probs"))
def draw_tokens_into(
    tokens: Tensor, log_probs: Tensor, logits: Tensor, seeds: Tensor, steps: Tensor,
    temperature: Tensor | None, threshold: Tensor | None, counters: Tensor | None,
) -> None:  # fmt: skip
    """Launch: tokens [B] and their log-probabilities [B], contiguous."""
    batch, size = logits.shape
    logits = as_rows(logits, size)
    block = min(BLOCK_V, max(16, next_power_of_2(size)))
    blocks = cdiv(size, block)
    if counters is None:
        counters = torch.zeros(batch, dtype=torch.int32, device=logits.device)
    parts = log_probs.new_empty(batch * 4 * blocks)
    part_tokens = seeds.new_empty(batch * blocks, dtype=torch.int32)
    overlap = is_hopper(logits.device)
    options = {"launch_pdl": True} if overlap else {}  # unknown to Triton's interpreter
    _OP.launch(
        _sample_categorical_kernel, (blocks, batch),
        logits, seeds, steps, temperature, threshold, tokens, log_probs, parts, part_tokens,
        counters, logits.stride(0), size, BLOCKS=blocks, ROUNDED=next_power_of_2(blocks),
        ACC=accumulator(logits.dtype), OVERLAP=overlap, BLOCK_V=block, num_warps=8, **options,
    )  # fmt: skip


@_OP.function(fake=_fake, setup_context=_save, backward=_grads)
def draw_tokens(
    logits: Tensor, seeds: Tensor, steps: Tensor, temperature: Tensor | None,
    threshold: Tensor | None, counters: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `draw_tokens_into`, in new tensors."""
    tokens, log_probs = _fake(logits, seeds, steps, temperature, threshold, counters)
    draw_tokens_into(tokens, log_probs, logits, seeds, steps, temperature, threshold, counters)
    return tokens, log_probs


def sample_categorical(
    logits: Tensor,
    seeds: Tensor,
    steps: Tensor,
    *,
    temperature: Tensor | None = None,
    threshold: Tensor | None = None,
    counters: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One token a row from softmax(logits / temperature), and its log-probability.

    The same (logits of the row, seed, step) gives the same token in every batch, and, but for
    roundings of logarithms, on every device. Equal scores give the first of them.

    Args:
        logits: [B, V] in float16, bfloat16, float32 or float64; rows at any distance.
        seeds: [B] int64 on logits' device.
        steps: [B] int32 or int64, not negative, below 2³¹: counts the draws of a seed, such as the
            token's position.
        temperature: [B] float32, 0 for the likeliest token; None for 1.
        threshold: [B] float32; smaller logits are not drawn. At least one a row must be left.
        counters: [B] int32 zeros or more, zero again after the call. Without them the call clears
            some of its own, which is a launch. Calls that may run at the same time need counters
            of their own.
        out: the tokens and log-probabilities to write, contiguous, instead of new ones.

    Returns:
        Tokens [B] int64, and their log-probabilities [B] under softmax(logits), whatever the
        temperature and the threshold, float32 (float64 for float64). Without a gradient.

    Raises:
        ValueError: shapes that do not fit, tensors on different devices, an empty vocabulary.
        TypeError: logits that are not floating point, seeds or steps that are not integers.
    """
    _check(logits, seeds, steps, temperature, threshold, counters)
    if out is not None:
        _check_out(out, logits)
    unsupported = "V is 2³¹ or more" if logits.shape[1] >= 2**31 else None
    if not _OP.uses_triton(logits, unsupported):
        drawn = sample_categorical_reference(
            logits, seeds, steps, temperature=temperature, threshold=threshold
        )
        if out is None:
            return drawn
        for target, result in zip(out, drawn, strict=True):
            target.copy_(result)
        return out
    if out is not None:
        draw_tokens_into(*out, logits, seeds, steps, temperature, threshold, counters)
        return out
    return draw_tokens(logits, seeds, steps, temperature, threshold, counters)


def _check(
    logits: Tensor, seeds: Tensor, steps: Tensor, temperature: Tensor | None,
    threshold: Tensor | None, counters: Tensor | None,
) -> None:  # fmt: skip
    check_floating("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; give [B, V] with V of 1 or more")
    batch = logits.shape[0]
    if seeds.dtype != torch.int64:
        raise TypeError(f"seeds is {seeds.dtype}; give int64")
    if steps.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"steps is {steps.dtype}; give int32 or int64")
    given = {"seeds": seeds, "steps": steps, "temperature": temperature, "threshold": threshold}
    for name, x in given.items():
        if x is None:
            continue
        if x.shape != (batch,) or not x.is_contiguous():
            raise ValueError(f"{name} has shape {tuple(x.shape)}; give [{batch}], contiguous")
        if name in ("temperature", "threshold") and x.dtype != torch.float32:
            raise TypeError(f"{name} is {x.dtype}; give float32")
    if counters is not None and (counters.dtype != torch.int32 or counters.numel() < batch):
        raise ValueError(
            f"counters is {counters.dtype} of shape {tuple(counters.shape)}; give {batch} int32 "
            f"zeros or more"
        )
    check_same_device(logits=logits, counters=counters, **given)


def _check_out(out: tuple[Tensor, Tensor], logits: Tensor) -> None:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    for name, x, dtype in zip(("tokens", "log_probs"), out, (torch.int64, wide), strict=True):
        if x.shape != logits.shape[:1] or x.dtype != dtype or not x.is_contiguous():
            raise ValueError(
                f"out's {name} is {x.dtype} of shape {tuple(x.shape)}; give contiguous {dtype} of "
                f"[{len(logits)}]"
            )
        check_same_device(logits=logits, **{f"out's {name}": x})
