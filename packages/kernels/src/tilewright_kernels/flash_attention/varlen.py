"""Attention of packed sequences, and of the newest tokens of sequences in a cache.

Both are bottom-right: the last query of a sequence stands at its last key. Lengths are read on the
device alone, so that nothing waits and a CUDA graph can be replayed with others.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from tilewright_kernels._linear_losses import autocast
from tilewright_kernels._operator import Operator, check_same_device
from tilewright_kernels.flash_attention.arguments import (
    check_heads,
    check_options,
    check_same_kind,
)
from tilewright_kernels.flash_attention.decode import launch_decode
from tilewright_kernels.flash_attention.fallback import (
    masked_attention,
    unsupported_heads,
    warn_of,
)
from tilewright_kernels.flash_attention.masks import as_mask
from tilewright_kernels.flash_attention.reference import (
    cache_visible,
    decode_attention_reference,
    packed_visible,
    varlen_attention_reference,
)
from tilewright_kernels.flash_attention.registration import dense, draw_seed, register, scalars

_VARLEN, _DECODE = Operator("flash_attn_varlen_func"), Operator("flash_attn_decode")

_attention = register(_VARLEN, "varlen_attention")


@overload
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, *, dropout_p: float = 0.0, scale: float | None = None,
    is_causal: bool = False, window_size: tuple[int, int] | None = None,
    softcap: float | None = None, return_lse: Literal[False] = False,
    deterministic: bool | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, *, dropout_p: float = 0.0, scale: float | None = None,
    is_causal: bool = False, window_size: tuple[int, int] | None = None,
    softcap: float | None = None, return_lse: Literal[True],
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    is_causal: bool = False,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each of several sequences that lie one after another.

    As flash-attention's function of this name, with the options of `scaled_dot_product_attention`.
    Heads of q share those of k and v wherever their numbers say so.

    Args:
        q: [N, H, D] in float16, bfloat16, float32 or float64: the queries of all sequences.
        k: [M, K, D] of q's dtype; H is a multiple of K.
        v: [M, K, D_v] of q's dtype.
        cu_seqlens_q: [S + 1] int32 on q's device, ascending from 0: sequence s has the queries
            cu_seqlens_q[s] to cu_seqlens_q[s + 1], possibly none.
        cu_seqlens_k: [S + 1] int32, likewise of the keys.
        max_seqlen_q: no sequence has more queries; the grid is made for so many.
        max_seqlen_k: no sequence has more keys.
        dropout_p: as for `scaled_dot_product_attention`.
        scale: likewise.
        is_causal: likewise, with bottom-right alignment: where a sequence has more keys than
            queries, as after a cached prefix, its last query sees all.
        window_size: likewise.
        softcap: likewise.
        return_lse: likewise.
        deterministic: likewise.

    Returns:
        [N, H, D_v], 0 from cu_seqlens_q[-1] on; with return_lse a pair of it and lse [H, N].
        Differentiable once.

    Raises:
        ValueError: shapes or devices that do not fit, an option outside its range.
        TypeError: dtypes that differ or are not floating point; cu_seqlens that are not int32.
    """
    q, k, v = autocast(q, k, v)
    mask = as_mask(is_causal, "bottom_right", window_size)
    _check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check_options(dropout_p, softcap, scale)
    unsupported = unsupported_heads(q, v)
    warn_of(_VARLEN, q, unsupported)
    if not _VARLEN.uses_triton(q, unsupported):
        if softcap is None and not return_lse:
            visible, _ = packed_visible(
                cu_seqlens_q, cu_seqlens_k, len(q), len(k), is_causal, window_size
            )
            q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
            gqa = q.shape[1] != k.shape[1]
            out = masked_attention(
                q, k, v, visible, dropout_p=dropout_p, scale=scale, enable_gqa=gqa
            )
            return out[0].transpose(0, 1)
        return varlen_attention_reference(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=dropout_p,
            scale=scale, is_causal=is_causal, window_size=window_size, softcap=softcap,
            return_lse=return_lse,
        )  # fmt: skip
    out, lse = _attention(
        q, k, v, draw_seed(dropout_p, q), cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q, max_seqlen_k,
        *scalars(mask, scale, softcap, dropout_p, deterministic, q.shape[-1]),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _decode_fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor,
    scale: float, softcap: float, left: int,
) -> Tensor:  # fmt: skip
    return q.new_empty((*q.shape[:-1], v_cache.shape[-1]))


def _decode_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Nothing is kept."""


def _decode_grads(ctx: Any, dout: Tensor) -> tuple[None, ...]:
    raise RuntimeError(
        "flash_attn_decode has no gradient; call flash_attn_varlen_func, or this one under "
        "torch.no_grad()"
    )


@_DECODE.function(fake=_decode_fake, setup_context=_decode_save, backward=_decode_grads)
def decode_attention_forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor,
    scale: float, softcap: float, left: int,
) -> Tensor:  # fmt: skip
    """Launch attention of the newest tokens: out [B, T_new, H, D_v]."""
    out = _decode_fake(q, k_cache, v_cache, lengths, scale, softcap, left)
    if out.numel() == 0 or k_cache.numel() == 0:
        return out.zero_()
    q, k_cache, v_cache = dense(q, k_cache, v_cache)
    batch, queries, heads, _ = q.shape
    lse = q.new_empty((batch, heads, queries), dtype=torch.promote_types(q.dtype, torch.float32))
    launch_decode(
        _DECODE,
        q,
        k_cache,
        v_cache,
        lengths.contiguous(),
        out,
        lse,
        scale=scale,
        softcap=softcap,
        window=left,
    )
    return out


def flash_attn_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window_size: tuple[int, int] | None = None,
) -> Tensor:
    """Causal attention of the newest tokens of sequences against their cached keys and values.

    One launch over all of the cache whatever the lengths are, so that one CUDA graph serves every
    step: the keys are split among programs, whose partial results a second launch joins.

    Args:
        q: [B, T_new, H, D] in float16, bfloat16 or float32, T_new small.
        k_cache: [B, S, K, D] of q's dtype; H is a multiple of K. The new keys are in it. What lies
            beyond the lengths is not read (backend torch reads it, and needs finite numbers there).
        v_cache: [B, S, K, D_v] of q's dtype.
        lengths: [B] int32 on q's device: keys of each sequence, the new ones included, at most S,
            which is not checked: the host does not read them. Its last query sees all of them, the
            one before it one less.
        scale: as for `scaled_dot_product_attention`.
        softcap: likewise.
        window_size: likewise. Nothing comes after the newest token's place, whatever the right is.

    Returns:
        [B, T_new, H, D_v], without a gradient.

    Raises:
        ValueError: shapes or devices that do not fit, an option outside its range.
        TypeError: dtypes that differ or are not floating point; lengths that are not int32.
    """
    mask = as_mask(True, "bottom_right", window_size)
    _check_cache(q, k_cache, v_cache, lengths)
    check_options(0.0, softcap, scale)
    unsupported = unsupported_heads(q, v_cache)
    warn_of(_DECODE, q, unsupported)
    if _DECODE.uses_triton(q, unsupported):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return decode_attention_forward(
            q, k_cache, v_cache, lengths, float(scale), float(softcap or 0.0), mask.window[0]
        )
    if softcap is not None:
        return decode_attention_reference(
            q, k_cache, v_cache, lengths, scale=scale, softcap=softcap, window_size=window_size
        )
    visible = cache_visible(lengths, q.shape[1], k_cache.shape[1], window_size)
    q, k, v = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
    out = masked_attention(q, k, v, visible, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _check_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int,
) -> None:  # fmt: skip
    check_same_kind(q, k=k, v=v)
    shapes = f"q has shape {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 3 or k.shape[:2] != v.shape[:2]:
        raise ValueError(f"{shapes}; they must be [N, H, D], [M, K, D] and [M, K, D_v]")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{shapes}; the last dimensions of q and k must be equal")
    check_heads(q.shape[1], k.shape[1], v.shape[1], enable_gqa=True)
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu_seqlens.dtype != torch.int32:
            raise TypeError(f"{name} is {cu_seqlens.dtype}; give int32, as in {name}.int()")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape != cu_seqlens_q.shape or not len(cu_seqlens):
            raise ValueError(
                f"{name} has shape {tuple(cu_seqlens.shape)}; both must be [S + 1], 0 first"
            )
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest < 0:
            raise ValueError(f"{name} is {longest}; it is a number of tokens")
    check_same_device(q=q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)


def _check_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> None:
    check_same_kind(q, k_cache=k_cache, v_cache=v_cache)
    shapes = (
        f"q has shape {tuple(q.shape)}, k_cache {tuple(k_cache.shape)} and v_cache "
        f"{tuple(v_cache.shape)}"
    )
    four = q.dim() == k_cache.dim() == v_cache.dim() == 4
    if not four or k_cache.shape[:3] != v_cache.shape[:3] or len(q) != len(k_cache):
        raise ValueError(f"{shapes}; they must be [B, T, H, D], [B, S, K, D] and [B, S, K, D_v]")
    if q.shape[-1] != k_cache.shape[-1]:
        raise ValueError(f"{shapes}; the last dimensions of q and k_cache must be equal")
    check_heads(q.shape[2], k_cache.shape[2], v_cache.shape[2], enable_gqa=True)
    if lengths.dtype != torch.int32:
        raise TypeError(f"lengths is {lengths.dtype}; give int32, as in lengths.int()")
    if lengths.shape != q.shape[:1]:
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}; it must be [{len(q)}]")
    check_same_device(q=q, lengths=lengths)
