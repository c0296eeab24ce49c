"""Top-k, top-p and min-p as one number a row, the smallest logit that may be drawn, without a sort.

    t_k = the k-th largest logit                         (Fan et al. 2018, arXiv:1805.04833)
    t_p = min {v ≥ t_k : Σ_{x > v} p(x) < top_p}         (Holtzman et al. 2019, arXiv:1904.09751)
    t_m = min {v : p(v) ≥ min_p · max p}                 (Nguyen et al. 2024, arXiv:2407.01082)

and the threshold is the largest of them; p = softmax(logits / temperature), renormalized over what
top-k leaves. Counts and sums of what lies above v fall as v grows, so t_k and t_p are found by
bisection over the bits of v: as many passes as a logit has bits, over a row that stays in the first
cache, instead of a sort and a dozen launches. Each of 16 or 32 bits, read as an integer whose
negative half is turned around, orders as the number does.
"""

from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._launch import next_power_of_2
from tilewright_kernels._operator import Operator, as_rows, check_floating, check_same_device
from tilewright_kernels._triton import tl, triton

_OP = Operator("truncation_threshold")

BLOCK_V = 16384
"""Logits of a row that a program takes at a time."""

FEW = 1024
"""Candidates that torch selects sooner than they are bisected for, whatever the vocabulary.

H200, 32 rows: 64 of 32768 bfloat16 logits in 102 µs against 126, of 151936 in 148 against 703. But
without a bound it sorts: 324 against 83 for top-p, 324 against 8 for min-p alone, 1000 against 422
and 34 at 151936.
"""


def truncation_threshold_reference(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    candidates: int | None = None,
) -> Tensor:
    """The definition by a sort, in plain torch; arguments as `truncation_threshold`."""
    size = logits.shape[1]
    sorted_BV = logits.float().topk(min(size, candidates or size), dim=-1).values
    warm = torch.where(temperature > 0, temperature, 1.0)[:, None]
    rank = torch.arange(sorted_BV.shape[1], device=sorted_BV.device)
    kept_BV = rank < top_k[:, None]
    # Less the largest first: a low temperature would otherwise make several of them infinite.
    p_BV = ((sorted_BV - sorted_BV[:, :1]) / warm).masked_fill(~kept_BV, -torch.inf).softmax(-1)
    # A token stays if those before it do not reach top_p.
    kept_BV &= p_BV.cumsum(-1) - p_BV < top_p[:, None]
    kept_BV &= p_BV >= min_p[:, None] * p_BV[:, :1]
    last_B1 = kept_BV.sum(-1, keepdim=True).clamp(min=1) - 1
    return sorted_BV.gather(1, last_B1)[:, 0]


@triton.jit
def _turn(bits, BITS: tl.constexpr):
    """The bits of a number as an integer of its order, and back: the same exchange."""
    return bits ^ ((bits >> 31) & (0x7FFF if BITS == 16 else 0x7FFFFFFF))


@triton.jit
def _load(row_ptr, block, V, BITS: tl.constexpr, BLOCK_V: tl.constexpr):
    """Logits of a block, -inf past the end, and their integers in order."""
    v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    given = tl.load(row_ptr + v, mask=v < V, other=float("-inf"))
    if BITS == 16:
        bits = given.to(tl.int16, bitcast=True).to(tl.int32)
    else:
        bits = given.to(tl.int32, bitcast=True)
    return given.to(tl.float32), _turn(bits, BITS), v < V


@triton.jit
def _count_from(row_ptr, least, V, BITS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_V: tl.constexpr):
    """How many logits are `least` or more."""
    count = 0
    for block in tl.range(BLOCKS):
        _, order, there = _load(row_ptr, block, V, BITS, BLOCK_V)
        count += tl.sum((there & (order >= least)).to(tl.int32), 0)
    return count


@triton.jit
def _sum_above(
    row_ptr, least, peak, warm, V, BITS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Σ exp((x - peak) / warm) of the logits above `least`."""
    total = 0.0
    for block in tl.range(BLOCKS):
        x, order, there = _load(row_ptr, block, V, BITS, BLOCK_V)
        total += tl.sum(tl.where(there & (order > least), tl.exp((x - peak) / warm), 0.0), 0)
    return total


@triton.jit
def _truncation_threshold_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, out_ptr, row_stride, V,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The threshold of a row; grid (B)."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    temperature = tl.load(temperature_ptr + row)
    warm = tl.where(temperature > 0.0, temperature, 1.0)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    floor = tl.load(min_p_ptr + row)

    lowest = tl.full((), 2**31 - 1, dtype=tl.int32)
    highest = tl.full((), -(2**31), dtype=tl.int32)
    peak = float("-inf")
    for block in tl.range(BLOCKS):
        x, order, there = _load(row_ptr, block, V, BITS, BLOCK_V)
        lowest = tl.minimum(lowest, tl.min(tl.where(there, order, 2**31 - 1), 0))
        highest = tl.maximum(highest, tl.max(tl.where(there, order, -(2**31)), 0))
        peak = tl.maximum(peak, tl.max(x, 0))

    # The largest integer that k logits reach: some logit's own.
    least, most = lowest.to(tl.int64), highest.to(tl.int64)
    if top_k < V:
        for _ in tl.range(BITS):
            middle = least + (most - least + 1) // 2
            reached = _count_from(row_ptr, middle, V, BITS, BLOCKS, BLOCK_V) >= top_k
            least = tl.where(reached, middle, least)
            most = tl.where(reached, most, middle - 1)
    if top_p < 1.0:
        # Of logits that equal the k-th, as many as make k.
        above = _count_from(row_ptr, least + 1, V, BITS, BLOCKS, BLOCK_V)
        total = _sum_above(row_ptr, least, peak, warm, V, BITS, BLOCKS, BLOCK_V)
        edge = _value(least, row_ptr, BITS)
        equal = _count_from(row_ptr, least, V, BITS, BLOCKS, BLOCK_V) - above
        total += tl.minimum(equal, top_k - above).to(tl.float32) * tl.exp((edge - peak) / warm)
        most = highest.to(tl.int64)
        for _ in tl.range(BITS):
            middle = least + (most - least) // 2
            rest = _sum_above(row_ptr, middle, peak, warm, V, BITS, BLOCKS, BLOCK_V)
            enough = rest < top_p * total
            most = tl.where(enough, middle, most)
            least = tl.where(enough, least, tl.minimum(middle + 1, most))
    threshold = _value(least, row_ptr, BITS)
    if floor > 0.0:
        kept = peak
        for block in tl.range(BLOCKS):
            x, _, there = _load(row_ptr, block, V, BITS, BLOCK_V)
            likely = there & (tl.exp((x - peak) / warm) >= floor)
            kept = tl.minimum(kept, tl.min(tl.where(likely, x, peak), 0))
        threshold = tl.maximum(threshold, kept)
    tl.store(out_ptr + row, threshold)


@triton.jit
def _value(order, row_ptr, BITS: tl.constexpr):
    """The number of such a place in the order, as float32."""
    bits = _turn(order.to(tl.int32), BITS)
    if BITS == 16:
        value = bits.to(tl.int16).to(row_ptr.dtype.element_ty, bitcast=True)
    else:
        value = bits.to(tl.float32, bitcast=True)
    return value.to(tl.float32)


def _fake(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _grads(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    return (None,) * 5


@_OP.function(fake=_fake, setup_context=_save, backward=_grads)
def find_thresholds(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """Launch: thresholds [B]."""
    size = logits.shape[1]
    logits = as_rows(logits, size)
    out = _fake(logits, temperature, top_k, top_p, min_p)
    block = min(BLOCK_V, max(16, next_power_of_2(size)))
    _OP.launch(
        _truncation_threshold_kernel, (len(logits),),
        logits, temperature, top_k, top_p, min_p, out, logits.stride(0), size,
        BITS=8 * logits.element_size(), BLOCKS=-(-size // block), BLOCK_V=block,
        num_warps=max(1, min(32, block // 512)),
    )  # fmt: skip
    return out


def truncation_threshold(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    candidates: int | None = None,
) -> Tensor:
    """The smallest logit of each row that top-k, top-p and min-p leave, for `sample_categorical`.

    Top-k first; top-p on what it leaves, renormalized; min-p beside. The likeliest is always left.
    Logits that equal the threshold are all left. Backend auto bisects on a GPU, but has torch
    select where `candidates` are few.

    Args:
        logits: [B, V] in float16, bfloat16 or float32; rows at any distance. Not a number anywhere
            in a row: its threshold means nothing.
        temperature: [B] float32; 0 counts as 1.
        top_k: [B] int64, 1 to V.
        top_p: [B] float32 above 0; 1 or more for all.
        min_p: [B] float32, 0 to 1.
        candidates: no row's top_k is larger, and torch need not look at more of its logits; None
            for V.

    Returns:
        [B] float32, without a gradient.

    Raises:
        ValueError: shapes that do not fit, tensors on different devices, an empty vocabulary.
        TypeError: dtypes other than these.
    """
    _check(logits, temperature, top_k, top_p, min_p)
    unsupported = "V is 2³¹ or more" if logits.shape[1] >= 2**31 else None
    better = None
    if candidates is not None and candidates <= FEW:
        better = f"{candidates} candidates are selected sooner than bisected for"
    if not _OP.uses_triton(logits, unsupported, better):
        return truncation_threshold_reference(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            candidates=candidates,
        )  # fmt: skip
    return find_thresholds(logits, temperature, top_k, top_p, min_p)


def _check(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> None:
    check_floating("logits", logits)
    if logits.dtype == torch.float64:
        raise TypeError("logits is torch.float64; give logits.float()")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; give [B, V] with V of 1 or more")
    batch = logits.shape[0]
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for name, x in given.items():
        wanted = torch.int64 if name == "top_k" else torch.float32
        if x.dtype != wanted:
            raise TypeError(f"{name} is {x.dtype}; give {wanted}")
        if x.shape != (batch,) or not x.is_contiguous():
            raise ValueError(f"{name} has shape {tuple(x.shape)}; give [{batch}], contiguous")
    check_same_device(logits=logits, **given)
