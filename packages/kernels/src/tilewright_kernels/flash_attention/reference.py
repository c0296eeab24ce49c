"""Attention with its scores written out: the specification of every option.

    s = c · tanh(scale · q·kᵀ / c)        p = softmax(s where visible)        out = dropout(p) · v

Three forms of one function: rectangular batches, packed sequences, and a few queries against a
cache. They differ in who sees whom and meet in `_attend`. All hold [T_q, T_k] numbers a head.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from tilewright_kernels.dropout import kept_words
from tilewright_kernels.flash_attention.masks import Alignment, Mask, as_mask, keep_reference


@overload
def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False, *, causal_alignment: Alignment = "top_left",
    window_size: tuple[int, int] | None = None, softcap: float | None = None,
    return_lse: Literal[False] = False, seed: Tensor | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False, *, causal_alignment: Alignment = "top_left",
    window_size: tuple[int, int] | None = None, softcap: float | None = None,
    return_lse: Literal[True], seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: Alignment = "top_left",
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition in plain torch; arguments as `scaled_dot_product_attention`.

    seed, a 0-d int64 tensor, is that of dropout's mask: the kernel's, bit for bit. None draws the
    mask from torch's generator.
    """
    mask = as_mask(is_causal, causal_alignment, window_size)
    return attend(
        query, key, value, mask, attn_mask, dropout_p, scale, softcap, seed, return_lse=return_lse
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    seed: Tensor | None = None,
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention_reference` of a mask as kernels know it."""
    len_q, len_k = query.shape[-2], key.shape[-2]
    visible = mask.visible(len_q, len_k, query.device)
    bias = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        bias = attn_mask
    keep = None
    if dropout_p > 0 and seed is not None:
        batch = torch.arange(query.shape[:-2].numel(), device=query.device)
        row, col = (torch.arange(n, device=query.device) for n in (len_q, len_k))
        head = batch.view(*query.shape[:-2], 1, 1)
        keep = keep_reference(seed, head, row[:, None], col, len_q, len_k, dropout_p)
    out, lse = _attend(query, key, value, visible, bias, dropout_p, keep, scale, softcap)
    return (out, lse) if return_lse else out


@overload
def varlen_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, *, dropout_p: float = 0.0, scale: float | None = None,
    is_causal: bool = False, window_size: tuple[int, int] | None = None,
    softcap: float | None = None, return_lse: Literal[False] = False, seed: Tensor | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def varlen_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, *, dropout_p: float = 0.0, scale: float | None = None,
    is_causal: bool = False, window_size: tuple[int, int] | None = None,
    softcap: float | None = None, return_lse: Literal[True], seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def varlen_attention_reference(
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
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition in plain torch; arguments as `flash_attn_varlen_func`.

    One attention among all tokens, in which those of other sequences are not visible: no length is
    read by the host.
    """
    visible, (sequence, row, col) = packed_visible(
        cu_seqlens_q, cu_seqlens_k, len(q), len(k), is_causal, window_size
    )
    keep = None
    if dropout_p > 0 and seed is not None:
        heads = torch.arange(q.shape[1], device=q.device)[:, None, None]
        head = sequence[:, None] * q.shape[1] + heads
        keep = keep_reference(seed, head, row[:, None], col, max_seqlen_q, max_seqlen_k, dropout_p)
    q_HND, k_KND, v_KND = (t.transpose(0, 1) for t in (q, k, v))
    out, lse = _attend(q_HND, k_KND, v_KND, visible, None, dropout_p, keep, scale, softcap)
    out = out.transpose(0, 1)
    return (out, lse) if return_lse else out


def decode_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window_size: tuple[int, int] | None = None,
) -> Tensor:
    """The definition in plain torch; arguments as `flash_attn_decode`."""
    visible = cache_visible(lengths, q.shape[1], k_cache.shape[1], window_size)
    beyond = torch.arange(k_cache.shape[1], device=q.device) >= lengths[:, None]
    v_cache = v_cache.masked_fill(beyond[..., None, None], 0.0)  # 0 · NaN is no 0
    q_BHTD, k_BKSD, v_BKSD = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
    out, _ = _attend(q_BHTD, k_BKSD, v_BKSD, visible, None, 0.0, None, scale, softcap)
    return out.transpose(1, 2)


def packed_visible(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    tokens_q: int,
    tokens_k: int,
    is_causal: bool,
    window_size: tuple[int, int] | None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The mask of packed sequences, bottom-right: [tokens_q, tokens_k] bool.

    Returns:
        The mask; and the sequence of each query, its index there, and that of each key.
    """
    mask = as_mask(is_causal, "bottom_right", window_size)
    sequence_q, row = _places(cu_seqlens_q, tokens_q)
    sequence_k, col = _places(cu_seqlens_k, tokens_k)
    lengths = cu_seqlens_k.diff() - cu_seqlens_q.diff()
    shift = torch.cat((lengths, lengths.new_zeros(1)))[sequence_q]  # a row more: the padding's
    visible = mask.sees((row + shift)[:, None], col) & (sequence_q[:, None] == sequence_k)
    padding = sequence_q == len(cu_seqlens_q) - 1
    return visible & ~padding[:, None], (sequence_q, row, col)


def _places(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Each token's sequence, one past the last for what follows it, and its index there."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens.contiguous(), token, right=True) - 1
    return sequence, token - cu_seqlens[sequence]


def cache_visible(
    lengths: Tensor, queries: int, capacity: int, window_size: tuple[int, int] | None
) -> Tensor:
    """The mask of the last queries of sequences in a cache: [B, 1, queries, capacity] bool."""
    mask = as_mask(True, "bottom_right", window_size)
    row, col = (torch.arange(n, device=lengths.device) for n in (queries, capacity))
    place = (lengths[:, None] - queries + row)[:, None, :, None]
    return mask.sees(place, col)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    keep: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """softmax(query·keyᵀ) · value over [..., H, T, D], and the logarithm of softmax's denominator.

    Scores and probabilities are float32 (float64 for float64). The probabilities are rounded to
    value's dtype before they are multiplied with it, as tensor cores need them.
    """
    if query.dim() > 2 and 1 < key.shape[-3] < query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query.to(wide) @ key.to(wide).mT) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~visible, -torch.inf)
    # Softmax of nothing but -inf is NaN, and so is its gradient: such a query sees nothing.
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(blind, 0.0)
    lse = scores.logsumexp(-1).masked_fill(blind.squeeze(-1), -torch.inf)
    p = scores.softmax(-1).masked_fill(blind, 0.0)
    if keep is not None:
        p = p * keep * (2**32 / max(kept_words(dropout_p), 1))
    elif dropout_p > 0:
        p = torch.dropout(p, dropout_p, True)
    return p.to(value.dtype) @ value, lse
