"""FlashAttention-2 in plain torch: attention by tiles, without the matrix of scores.

Algorithms 1 and 2 of Dao 2023, arXiv:2307.08691, line by line. Read it before the kernels: they are
this, with a program for each pass of an outer loop. Softcap, dropout and shared key heads are left
to them, and to `attention_reference`.

Shapes: [..., T, D]. i counts blocks of queries, j blocks of keys.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from tilewright_kernels.flash_attention.masks import UNLIMITED, Alignment, Mask, as_mask


@overload
def flash_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None,
    *, causal_alignment: Alignment = "top_left", window_size: tuple[int, int] | None = None,
    block_q: int = 64, block_k: int = 64, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def flash_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None,
    *, causal_alignment: Alignment = "top_left", window_size: tuple[int, int] | None = None,
    block_q: int = 64, block_k: int = 64, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def flash_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    causal_alignment: Alignment = "top_left",
    window_size: tuple[int, int] | None = None,
    block_q: int = 64,
    block_k: int = 64,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by tiles of block_q x block_k scores, forward and backward.

    Memory beyond inputs and outputs is a tile a head. torch.compile unrolls the loops over tiles.

    Args:
        query: [..., T_q, D].
        key: [..., T_k, D] with query's leading dimensions.
        value: [..., T_k, D_v], likewise.
        is_causal: as for `scaled_dot_product_attention`.
        scale: likewise.
        causal_alignment: likewise.
        window_size: likewise.
        block_q: queries of a tile.
        block_k: keys of a tile.
        return_lse: also return lse.

    Returns:
        [..., T_q, D_v]; with return_lse a pair of it and lse [..., T_q].
    """
    mask = as_mask(is_causal, causal_alignment, window_size)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, lse = _FlashAttention.apply(query, key, value, mask, scale, block_q, block_k)
    return (out, lse) if return_lse else out


class _FlashAttention(torch.autograd.Function):
    """Keeps q, k, v, out and one number a row, lse, from which backward makes p anew."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, B_r: int, B_c: int
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(q, k, v, mask, scale, B_r, B_c)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = mask, scale, B_r, B_c
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dout, dlse = grad_outputs
        grads = _backward(dout, dlse, *ctx.saved_tensors, *ctx.options)
        return *grads, None, None, None, None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, B_r: int, B_c: int
) -> tuple[Tensor, Tensor]:
    """Algorithm 1: each block of queries walks the keys and keeps a running maximum and sum."""
    wide = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [], []
    for i in range(0, q.shape[-2], B_r):
        q_i = q[..., i : i + B_r, :]
        m = torch.full(q_i.shape[:-1], -torch.inf, dtype=wide, device=q.device)
        l = torch.zeros_like(m)
        acc = torch.zeros(*m.shape, v.shape[-1], dtype=wide, device=q.device)
        for j in _key_blocks(i, q, k, mask, B_r, B_c):
            k_j, v_j = k[..., j : j + B_c, :], v[..., j : j + B_c, :]
            s = _scores(q_i, k_j, i, j, q, k, mask, scale)
            m_new = torch.maximum(m, s.amax(-1))
            # Where nothing has been seen yet the maximum is -inf, and -inf - -inf is no number.
            base = m_new.masked_fill(m_new == -torch.inf, 0.0)
            p = torch.exp(s - base[..., None])
            alpha = torch.exp(m - base)
            l = alpha * l + p.sum(-1)
            acc = alpha[..., None] * acc + p.to(v.dtype).to(wide) @ v_j.to(wide)
            m = m_new
        nothing = l == 0.0
        outs.append((acc / l.masked_fill(nothing, 1.0)[..., None]).to(v.dtype))
        lses.append(m + torch.log(l.masked_fill(nothing, 1.0)))
    if not outs:
        return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=wide)
    return torch.cat(outs, -2), torch.cat(lses, -1)


def _backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: Mask, scale: float, B_r: int, B_c: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Algorithm 2: each block of keys walks the queries; five products a tile.

    dS = P · (dP - D), D = Σ_j P_ij · dP_ij: softmax's gradient needs a sum over the whole row. It
    is also Σ_d dout · out, which needs no tile. The gradient of lse adds P · dlse, so it is taken
    off D.
    """
    wide = lse.dtype
    delta = (dout.to(wide) * out.to(wide)).sum(-1) - dlse
    dq, dks, dvs = torch.zeros_like(q, dtype=wide), [], []
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    for j in range(0, k.shape[-2], B_c):
        k_j, v_j = k[..., j : j + B_c, :], v[..., j : j + B_c, :]
        dk, dv = torch.zeros_like(k_j, dtype=wide), torch.zeros_like(v_j, dtype=wide)
        for i in range(0, q.shape[-2], B_r):
            if j not in _key_blocks(i, q, k, mask, B_r, B_c):
                continue
            rows = slice(i, i + B_r)
            q_i, dout_i = q[..., rows, :], dout[..., rows, :].to(wide)
            s = _scores(q_i, k_j, i, j, q, k, mask, scale)
            p = torch.exp(s - base[..., rows, None])
            dv = dv + p.to(v.dtype).to(wide).mT @ dout_i
            dp = dout_i @ v_j.to(wide).mT
            ds = (p * (dp - delta[..., rows, None]) * scale).to(q.dtype).to(wide)
            dk = dk + ds.mT @ q_i.to(wide)
            dq[..., rows, :] += ds @ k_j.to(wide)
        dks.append(dk.to(k.dtype))
        dvs.append(dv.to(v.dtype))
    if not dks:
        return dq.to(q.dtype), torch.zeros_like(k), torch.zeros_like(v)
    return dq.to(q.dtype), torch.cat(dks, -2), torch.cat(dvs, -2)


def _scores(
    q_i: Tensor, k_j: Tensor, i: int, j: int, q: Tensor, k: Tensor, mask: Mask, scale: float
) -> Tensor:
    """scale · q·kᵀ of one tile, -inf where the query does not see the key."""
    wide = torch.promote_types(q.dtype, torch.float32)
    s = q_i.to(wide) @ k_j.to(wide).mT * scale
    if not mask.hides:
        return s
    place = torch.arange(i, i + q_i.shape[-2], device=q.device)
    place = place + mask.shift(q.shape[-2], k.shape[-2])
    key = torch.arange(j, j + k_j.shape[-2], device=q.device)
    return s.masked_fill(~mask.sees(place[:, None], key), -torch.inf)


def _key_blocks(i: int, q: Tensor, k: Tensor, mask: Mask, B_r: int, B_c: int) -> range:
    """Starts of the blocks of keys that some query of the block at i sees."""
    len_q, len_k = q.shape[-2], k.shape[-2]
    left, right = mask.window
    first = i + mask.shift(len_q, len_k)
    last = min(i + B_r, len_q) - 1 + mask.shift(len_q, len_k)
    begin = 0 if left == UNLIMITED else max(first - left, 0)
    end = len_k if right == UNLIMITED else min(last + right + 1, len_k)
    return range(begin // B_c * B_c, end, B_c)
