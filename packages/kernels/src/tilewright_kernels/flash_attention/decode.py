"""Decoding: a few new queries a sequence against its cached keys and values (FlashDecoding).

    out = Σ_s 2^(lse_s - lse) · out_s      lse = log2 Σ_s 2^lse_s      over splits s of the keys

All keys and values are read once and all else is small, so what counts is that every
multiprocessor reads. One sequence has too few heads for that: its keys are split among programs,
each of which leaves its softmax and log-sum-exp, and a second launch joins them. The query heads
that share a key head, of all new tokens, are the rows of one tile: the cache is read once for all
of them.

The launches depend on the cache's capacity alone, and the lengths are read on the device, so that
one CUDA graph serves every step.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv, next_power_of_2, num_programs
from tilewright_kernels._operator import Operator, accumulator
from tilewright_kernels._triton import tl, triton
from tilewright_kernels.flash_attention.masks import visible
from tilewright_kernels.flash_attention.online_softmax import (
    cap_of,
    finish_rows,
    score_factors,
    scores,
    take_piece,
)
from tilewright_kernels.flash_attention.operands import strides
from tilewright_kernels.flash_attention.sequence_rows import load_rows
from tilewright_kernels.flash_attention.tiles import narrowest, padded


class Tile(NamedTuple):
    """Keys that are read at a time, and how the program is built."""

    BLOCK_N: int
    num_stages: int
    num_warps: int


# Bytes of an element -> head dimension (the padded one, of k or v, at most) -> tile. Share of the
# copy speed on an H200, bfloat16, D = 128, 131072 keys as one sequence / as 32: 0.99 / 1.02; with
# (64, 4, 4) 0.98 / 1.01, (32, 4, 4) and four programs 0.94 / 0.96.
TILES: dict[int, dict[int, Tile]] = {
    2: {64: Tile(128, 3, 4), 128: Tile(64, 3, 4), 256: Tile(32, 3, 4)},
    4: {64: Tile(64, 3, 4), 128: Tile(32, 3, 4), 256: Tile(16, 3, 4)},
    8: {256: Tile(16, 1, 4)},
}

PROGRAMS_PER_SM = 2
"""Programs that read at one time.

With three and six: 0.96 and 0.90 of the copy speed at one sequence, 1.02 and 0.93 at 32 equal ones.
At 32 sequences of 1 … 8191 keys, where each is read by few programs and the longest finish last,
two and three reach 0.80, six 0.90.
"""

MAX_ROWS = 64
"""Rows of a tile, query heads by new tokens; more of them are several tiles, which read again."""

MAX_SPLITS = 256


@triton.jit
def attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr, lse_ptr,
    # float64, so that they are exact there.
    # pyrefly: ignore[not-a-type]
    before: tl.float64, factor: tl.float64,
    tokens, kv_heads, splits, window,
    q_batch_stride, q_row_stride, q_head_stride, k_batch_stride, k_row_stride, k_head_stride,
    v_batch_stride, v_row_stride, v_head_stride,
    out_batch_stride, out_row_stride, out_head_stride, out_split_stride,
    lse_batch_stride, lse_head_stride, lse_split_stride,
    HAS_BEFORE: tl.constexpr, CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Softmax over one split of a sequence's keys; grid (splits · key heads · batch, row tiles).

    A split without keys leaves a log-sum-exp of -inf alone.
    """
    split = tl.program_id(0) % splits
    kv_head = tl.program_id(0) // splits % kv_heads
    batch = tl.program_id(0) // splits // kv_heads
    length = tl.load(lengths_ptr + batch)
    begin = length * 0
    if HAS_WINDOW:
        begin = tl.maximum(length - tokens - window, 0)
    stretch = tl.cdiv(tl.cdiv(length - begin, BLOCK_N), splits) * BLOCK_N
    begin += split * stretch
    end = tl.minimum(begin + stretch, length)

    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    there = token < tokens
    cols = tl.arange(0, BLOCK_D)[None, :]
    q_rows = batch.to(tl.int64) * q_batch_stride + token * q_row_stride + head * q_head_stride
    q = tl.load(
        q_ptr + q_rows[:, None] + cols, mask=there[:, None] & (cols < D), other=0.0
    )  # fmt: skip

    before = tl.full((), before, ACC) if HAS_BEFORE else None
    factor = tl.full((), factor, ACC)
    m = tl.full((ROWS,), float("-inf"), dtype=ACC)
    l = tl.zeros((ROWS,), dtype=ACC)
    acc = tl.zeros((ROWS, BLOCK_DV), dtype=ACC)
    k_strides = k_batch_stride, k_row_stride, k_head_stride
    v_strides = v_batch_stride, v_row_stride, v_head_stride
    for j in tl.range(begin, end, BLOCK_N):
        k = load_rows(
            k_ptr, batch, kv_head, 0, j, length, k_strides, D, BLOCK_N, BLOCK_D, False, False
        )
        s = scores(tl.dot(q, k.T, input_precision="ieee", out_dtype=ACC), before, CAP)
        key = (j + tl.arange(0, BLOCK_N))[None, :]
        seen = visible(token[:, None], key, length, length - tokens, window, 0, HAS_WINDOW, True)
        s = tl.where(seen, s, float("-inf"))
        p, m, l, alpha = take_piece(s, m, l, factor, True)
        v = load_rows(
            v_ptr, batch, kv_head, 0, j, length, v_strides, D_V, BLOCK_N, BLOCK_DV, False, False
        )
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee", out_dtype=ACC)

    acc, lse = finish_rows(m, l, acc)
    split, batch = split.to(tl.int64), batch.to(tl.int64)
    lse_ptr += split * lse_split_stride + batch * lse_batch_stride
    tl.store(lse_ptr + head * lse_head_stride + token, lse, mask=there)
    out_ptr += split * out_split_stride + batch * out_batch_stride
    out_rows = token * out_row_stride + head * out_head_stride
    cols = tl.arange(0, BLOCK_DV)[None, :]
    wanted = there & ((l > 0.0) | (splits == 1))
    tl.store(
        out_ptr + out_rows[:, None] + cols, acc.to(out_ptr.dtype.element_ty),
        mask=wanted[:, None] & (cols < D_V),
    )  # fmt: skip


@triton.jit
def attention_decode_join_kernel(
    parts_ptr, part_lse_ptr, out_ptr, lse_ptr, splits, tokens, heads, rows,
    out_batch_stride, out_row_stride, out_head_stride, lse_batch_stride, lse_head_stride,
    D_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_SPLITS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out and lse of one query from its splits; grid (batch · heads · tokens).

    Parts are [splits, batch, heads, tokens, D_V], the parts' log-sum-exp the same without D_V.
    """
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK_DV)
    m = tl.full((), float("-inf"), dtype=ACC)
    l = tl.zeros((), dtype=ACC)
    acc = tl.zeros((BLOCK_DV,), dtype=ACC)
    for first in tl.range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        at = split.to(tl.int64) * rows + row
        lse = tl.load(part_lse_ptr + at, mask=split < splits, other=float("-inf"))
        there = lse != float("-inf")
        m_new = tl.maximum(m, tl.max(lse, 0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp(lse - base)
        alpha = tl.exp(m - base)
        parts = tl.load(
            parts_ptr + at[:, None] * D_V + cols[None, :],
            mask=there[:, None] & (cols < D_V)[None, :], other=0.0,
        )  # fmt: skip
        acc = acc * alpha + tl.sum(parts * weight[:, None], 0)
        l = l * alpha + tl.sum(weight, 0)
        m = m_new
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    token, head, batch = row % tokens, row // tokens % heads, (row // tokens // heads).to(tl.int64)
    out_ptr += batch * out_batch_stride + token * out_row_stride + head * out_head_stride
    tl.store(out_ptr + cols, (acc / l).to(out_ptr.dtype.element_ty), mask=cols < D_V)
    lse_ptr += batch * lse_batch_stride + head * lse_head_stride
    tl.store(lse_ptr + token, tl.where(empty, float("-inf"), m + tl.log(l)))


@cache
def tile_for(width: int, element_size: int, capacity: int) -> Tile:
    """The tile for a padded head dimension, made smaller where the cache is short."""
    tile = narrowest(TILES[element_size], width)
    return tile._replace(BLOCK_N=min(tile.BLOCK_N, padded(capacity)))


def splits_for(groups: int, blocks: int, programs: int) -> int:
    """How many programs share a sequence's keys.

    Args:
        groups: key heads of all sequences, times row tiles: what there is without splitting.
        blocks: that the cache has room for.
        programs: that run at one time.
    """
    return max(1, min(blocks, programs // groups, MAX_SPLITS))


def launch_decode(
    operator: Operator, q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor,
    out: Tensor, lse: Tensor, *, scale: float, softcap: float, window: int,
) -> None:  # fmt: skip
    """Write out and lse.

    Args:
        operator: whose launches they are.
        q: [B, T_new, H, D]; like all others with adjacent columns. Query t of a sequence stands at
            key length - T_new + t, and sees it and those before it.
        k_cache: [B, S, K, D]; H is a multiple of K.
        v_cache: [B, S, K, D_v].
        lengths: [B] int32 on q's device, at most S: keys that there are, the new ones included.
        out: [B, T_new, H, D_v].
        lse: [B, H, T_new], float32 (float64 for float64), in base e.
        scale: of q·k.
        softcap: c of c · tanh(s / c), 0 for none.
        window: keys seen before a query's own place, -1 for all.
    """
    if out.numel() == 0:
        return
    batch, tokens, heads, width = q.shape
    capacity, kv_heads, width_v = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    group = heads // max(1, kv_heads)
    blocks = [padded(n) for n in (width, width_v)]
    tile = tile_for(max(blocks), q.element_size(), max(1, capacity))
    rows = min(MAX_ROWS, padded(tokens * group))
    row_tiles = cdiv(tokens * group, rows)
    programs = num_programs(q.device, per_sm=PROGRAMS_PER_SM)
    splits = splits_for(
        batch * kv_heads * row_tiles, cdiv(max(1, capacity), tile.BLOCK_N), programs
    )  # fmt: skip
    parts, part_lse, split_strides = out, lse, (0, 0)
    if splits > 1:
        parts = torch.empty(
            (splits, batch, heads, tokens, width_v), dtype=lse.dtype, device=q.device
        )
        part_lse = parts.new_empty((splits, batch, heads, tokens))
        split_strides = parts.stride(0), part_lse.stride(0)
    one_parts = parts[0].transpose(1, 2) if splits > 1 else out
    one_lse = part_lse[0] if splits > 1 else lse
    before, factor = score_factors(scale, softcap)
    operator.launch(
        attention_decode_kernel, (splits * kv_heads * batch, row_tiles),
        q, k_cache, v_cache, lengths, parts, part_lse, 1.0 if before is None else before, factor,
        tokens, kv_heads, splits, max(0, window),
        *strides(q, k_cache, v_cache, one_parts), split_strides[0],
        *one_lse.stride()[:2], split_strides[1],
        HAS_BEFORE=before is not None, CAP=cap_of(softcap, q), HAS_WINDOW=window >= 0, GROUP=group,
        D=width, D_V=width_v, BLOCK_D=blocks[0], BLOCK_DV=blocks[1],
        ACC=accumulator(q.dtype), ROWS=rows, **tile._asdict(),
    )  # fmt: skip
    if splits > 1:
        operator.launch(
            attention_decode_join_kernel, (batch * heads * tokens,),
            parts, part_lse, out, lse, splits, tokens, heads, batch * heads * tokens,
            *strides(out), *lse.stride()[:2],
            D_V=width_v, BLOCK_DV=blocks[1], BLOCK_SPLITS=min(16, next_power_of_2(splits)),
            ACC=accumulator(q.dtype), num_warps=4,
        )  # fmt: skip
