"""What torch computes instead of the kernels: why, the warning, and how."""

import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright_kernels._operator import Operator
from tilewright_kernels._tf32 import tf32_is_allowed
from tilewright_kernels.flash_attention.masks import UNLIMITED, Mask
from tilewright_kernels.flash_attention.reference import attend

MAX_HEAD_DIM = 256


def unsupported_heads(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take heads like these, or None."""
    narrowest, widest = sorted((q.shape[-1], v.shape[-1]))
    if widest > MAX_HEAD_DIM or narrowest == 0:
        return f"head dimensions are 1 to {MAX_HEAD_DIM} and this is {widest if narrowest else 0}"
    if q.dtype == torch.float64 and q.is_cuda:
        return "float64 is for the interpreter"
    return None


def better_in_float32(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout_p: float, plain: bool, repeats: bool
) -> str | None:
    """Why backend auto has torch compute attention without tensor cores, or None.

    float32 without tf32, in what torch's memory-efficient kernel takes: four dimensions, adjacent
    elements, heads that are their own, the whole square or its lower triangle. H200, B 4 T 2048
    H 12 D 128: forward 1.4 ms against 5.1, backward 4.2 against 15.5. Dropout stays, whose seeds
    are the kernels' own, and so does what must repeat, since torch's backward adds in any order. In
    compiled code the kernels stay, too: torch's compiler cannot read the switch.

    Args:
        q: [*, H, T_q, D]; k and v likewise.
        k: keys.
        v: values.
        mask: which of them a query sees.
        dropout_p: of the weights.
        plain: neither softcap nor a mask of the caller's, and no lse is returned.
        repeats: two backwards have to give the same bits.
    """
    if q.dtype != torch.float32 or q.dim() != 4:
        return None
    len_q, len_k = q.shape[-2], k.shape[-2]
    triangle = mask.window == (UNLIMITED, 0) and mask.shift(len_q, len_k) == 0
    if (
        not (torch.compiler.is_compiling() or tf32_is_allowed())
        and plain
        and dropout_p == 0
        and not repeats
        and q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
        and (triangle or not mask.hides)
        and q.shape[-1] % 4 == v.shape[-1] % 4 == 0
        and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    ):
        return "float32 without tf32 is faster in torch's memory-efficient kernel"
    return None


def warn_of(operator: Operator, q: Tensor, unsupported: str | None) -> None:
    """Say once why torch computes what was asked of the kernels on a CUDA device."""
    fell_back = q.is_cuda and operator.setting == "auto"
    if unsupported and fell_back and not torch.compiler.is_compiling():
        _warn(operator.name, unsupported)


@cache
def _warn(name: str, unsupported: str) -> None:
    warnings.warn(
        f"{name}: torch computes this one, because {unsupported}; use_backend({name}='torch') asks "
        f"for it and ends this warning",
        stacklevel=4,
    )


def torch_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float,
    mask: Mask, scale: float | None, softcap: float | None, return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """torch's own function, or the reference for what that has not."""
    if softcap is not None or return_lse:
        return attend(
            query, key, value, mask, attn_mask, dropout_p, scale, softcap, return_lse=return_lse
        )
    if attn_mask is not None and attn_mask.is_floating_point():
        # torch takes float32 beside 16 bits, but one of its CUDA kernels reads it as if it were 16.
        attn_mask = _rounded(attn_mask, query.dtype)
    gqa = query.dim() > 2 and query.shape[-3] > key.shape[-3] > 1
    options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": gqa}
    len_q, len_k = query.shape[-2], key.shape[-2]
    if mask.window == (UNLIMITED, 0) and mask.shift(len_q, len_k) == 0 and attn_mask is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    if not mask.hides:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    visible = mask.visible(len_q, len_k, query.device)
    if attn_mask is None:
        return masked_attention(query, key, value, visible, **options)
    if attn_mask.dtype == torch.bool:
        return masked_attention(query, key, value, attn_mask & visible, **options)
    return masked_attention(query, key, value, visible, attn_mask, **options)


def _rounded(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias in another type; what is finite stays so, lest a row of -1e9 see nothing at all.

    Half of the largest number is the limit, since kernels multiply by log2(e) and add scores. A
    bias of the queries' own type is the caller's, and stays as it is.
    """
    if bias.dtype == dtype:
        return bias
    limit = torch.finfo(dtype).max / 2
    return torch.where(bias.isinf(), bias, bias.clamp(-limit, limit)).to(dtype)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, bias: Tensor | None = None,
    **options: Any,
) -> Tensor:  # fmt: skip
    """torch's attention under a bool mask, 0 where a query sees nothing; bias is added to scores.

    torch's implementations differ in what they make of such a query, so here it sees everything and
    its result, and with it its gradient, is replaced.
    """
    blind = ~visible.any(-1, keepdim=True)
    attn_mask = visible | blind
    if bias is not None:
        attn_mask = bias.masked_fill(~attn_mask, -torch.inf)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    return out.masked_fill(blind, 0.0)
