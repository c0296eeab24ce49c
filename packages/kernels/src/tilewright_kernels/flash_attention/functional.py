"""`scaled_dot_product_attention`: torch's function and what torch's has not."""

import math
from typing import Literal, overload

import torch
from torch import Tensor

from tilewright_kernels._linear_losses import autocast
from tilewright_kernels._operator import Operator
from tilewright_kernels.flash_attention.arguments import check_attention, check_options
from tilewright_kernels.flash_attention.fallback import (
    better_in_float32,
    torch_attention,
    unsupported_heads,
    warn_of,
)
from tilewright_kernels.flash_attention.masks import Alignment, as_mask
from tilewright_kernels.flash_attention.registration import draw_seed, register, scalars

_OP = Operator("scaled_dot_product_attention")

_attention = register(_OP, "attention")


@overload
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False, *, causal_alignment: Alignment = "top_left",
    window_size: tuple[int, int] | None = None, softcap: float | None = None,
    return_lse: Literal[False] = False, deterministic: bool | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False, *, causal_alignment: Alignment = "top_left",
    window_size: tuple[int, int] | None = None, softcap: float | None = None,
    return_lse: Literal[True], deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def scaled_dot_product_attention(
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
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · query·keyᵀ) · value, as `torch.nn.functional.scaled_dot_product_attention`.

    Query i stands at key i, or with bottom-right alignment at key i + T_k - T_q, and sees the keys
    from window_size[0] before that place to window_size[1] after it; with is_causal none after it.
    A query that sees no key gets 0, and gives no gradient.

    Args:
        query: [*, H, T_q, D] in float16, bfloat16, float32 or float64. Any strides: a transposed
            [B, T, H, D] is read as it lies, and the result and the gradients lie likewise.
        key: [*, K, T_k, D] of query's dtype.
        value: [*, K, T_k, D_v] of query's dtype.
        attn_mask: bool, true where a query sees a key, or numbers added to the scores, in float32
            (rounded) or query's dtype; broadcasts to [*, H, T_q, T_k]. Not in the kernels: torch
            computes it, and a warning says so.
        dropout_p: probability with which a weight of the sum becomes 0, the others growing by
            1 / (1 - p). Set it to 0 outside of training. Its seed is drawn from the generator of
            query's device.
        is_causal: hide the keys after a query's own place.
        scale: of the scores, at most 1e30 in size; None is 1 / sqrt(D).
        enable_gqa: allow H to be a multiple of K: query head h reads key head h // (H / K).
        causal_alignment: "top_left" as torch, or "bottom_right": the last query stands at the last
            key, as with a cache. Of windows too.
        window_size: (left, right), the number of keys seen before and after the query's own place;
            -1 is all of them.
        softcap: scores become softcap · tanh(score / softcap) before the mask; 1e-6 to 1e6.
        return_lse: also return the logarithms of softmax's denominators.
        deterministic: whether two backwards give the same bits, at the cost of two more products;
            None follows torch.are_deterministic_algorithms_enabled().

    Returns:
        [*, H, T_q, D_v]; with return_lse a pair of it and lse [*, H, T_q] in float32 (float64 for
        float64), -inf for a query that sees nothing. Differentiable once.

    Raises:
        ValueError: shapes or devices that do not fit; heads that differ without enable_gqa;
            is_causal together with attn_mask; an option outside its range.
        TypeError: dtypes that differ or are not floating point.
    """
    query, key, value = autocast(query, key, value)
    mask = as_mask(is_causal, causal_alignment, window_size)
    check_attention(query, key, value, attn_mask, is_causal, enable_gqa)
    check_options(dropout_p, softcap, scale)
    unsupported = "attn_mask is given" if attn_mask is not None else unsupported_heads(query, value)
    warn_of(_OP, query, unsupported)
    plain = attn_mask is None and softcap is None and not return_lse
    repeats = deterministic
    if repeats is None:
        repeats = torch.are_deterministic_algorithms_enabled()
    better = better_in_float32(query, key, value, mask, dropout_p, plain, repeats)
    if not _OP.uses_triton(query, unsupported, better):
        return torch_attention(
            query, key, value, attn_mask, dropout_p, mask, scale, softcap, return_lse
        )
    q_BTHD, k_BTKD, v_BTKD = _as_batches(query, key, value)
    out_BTHD, lse_BHT = _attention(
        q_BTHD, k_BTKD, v_BTKD, draw_seed(dropout_p, query), None, None, 0, 0,
        *scalars(mask, scale, softcap, dropout_p, deterministic, query.shape[-1]),
    )  # fmt: skip
    rank = max(t.dim() for t in (query, key, value))
    leading = torch.broadcast_shapes(*(t.shape[:-3] for t in (query, key, value)))
    leading = (*leading, q_BTHD.shape[2]) if rank > 2 else leading
    out = out_BTHD.transpose(1, 2).reshape(*leading, *out_BTHD.shape[1::2])
    return (out, lse_BHT.reshape(out.shape[:-1])) if return_lse else out


def _as_batches(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Views [B, T, H, D] of [*, H, T, D], broadcast; a copy only of five dimensions and more."""
    tensors = [t[(None,) * max(0, 3 - t.dim())] for t in (query, key, value)]
    batch = torch.broadcast_shapes(*(t.shape[:-3] for t in tensors))
    heads = tensors[0].shape[-3], tensors[1].shape[-3]
    tensors = [
        t.expand(*batch, kept, *t.shape[-2:])
        for t, kept in zip(
            tensors, (heads[1] if heads[0] == 1 else heads[0], heads[1], heads[1]), strict=True
        )
    ]
    return [t.reshape(math.prod(batch), *t.shape[-3:]).transpose(1, 2) for t in tensors]
