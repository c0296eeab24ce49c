"""Rotary position embedding (RoPE; Su et al. 2021, arXiv:2104.09864) of queries and keys.

Pairs (x₁, x₂) of a head's first R dimensions turn by an angle that grows with the token's position:

    y₁ = x₁ · cos - x₂ · sin          y₂ = x₂ · cos + x₁ · sin

A pair is dimensions (i, i + R/2), as in Llama's weights on Hugging Face, or (2i, 2i + 1) where
interleaved. Dimensions R and up are handed through. The gradient is turned back by the same angle,
so backward is the same kernel with -sin and keeps nothing of q and k.

One launch reads q and k once and writes both once; a token's row of the tables is read once for all
its heads. The tables stay float32 up to the product, which is computed in float32 (float64 for
float64) and rounded once. Hugging Face casts them to the activations' type first: in bfloat16 that
alone is an error of 2⁻⁹ in each cosine.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv, next_power_of_2
from tilewright_kernels._operator import Operator, accumulator, check_floating, check_same_device
from tilewright_kernels._triton import tl, triton
from tilewright_kernels.packed_position_ids import (
    packed_position_ids,
    packed_position_ids_reference,
)

_OP = Operator("apply_rotary_emb")

AXIS = 65535
"""Programs along the second and the third axis of a launch, at the most (CUDA)."""


def apply_rotary_emb_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """The definition in plain torch; arguments as `apply_rotary_emb`."""
    rows = slice(q.shape[-3]) if position_ids is None else position_ids
    if cu_seqlens is not None:
        rows = packed_position_ids_reference(cu_seqlens, q.shape[0])
    cos, sin = cos[rows].unsqueeze(-2), sin[rows].unsqueeze(-2)
    return _turn(q, cos, sin, interleaved), _turn(k, cos, sin, interleaved)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the pairs of x [..., D] by tables that broadcast to [..., R/2]."""
    rotated, rest = x.tensor_split([2 * cos.shape[-1]], dim=-1)
    if rotated.dtype != torch.float64:
        rotated = rotated.float()
    x1, x2 = rotated.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else rotated.chunk(2, -1)
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    y = torch.stack((y1, y2), -1).flatten(-2) if interleaved else torch.cat((y1, y2), -1)
    return torch.cat((y.to(x.dtype), rest), -1).contiguous()


# These change from batch to batch, and nothing would be gained from knowing what divides them.
@triton.jit(do_not_specialize=["num_tokens", "table_rows"])
def _apply_rotary_emb_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, position_ptr, q_out_ptr, k_out_ptr,
    q_batch_stride, q_token_stride, q_head_stride, q_dim_stride,
    k_batch_stride, k_token_stride, k_head_stride, k_dim_stride,
    cos_row_stride, sin_row_stride, position_batch_stride, position_token_stride,
    num_tokens, table_rows, q_heads, k_heads,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """y₁ = x₁ · cos - x₂ · sin, y₂ = x₂ · cos + x₁ · sin for BLOCK_H heads of BLOCK_T tokens.

    Heads are counted through q and then k, and a tile may hold some of both: pointer and strides
    are chosen head by head. A program is short, so what it computes before its first load counts:
    batch, tokens and heads are axes of the launch, which takes no division.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    b = tl.program_id(2).to(tl.int64)
    token_mask = t < num_tokens
    position = t
    if HAS_POSITIONS:
        offsets = b * position_batch_stride + t * position_token_stride
        position = tl.load(position_ptr + offsets, mask=token_mask, other=0).to(tl.int64)

    is_q = head < q_heads
    mask = (token_mask & (head < q_heads + k_heads))[:, :, None]
    heads = tl.where(is_q, q_heads, k_heads)
    head = tl.where(is_q, head, head - q_heads)
    sequence = tl.where(is_q, q_ptr + b * q_batch_stride, k_ptr + b * k_batch_stride)
    rows = sequence + t * tl.where(is_q, q_token_stride, k_token_stride)
    rows = (rows + head.to(tl.int64) * tl.where(is_q, q_head_stride, k_head_stride))[:, :, None]
    dim_stride = tl.where(is_q, q_dim_stride, k_dim_stride).to(tl.int64)[:, :, None]
    outs = tl.where(is_q, q_out_ptr, k_out_ptr) + ((b * num_tokens + t) * heads + head) * HEAD_DIM
    outs = outs[:, :, None]

    if INTERLEAVED:
        # Whole rows in wide loads, parted in registers: loads of stride 2 would ask for all twice.
        dims = tl.arange(0, 2 * BLOCK_PAIRS)[None, None, :]
        x_mask = mask & (dims < ROTARY_DIM)
        x = tl.load(rows + dims * dim_stride, mask=x_mask, other=0.0).to(ACC)
        x1, x2 = tl.split(tl.reshape(x, [BLOCK_T, BLOCK_H, BLOCK_PAIRS, 2]))
    else:
        dims = tl.arange(0, BLOCK_PAIRS)[None, None, :]
        x_mask = mask & (dims < HALF)
        x1 = tl.load(rows + dims * dim_stride, mask=x_mask, other=0.0).to(ACC)
        x2 = tl.load(rows + (dims + HALF) * dim_stride, mask=x_mask, other=0.0).to(ACC)

    pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
    table_mask = token_mask & (pairs < HALF)
    if HAS_POSITIONS:
        # One outside the tables cannot raise here: it gives NaN, not somebody else's memory.
        table_mask &= (position >= 0) & (position < table_rows)
    nan = float("nan")
    cos = tl.load(cos_ptr + position * cos_row_stride + pairs, mask=table_mask, other=nan)
    sin = tl.load(sin_ptr + position * sin_row_stride + pairs, mask=table_mask, other=nan)
    cos, sin = cos.to(ACC)[:, None, :], sin.to(ACC)[:, None, :]
    if CONJUGATE:
        sin = -sin

    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    if INTERLEAVED:
        y = tl.reshape(tl.join(y1, y2), [BLOCK_T, BLOCK_H, 2 * BLOCK_PAIRS])
        tl.store(outs + dims, y, mask=x_mask)
    else:
        tl.store(outs + dims, y1, mask=x_mask)
        tl.store(outs + dims + HALF, y2, mask=x_mask)
    if ROTARY_DIM < HEAD_DIM:
        rest = ROTARY_DIM + tl.arange(0, BLOCK_REST)[None, None, :]
        rest_mask = mask & (rest < HEAD_DIM)
        tl.store(outs + rest, tl.load(rows + rest * dim_stride, mask=rest_mask), mask=rest_mask)


class _Tile(NamedTuple):
    """Tokens and heads that one program takes."""

    BLOCK_T: int
    BLOCK_H: int
    num_warps: int


def _tile(tokens: int, heads: int, head_dim: int, rotary_dim: int) -> _Tile:
    """Tile of 1024 to 4096 elements, 16 of those that turn a thread: two loads of 8 in bfloat16.

    It takes as many heads as possible, since they share a row of the tables, but at least three
    quarters of its lanes must have a head to work on. For 16 heads of q, 8 of k and D = 128 that is
    one token and 256 threads with 32 registers (sm_90, bfloat16): a multiprocessor holds eight
    programs with 48 KiB of loads in flight; about 20 KiB cover the latency of an H200's memory.

    Share of the copy speed there, on an H200: 0.96 to 0.99 with one token and 32, 16 or 8 heads a
    program (as much from one process to the next as from one tile to another), 0.02 less with two
    tokens, 0.77 to 0.96 for persistent programs that load up to two tiles ahead. 8 elements a
    thread take 0.73 to 0.94. With 32 + 8 heads of D = 64: 0.97 with one token, 0.94 with two.
    """
    per_head = next_power_of_2(head_dim)
    block_h = min(next_power_of_2(heads), max(1, 4096 // per_head))
    while 4 * heads < 3 * cdiv(heads, block_h) * block_h:
        block_h //= 2
    block_t = next_power_of_2(min(tokens, cdiv(1024, block_h * per_head)))
    turning = block_t * block_h * next_power_of_2(rotary_dim)
    return _Tile(block_t, block_h, max(1, min(16, turning // (32 * 16))))


def _fake(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool, conjugate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tables_and_positions, ctx.interleaved, ctx.conjugate = inputs[2:]
    frozen = [y for y, need in zip(output, ctx.needs_input_grad, strict=False) if not need]
    ctx.mark_non_differentiable(*frozen)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tables_and_positions)


def _grads(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
    given = dk if dq is None else dq
    if given is None:
        return (None,) * 7
    # Where the loss knows one output only, the other counts no heads.
    heads = [given[:, :, :0] if dy is None else dy for dy in (dq, dk)]
    dq_in, dk_in = rotate_heads(*heads, *ctx.saved_tensors, ctx.interleaved, not ctx.conjugate)
    grads = (None if dq is None else dq_in, None if dk is None else dk_in)
    return *grads, *[None] * 5


@_OP.function(fake=_fake, setup_context=_save, backward=_grads)
def rotate_heads(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool, conjugate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rotate q [B, T, H, D] and k [B, T, K, D], back instead where conjugate.

    One launch, but for more sequences than an axis of it has: then one for every `AXIS` of them.
    """
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if len(q) <= AXIS:
        _launch(q, k, cos, sin, position_ids, q_out, k_out, interleaved, conjugate)
        return q_out, k_out
    for first in range(0, len(q), AXIS):
        part = slice(first, first + AXIS)
        _launch(
            q[part], k[part], cos, sin, None if position_ids is None else position_ids[part],
            q_out[part], k_out[part], interleaved, conjugate,
        )  # fmt: skip
    return q_out, k_out


def _launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    q_out: Tensor, k_out: Tensor, interleaved: bool, conjugate: bool,
) -> None:  # fmt: skip
    B, T, H, D = q.shape
    K, R = k.shape[2], 2 * cos.shape[1]
    if B * T * (H + K) == 0:
        return
    tile = _tile(T, H + K, D, R)
    _OP.launch(
        _apply_rotary_emb_kernel, (cdiv(T, tile.BLOCK_T), cdiv(H + K, tile.BLOCK_H), B),
        q, k, cos, sin, position_ids, q_out, k_out,
        *q.stride(), *k.stride(), cos.stride(0), sin.stride(0),
        *((0, 0) if position_ids is None else position_ids.stride()),
        T, cos.shape[0], H, K,
        HEAD_DIM=D, ROTARY_DIM=R, INTERLEAVED=interleaved, CONJUGATE=conjugate,
        HAS_POSITIONS=position_ids is not None, ACC=accumulator(q.dtype),
        BLOCK_PAIRS=next_power_of_2(R // 2), BLOCK_REST=next_power_of_2(max(1, D - R)),
        **tile._asdict(),
    )  # fmt: skip


def apply_rotary_emb(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys, in one launch (of up to 65535 sequences).

    y₁ = x₁ · cos - x₂ · sin,  y₂ = x₂ · cos + x₁ · sin         (Su et al. 2021, arXiv:2104.09864)

    Args:
        q: [B, T, H, D], or packed [N, H, D], in float16, bfloat16, float32 or float64. Any strides,
            none is copied: a [B, H, T, D] tensor comes as q.transpose(1, 2), the q of a joint
            projection as a slice.
        k: [B, T, K, D], or [N, K, D], like q but for the number of heads and the strides.
        cos: [P, R/2] float32, as `rotary_table` makes it: one value a pair, R ≤ D.
        sin: like cos.
        position_ids: [B, T], or [N], int64 or int32: the row of the tables for each token. None
            takes row t for token t of each sequence, and a packed batch for one sequence. Ids must
            lie in [0, P). Checking that would wait for the device, so it is not done: the kernel
            gives NaN for tokens outside, the reference indexes as torch does.
        cu_seqlens: [S + 1] int32 or int64, instead of position_ids where the N tokens are S packed
            sequences, as for `packed_position_ids`: positions count from 0 in each.
        interleaved: whether a pair is dimensions (2i, 2i + 1) instead of (i, i + R/2).

    Returns:
        New q and k, contiguous in the shapes given: what attention reads next, whatever the inputs'
        strides. Differentiable once with respect to q and k.

    Raises:
        ValueError: shapes that do not fit, more tokens than rows of the tables, tables that require
            grad, tensors on different devices.
        TypeError: dtypes other than these, q and k of different dtypes.
    """
    _check_heads(q, k)
    _check_tables(q, cos, sin)
    check_same_device(q=q, k=k, cos=cos, sin=sin, position_ids=position_ids, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        _check_packed(q, position_ids)
        position_ids = packed_position_ids(cu_seqlens, len(q))
    _check_positions(q, cos, position_ids)
    if not _OP.uses_triton(q, _unsupported(q, k)):
        return apply_rotary_emb_reference(
            q, k, cos, sin, position_ids=position_ids, interleaved=interleaved
        )
    cos, sin = (table if table.stride(1) == 1 else table.contiguous() for table in (cos, sin))
    if q.dim() == 4:
        return rotate_heads(q, k, cos, sin, position_ids, interleaved, False)
    position_ids = None if position_ids is None else position_ids[None]
    q_out, k_out = rotate_heads(q[None], k[None], cos, sin, position_ids, interleaved, False)
    return q_out[0], k_out[0]


def _unsupported(q: Tensor, k: Tensor) -> str | None:
    """Why a launch cannot have tokens and heads as axes, if it cannot."""
    if q.shape[-3] >= 2**31 or q.shape[-2] + k.shape[-2] > AXIS:
        return f"a launch has no room for 2**31 tokens or more than {AXIS} heads: give q in parts"
    return None


def _check_heads(q: Tensor, k: Tensor) -> None:
    check_floating("q", q)
    if q.dtype != k.dtype:
        raise TypeError(f"q is {q.dtype} and k {k.dtype}; make them equal, as in k.to({q.dtype})")
    shapes = f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}"
    if q.dim() not in (3, 4) or q.dim() != k.dim():
        raise ValueError(
            f"{shapes}; give [B, T, heads, D], or [N, heads, D] for packed sequences, for both"
        )
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{shapes}; only the number of heads, the last dimension but one, may differ "
            f"([B, heads, T, D] tensors come as q.transpose(1, 2))"
        )


def _check_tables(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32:
            raise TypeError(
                f"{name} is {table.dtype}; the tables stay float32 whatever q is: "
                f"keep them as rotary_table makes them"
            )
        if table.requires_grad:
            raise ValueError(
                f"{name} requires grad, but only q and k have gradients here; give "
                f"{name}.detach(), or learn angles through apply_rotary_emb_reference"
            )
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise ValueError(
            f"cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}; both must be [P, R/2], "
            f"one row a position (position_ids choose rows)"
        )
    if not 2 <= 2 * cos.shape[1] <= q.shape[-1]:
        raise ValueError(
            f"the tables have {cos.shape[1]} columns, which turn R = {2 * cos.shape[1]} dimensions "
            f"of a head, and D is {q.shape[-1]}; R must lie in [2, D]. Tables that hold every "
            f"angle twice are halved by cos[:, : R // 2]"
        )


def _check_packed(q: Tensor, position_ids: Tensor | None) -> None:
    if position_ids is not None:
        raise ValueError("position_ids and cu_seqlens both say where a token is; give one of them")
    if q.dim() != 3:
        raise ValueError(
            f"q has shape {tuple(q.shape)}; cu_seqlens goes with packed sequences, [N, heads, D]"
        )


def _check_positions(q: Tensor, cos: Tensor, position_ids: Tensor | None) -> None:
    if position_ids is None:
        if q.shape[-3] > cos.shape[0]:
            raise ValueError(
                f"q has {q.shape[-3]} tokens a sequence and the tables have {cos.shape[0]} rows; "
                f"make longer tables, or give position_ids"
            )
        return
    if position_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"position_ids is {position_ids.dtype}; give int64 or int32, as in position_ids.long()"
        )
    if position_ids.shape != q.shape[:-2]:
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}; for q of shape {tuple(q.shape)} "
            f"it must be {tuple(q.shape[:-2])}, for example by position_ids.expand"
        )
