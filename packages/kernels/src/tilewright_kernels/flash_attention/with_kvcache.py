"""Attention of one new token a sequence that also normalizes, rotates and caches it: one launch.

What stands between a decoder's product for q, k and v and its output product is small work on small
tensors and one reading of the cache. As operators of their own, each waits for the one before.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv, is_hopper, next_power_of_2, num_programs
from tilewright_kernels._operator import (
    Operator,
    accumulator,
    check_floating,
    check_same_device,
)
from tilewright_kernels.apply_rotary_emb import apply_rotary_emb_reference
from tilewright_kernels.flash_attention.arguments import (
    check_heads,
    check_options,
    check_same_kind,
)
from tilewright_kernels.flash_attention.fallback import unsupported_heads, warn_of
from tilewright_kernels.flash_attention.kvcache_kernel import attention_with_kvcache_kernel
from tilewright_kernels.flash_attention.masks import as_mask
from tilewright_kernels.flash_attention.online_softmax import cap_of, score_factors
from tilewright_kernels.flash_attention.reference import decode_attention_reference
from tilewright_kernels.rms_norm import rms_norm_reference

_OP = Operator("flash_attn_with_kvcache")

PROGRAMS_PER_SM = 2
MAX_SPLITS = 32
PREFETCHED_KEYS = 128
"""Of each program, a power of two; more pushes out of L2 what launches before still read."""


class Tile(NamedTuple):
    """Keys that are read at a time, and how the program is built."""

    BLOCK_N: int
    num_stages: int
    num_warps: int


# Bytes of an element -> head dimension, at most -> tile.
TILES: dict[int, dict[int, Tile]] = {
    2: {128: Tile(64, 3, 4), 256: Tile(32, 3, 4)},
    4: {128: Tile(32, 3, 4), 256: Tile(16, 3, 4)},
    8: {256: Tile(16, 1, 4)},
}


def attention_with_kvcache_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    scale: float | None = None,
    softcap: float | None = None,
    window_size: tuple[int, int] | None = None,
) -> Tensor:
    """The definition in plain torch; arguments as `flash_attn_with_kvcache`, caches written too."""
    if q_norm_weight is not None:
        q = rms_norm_reference(q, q_norm_weight.shape, q_norm_weight, norm_eps)
    if k_norm_weight is not None:
        k = rms_norm_reference(k, k_norm_weight.shape, k_norm_weight, norm_eps)
    if cos is not None and sin is not None:
        q, k = apply_rotary_emb_reference(q, k, cos, sin, position_ids=cache_seqlens[:, None])
    # Written where there is room, in place, without an index that the host would have to see.
    place = torch.arange(k_cache.shape[1], device=q.device)
    new = (place == cache_seqlens[:, None])[..., None, None]
    k_cache.copy_(torch.where(new, k, k_cache))
    v_cache.copy_(torch.where(new, v, v_cache))
    return decode_attention_reference(
        q, k_cache, v_cache, cache_seqlens + 1, scale=scale, softcap=softcap,
        window_size=window_size,
    )  # fmt: skip


@cache
def tile_for(width: int, element_size: int, capacity: int) -> Tile:
    """The tile for a padded head dimension, made smaller where the cache is short."""
    by_width = TILES[element_size]
    tile = by_width[min(w for w in by_width if w >= width)]
    return tile._replace(BLOCK_N=min(tile.BLOCK_N, max(16, next_power_of_2(capacity))))


def _fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor,
    cos: Tensor | None, sin: Tensor | None, q_norm: Tensor | None, k_norm: Tensor | None,
    counters: Tensor | None, eps: float, scale: float, softcap: float, left: int, prefetch: bool,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape)


def _whole_words(cache: Tensor) -> bool:
    """Whether rows begin and end at multiples of 16 bytes."""
    distances = (cache.shape[-1], *cache.stride()[:-1])
    return cache.data_ptr() % 16 == 0 and all(n * cache.element_size() % 16 == 0 for n in distances)


@_OP.function(fake=_fake, mutates=("k_cache", "v_cache"))
def attention_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor,
    cos: Tensor | None, sin: Tensor | None, q_norm: Tensor | None, k_norm: Tensor | None,
    counters: Tensor | None, eps: float, scale: float, softcap: float, left: int, prefetch: bool,
) -> Tensor:  # fmt: skip
    """Launch: out [B, 1, H, D]; k_cache and v_cache get a row."""
    out = q.new_empty(q.shape)
    batch, _, heads, width = q.shape
    capacity, kv_heads = k_cache.shape[1:3]
    if out.numel() == 0:
        return out
    block_d = max(16, next_power_of_2(width))
    tile = tile_for(block_d, q.element_size(), capacity)
    group, groups = heads // kv_heads, batch * kv_heads
    programs = num_programs(q.device, per_sm=PROGRAMS_PER_SM)
    splits = max(1, min(cdiv(capacity, tile.BLOCK_N), programs // groups, MAX_SPLITS))
    parts = part_lse = None
    if splits > 1:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        parts = torch.empty((splits, batch * heads, width), dtype=dtype, device=q.device)
        part_lse = parts.new_empty((splits, batch * heads))
        if counters is None:
            counters = torch.zeros(groups, dtype=torch.int32, device=q.device)
    overlap = is_hopper(q.device)
    options = {"launch_pdl": True} if overlap else {}  # unknown to Triton's interpreter
    fetches = overlap and prefetch and _whole_words(k_cache) and _whole_words(v_cache)
    before, factor = score_factors(scale, softcap)
    tensors = q, k, v, k_cache, v_cache, cache_seqlens, cos, sin, q_norm, k_norm, out
    numbers = (
        capacity, 0 if cos is None else cos.shape[0], kv_heads, max(0, left),
        q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2),
        *k_cache.stride()[:3], *v_cache.stride()[:3],
        0 if cos is None else cos.stride(0), 0 if sin is None else sin.stride(0),
    )  # fmt: skip
    known: dict[str, Any] = {
        "EPS": eps, "FACTOR": factor, "HAS_WINDOW": left >= 0, "GROUP": group, "OVERLAP": overlap,
    }  # fmt: skip
    if overlap and splits == 1:
        from tilewright_kernels.flash_attention import kvcache_hopper

        if kvcache_hopper.takes(q, k_cache, v_cache, cos, softcap, scale):
            kvcache_hopper.launch_hopper(_OP, tensors, numbers, **known, PREFETCH=prefetch)
            return out
    _OP.launch(
        attention_with_kvcache_kernel, (splits * groups,),
        *tensors, parts, part_lse, counters if splits > 1 else None, *numbers,
        **known, BEFORE=before, CAP=cap_of(softcap, q), D=width,
        ROTARY=0 if cos is None else 2 * cos.shape[1], BLOCK_D=block_d,
        ACC=accumulator(q.dtype), SPLITS=splits, ROWS=max(16, next_power_of_2(group)),
        EARLY=overlap and splits == 1, PREFETCH=PREFETCHED_KEYS if fetches else 0,
        **tile._asdict(), **options,
    )  # fmt: skip
    return out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    scale: float | None = None,
    softcap: float | None = None,
    window_size: tuple[int, int] | None = None,
    counters: Tensor | None = None,
    prefetch_cache: bool = False,
) -> Tensor:
    """Causal attention of one new token a sequence, which is first turned and added to the cache.

    As flash-attention's function of this name, for one token, with the norm of q and k that Qwen3
    has. Launches depend on the cache's capacity and not on the lengths, so that one CUDA graph
    serves every step.

    Args:
        q: [B, 1, H, D] in float16, bfloat16, float32 or float64; strides free but for the last.
        k_cache: [B, S, K, D] of q's dtype; H is a multiple of K. The new key is written to row
            cache_seqlens[b], normalized and rotated.
        v_cache: [B, S, K, D], likewise.
        k: [B, 1, K, D] of q's dtype, the new keys as they leave their projection.
        v: [B, 1, K, D], likewise.
        cache_seqlens: [B] int32 on q's device: keys of each sequence, the new one not counted,
            below S. That is not checked, since the host does not read them; to a sequence that is
            full nothing is written, and what comes of it means nothing.
        cos: [P, R / 2] float32 tables of the rotation, R ≤ D dimensions in halves, whose row
            cache_seqlens[b] is the new token's; None for no rotation.
        sin: as cos.
        q_norm_weight: [D] of an RMSNorm of each head of q before the rotation, or None.
        k_norm_weight: likewise of k.
        norm_eps: of both.
        scale: as for `scaled_dot_product_attention`.
        softcap: likewise.
        window_size: likewise. Nothing comes after the newest token's place.
        counters: [B · K] int32 zeros or more on q's device, zero again after the call. Without them
            the call may clear some of its own, which is a launch. Calls that may run at the same
            time need counters of their own.
        prefetch_cache: neither the caches, cache_seqlens nor the tables are written by the launches
            before this one, back to the last that is neither this function nor `skinny_linear`,
            nor by that one: they may be read while those still run (Hopper; elsewhere nothing
            changes).

    Returns:
        [B, 1, H, D], contiguous, without a gradient.

    Raises:
        ValueError: shapes or devices that do not fit, an option outside its range.
        TypeError: dtypes that differ or are not floating point; lengths that are not int32.
        RuntimeError: an input wants a gradient.
    """
    tables = _check(q, k_cache, v_cache, k, v, cache_seqlens, cos, sin, counters)
    _check_norms(q, q_norm_weight, k_norm_weight)
    check_options(0.0, softcap, scale)
    left = as_mask(True, "bottom_right", window_size).window[0]
    unsupported = unsupported_heads(q, v_cache)
    apart = (k_cache.shape[2] - 1) * max(k_cache.stride(2), v_cache.stride(2))
    if apart >= 2**31:
        unsupported = f"heads of the cache lie {apart} elements apart, 2^31 or more"
    warn_of(_OP, q, unsupported)
    if not _OP.uses_triton(q, unsupported):
        return attention_with_kvcache_reference(
            q, k_cache, v_cache, k, v, cache_seqlens, cos=cos, sin=sin,
            q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, norm_eps=norm_eps,
            scale=scale, softcap=softcap, window_size=window_size,
        )  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    cos, sin = tables
    return attention_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens.contiguous(), cos, sin, q_norm_weight,
        k_norm_weight, counters, float(norm_eps), float(scale), float(softcap or 0.0), left,
        prefetch_cache,
    )  # fmt: skip


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor,
    cos: Tensor | None, sin: Tensor | None, counters: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Raise on what does not fit; the tables, with adjacent columns."""
    check_same_kind(q, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    given = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    if torch.is_grad_enabled() and any(t.requires_grad for t in given.values()):
        raise RuntimeError("flash_attn_with_kvcache has no gradient; call it under torch.no_grad()")
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in given.items())
    four = all(t.dim() == 4 for t in given.values())
    if not four or k_cache.shape != v_cache.shape or k.shape != v.shape:
        raise ValueError(
            f"shapes are {shapes}; give [B, 1, H, D], twice [B, S, K, D], [B, 1, K, D]"
        )
    if q.shape[1] != 1:
        raise ValueError(
            f"q has {q.shape[1]} tokens a sequence; this takes one: use flash_attn_decode for more"
        )
    batch, _, _, width = q.shape
    if k.shape != (batch, 1, k_cache.shape[2], width) or k_cache.shape[::3] != (batch, width):
        raise ValueError(
            f"shapes are {shapes}; give [B, 1, H, D], twice [B, S, K, D], [B, 1, K, D]"
        )
    check_heads(q.shape[2], k.shape[2], v.shape[2], enable_gqa=True)
    for name, cached in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cached.stride(-1) != 1:
            raise ValueError(f"{name} is written in place; its last dimension must have stride 1")
    for name, ints in (("cache_seqlens", cache_seqlens), ("counters", counters)):
        if ints is not None and ints.dtype != torch.int32:
            raise TypeError(f"{name} is {ints.dtype}; give int32, as in {name}.int()")
    if cache_seqlens.shape != (batch,):
        raise ValueError(f"cache_seqlens has shape {tuple(cache_seqlens.shape)}; give [{batch}]")
    groups = batch * k_cache.shape[2]
    if counters is not None and (counters.numel() < groups or not counters.is_contiguous()):
        raise ValueError(
            f"counters has shape {tuple(counters.shape)}; give {groups} contiguous zeros or more"
        )
    check_same_device(q=q, cache_seqlens=cache_seqlens, cos=cos, sin=sin, counters=counters)
    return _check_tables(cos, sin, width)


def _check_tables(
    cos: Tensor | None, sin: Tensor | None, width: int
) -> tuple[Tensor | None, Tensor | None]:
    if (cos is None) != (sin is None):
        raise ValueError("one of cos and sin is missing; give both, or neither for no rotation")
    if cos is None or sin is None:
        return None, None
    if cos.shape != sin.shape or cos.dim() != 2 or not 0 < 2 * cos.shape[1] <= width:
        raise ValueError(
            f"cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}; give [P, R / 2] with "
            f"R up to {width}"
        )
    check_floating("cos", cos)
    return cos if cos.stride(1) == 1 else cos.contiguous(), (
        sin if sin.stride(1) == 1 else sin.contiguous()
    )


def _check_norms(q: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> None:
    for name, weight in (("q_norm_weight", q_norm), ("k_norm_weight", k_norm)):
        if weight is None:
            continue
        check_floating(name, weight)
        if weight.shape != q.shape[-1:] or not weight.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}; give [{q.shape[-1]}], contiguous"
            )
    check_same_device(q=q, q_norm_weight=q_norm, k_norm_weight=k_norm)
