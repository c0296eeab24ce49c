"""What a caller of attention can get wrong, checked before anything runs."""

import torch
from torch import Tensor

from tilewright_kernels._operator import check_floating, check_same_device
from tilewright_kernels.dropout import check_probability

LARGEST_SCALE, SOFTCAPS = 1e30, (1e-6, 1e6)
"""What float32 has room for: scale over softcap, and what a kernel gives a hidden score, -2⁶³ times
softcap, which must stay below every other. A softcap beyond these hides all scores or caps none."""


def check_options(dropout_p: float, softcap: float | None, scale: float | None) -> None:
    """Raise on a probability, a softcap or a scale outside of its range."""
    check_probability(dropout_p)
    least, most = SOFTCAPS
    if softcap is not None and not least <= softcap <= most:
        raise ValueError(
            f"softcap is {softcap}; give a number from {least:g} to {most:g}, or None for no "
            "softcap"
        )
    if scale is not None and not -LARGEST_SCALE <= scale <= LARGEST_SCALE:
        raise ValueError(
            f"scale is {scale}; give a number of at most {LARGEST_SCALE:g} in size, or None for "
            "1 / sqrt(D)"
        )


def check_same_kind(query: Tensor, **others: Tensor) -> None:
    """Raise unless all have one floating dtype and one device."""
    check_floating("query", query)
    for name, t in others.items():
        if t.dtype != query.dtype:
            raise TypeError(
                f"query is {query.dtype} and {name} {t.dtype}; they must be equal, for example "
                f"{name}.to({query.dtype})"
            )
    check_same_device(query=query, **others)


def check_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None,
    is_causal: bool, enable_gqa: bool,
) -> None:  # fmt: skip
    """Raise on what does not fit in the arguments of `scaled_dot_product_attention`."""
    check_same_kind(query, key=key, value=value)
    shapes = (
        f"query has shape {tuple(query.shape)}, key {tuple(key.shape)} and value "
        f"{tuple(value.shape)}"
    )
    if min(t.dim() for t in (query, key, value)) < 2:
        raise ValueError(f"{shapes}; each needs two dimensions, [T, D], or more")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"{shapes}; the last dimensions of query and key must be equal")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"{shapes}; key and value must have one length, their last dimension but 1"
        )
    try:
        torch.broadcast_shapes(*(t.shape[:-3] for t in (query, key, value)))
    except RuntimeError:
        raise ValueError(
            f"{shapes}; the dimensions before the last three do not broadcast"
        ) from None
    heads = [t.shape[-3] if t.dim() > 2 else 1 for t in (query, key, value)]
    check_heads(heads[0], heads[1], heads[2], enable_gqa)
    if attn_mask is None:
        return
    if is_causal:
        raise ValueError("is_causal and attn_mask are both given; put causality into attn_mask")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(
            f"attn_mask is {attn_mask.dtype}; give bool, float32 or query's {query.dtype}"
        )
    check_same_device(query=query, attn_mask=attn_mask)


def check_heads(query: int, key: int, value: int, enable_gqa: bool) -> None:
    """Raise unless the numbers of heads go together."""
    if key == value and (query == key or 1 in (query, key)):  # equal, or broadcast
        return
    heads = f"query has {query} heads, key {key} and value {value}"
    if key != value or key == 0 or query % key:
        raise ValueError(f"{heads}; key and value must have one number, which divides query's")
    if not enable_gqa:
        raise ValueError(f"{heads}; enable_gqa=True lets heads of query share one of key")
