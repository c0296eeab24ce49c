"""How the backward is launched: which kernels, which tiles, and scratch memory linear in T.

    queries                 dq, and a number or two a query            3 products
    keys                    dk, dv                                     4 products

or, where dq is added up,

    rows                    the same numbers                           reads out, dout
    keys | hopper           dk, dv, and atomically dq                  5 products
    finish | unpack         dq from its sums

Nothing here computes: `launch_backward` writes into memory that it is given.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv, is_hopper, next_power_of_2
from tilewright_kernels._operator import Operator, accumulator
from tilewright_kernels._tf32 import rounded_to_tf32
from tilewright_kernels._triton import HAS_TRITON, INTERPRETED
from tilewright_kernels.dropout import kept_words
from tilewright_kernels.flash_attention.backward_keys import attention_backward_keys_kernel
from tilewright_kernels.flash_attention.backward_queries import attention_backward_queries_kernel
from tilewright_kernels.flash_attention.backward_rows import (
    attention_backward_finish_kernel,
    attention_backward_rows_kernel,
    attention_backward_unpack_kernel,
)
from tilewright_kernels.flash_attention.backward_tiles import SCRATCH_ROWS
from tilewright_kernels.flash_attention.forward import heads_together
from tilewright_kernels.flash_attention.masks import Mask
from tilewright_kernels.flash_attention.online_softmax import cap_of
from tilewright_kernels.flash_attention.operands import (
    describable,
    dot_precision,
    sources,
    strides,
)

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

PADDED = SCRATCH_ROWS.value if HAS_TRITON else 128
ROWS = 32
"""Queries that one program of the kernels before and after the tiles takes; divides PADDED."""

HOPPER_WIDTHS = 40, 128
"""Head dimensions, the least and the greatest, that `backward_hopper` takes."""

HOPPER_KEYS = {64: math.inf, 128: 1536}
"""Width of its tiles -> keys that a query must see in the mean for it to be the faster mode.

Clearing and rounding the sums of dq costs the same for few keys as for many. H200, bfloat16,
16 heads of 128, 16 K tokens, `backward_hopper` against two kernels: 8192 keys (causal) 5.48 against
6.22 ms, 2048 keys 1.58 against 1.73 ms, 1024 keys (a window) 0.96 against 0.91 ms. 32 heads of 64,
2048 keys: 3.82 against 3.50 ms in a slow run, with dp started after s.
"""


SPLIT_HOPPER = False
"""Whether the two kernels of the deterministic mode have their own for Hopper."""


class Tile(NamedTuple):
    """Queries by keys, and how the program is built. Powers of two, BLOCK_M at most PADDED."""

    BLOCK_M: int
    BLOCK_N: int
    num_stages: int
    num_warps: int


ADDS_PAY = {2: False, 4: True, 8: True}
"""Bytes of an element -> whether dq is added up atomically where bits need not repeat.

It saves two products of seven. In 16 bits it is slower all the same (H200, bfloat16, causal, 16 K
tokens in sequences of 4096, the best tiles of each): 2.10 ms against 0.95 + 0.75 at D 128, 1.86 ms
against 1.01 + 0.70 at D 64, before 0.09 ms to clear its sums and to round them. The fifth product
and what it adds through take registers and shared memory: at D 128 two programs fit on a
multiprocessor with tiles of 32 x 64 only. Wider types are not measured; in them products cost most.
"""

# Kernel -> bytes of an element -> head dimension (the padded one, of k or v) -> tile. Two programs
# of four warps on a multiprocessor, of which one multiplies while the other is at its exponentials,
# beat one of eight warps with larger tiles: in the case above 0.95 ms against 1.11 (keys) and 0.75
# against 0.77 (queries) at D 128, 1.01 against 1.39 and 0.70 against 0.72 at D 64. Other widths and
# types are not measured.
TILES: dict[str, dict[int, dict[int, Tile]]] = {
    # With dq among its products.
    "all": {
        2: {64: Tile(64, 64, 3, 4), 128: Tile(32, 64, 2, 4), 256: Tile(32, 64, 2, 8)},
        4: {64: Tile(32, 64, 2, 4), 128: Tile(32, 32, 2, 4), 256: Tile(16, 32, 1, 4)},
        8: {256: Tile(16, 16, 1, 4)},
    },
    "keys": {
        2: {64: Tile(128, 64, 2, 4), 128: Tile(64, 64, 2, 4), 256: Tile(32, 64, 2, 8)},
        4: {64: Tile(32, 64, 2, 4), 128: Tile(32, 32, 2, 4), 256: Tile(16, 32, 1, 4)},
        8: {256: Tile(16, 16, 1, 4)},
    },
    "queries": {
        2: {64: Tile(64, 64, 3, 4), 128: Tile(64, 64, 2, 4), 256: Tile(64, 32, 2, 8)},
        4: {64: Tile(64, 32, 2, 4), 128: Tile(32, 32, 2, 4), 256: Tile(32, 16, 1, 4)},
        8: {256: Tile(16, 16, 1, 4)},
    },
}


@cache
def tile_for(
    kernel: str, width: int, element_size: int, len_q: int, len_k: int, dropout: bool = False
) -> Tile:
    """The kernel's tile for a padded head dimension, made smaller where sequences are short."""
    by_width = TILES[kernel][element_size]
    tile = by_width[min(w for w in by_width if w >= width)]
    if dropout and kernel != "queries":
        # Random words of a whole tile do not fit in registers beside both sums.
        tile = tile._replace(BLOCK_M=max(16, tile.BLOCK_M // 2))
    block_m, block_n = (
        min(block, max(16, next_power_of_2(max(1, length))))
        for block, length in zip(tile[:2], (len_q, len_k), strict=True)
    )
    num_warps = tile.num_warps if (block_m, block_n) == tile[:2] else min(4, tile.num_warps)
    return tile._replace(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps)


class _Problem(NamedTuple):
    """What all kernels of one call share.

    Attributes:
        operator: whose launches they are.
        lengths: (T_q, T_k), or those of the longest sequences.
        batch: sequences.
        rows: of scratch memory, for one head and in all.
        scratch: lse2 and -delta.
        extras: seed, cu_seqlens_q, cu_seqlens_k, scale, softcap and the words that keep.
        window: (left, right).
        widths: D, D_V, BLOCK_D and BLOCK_DV.
        flags: the constants that say which features there are.
    """

    operator: Operator
    lengths: tuple[int, int]
    batch: int
    rows: tuple[int, int]
    scratch: Tensor
    extras: tuple[Any, ...]
    window: tuple[int, int]
    widths: dict[str, int]
    flags: dict[str, Any]

    def constants(self, *names: str) -> dict[str, Any]:
        """Some of the flags."""
        return {name: self.flags[name] for name in names}


def launch_backward(
    operator: Operator, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, *, mask: Mask, scale: float, softcap: float,
    dropout_p: float, seed: Tensor | None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0, max_seqlen_k: int = 0, deterministic: bool,
    dlse: Tensor | None = None,
) -> None:  # fmt: skip
    """Write dq, dk and dv.

    Args:
        operator: whose launches they are.
        dout: [B, T_q, H, D_v], or packed [N_q, H, D_v]; like all others with adjacent columns.
        q: [B, T_q, H, D] or [N_q, H, D].
        k: [B, T_k, K, D] or [N_k, K, D]; H is a multiple of K.
        v: [B, T_k, K, D_v] or [N_k, K, D_v].
        out: forward's, like dout.
        lse: forward's, [B, H, T_q] or [H, N_q], in base e.
        dq: like q, to be written. Rows of packed tensors that are in no sequence are not.
        dk: like k.
        dv: like v.
        mask: what a query sees.
        scale: of q·k.
        softcap: c of c · tanh(s / c), 0 for none.
        dropout_p: of the probabilities.
        seed: int64 scalar on q's device, None without dropout.
        cu_seqlens_q: [B + 1] int32 on q's device where sequences are packed.
        cu_seqlens_k: likewise.
        max_seqlen_q: of the packed sequences' queries.
        max_seqlen_k: of their keys.
        deterministic: the same bits in every run. Without it dq is added up atomically where that
            is faster (`ADDS_PAY`).
        dlse: gradient of lse, like it, or None.
    """
    packed = cu_seqlens_q is not None
    if packed:
        assert cu_seqlens_k is not None
        dout, q, k, v, out, dq, dk, dv = (x[None] for x in (dout, q, k, v, out, dq, dk, dv))
        lse, dlse = lse[None], None if dlse is None else dlse[None]
        batch, lengths = len(cu_seqlens_q) - 1, (max_seqlen_q, max_seqlen_k)
        # Sequence b begins at cu[b] + b · PADDED rounded down: see scratch_row.
        rows_per_head = (q.shape[1] // PADDED + batch + 1) * PADDED
    else:
        batch, lengths = len(q), (q.shape[1], k.shape[1])
        rows_per_head = cdiv(q.shape[1], PADDED) * PADDED
    if dot_precision(q.dtype) == "tf32":
        dout, q, k, v = (rounded_to_tf32(operator, x) for x in (dout, q, k, v))
    heads, width, width_v = q.shape[2], q.shape[3], v.shape[3]
    left, right = mask.window
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    num_rows = (1 if packed else batch) * heads * rows_per_head
    kept = kept_words(dropout_p)
    problem = _Problem(
        operator, lengths, batch, (rows_per_head, num_rows), q.new_empty((2, num_rows), dtype=wide),
        (seed if kept < 2**32 else None, cu_seqlens_q, cu_seqlens_k, scale, softcap, kept),
        (left, right),
        {
            "D": width,
            "D_V": width_v,
            "BLOCK_D": max(16, next_power_of_2(width)),
            "BLOCK_DV": max(16, next_power_of_2(width_v)),
        },
        {
            "GROUP": heads // max(1, k.shape[2]),
            "BOTTOM_RIGHT": mask.bottom_right,
            "HAS_LEFT": left >= 0,
            "HAS_RIGHT": right >= 0,
            "CAP": cap_of(softcap, q),
            "HAS_DROPOUT": kept < 2**32,
            "PACKED": packed,
            "ACC": accumulator(q.dtype),
            "PRECISION": dot_precision(q.dtype),
        },
    )  # fmt: skip
    adds_pay = not deterministic and _keys_seen(problem) >= HOPPER_KEYS[_hopper_width(problem)]
    if adds_pay and _hopper_takes(problem, dout, q, k, v):
        _launch_rows(problem, out, dout, lse, dlse, None)
        _launch_hopper(problem, q, k, v, dout, dq, dk, dv, mask)
        return
    sums = None
    if ADDS_PAY[q.element_size()] and not deterministic:
        sums = q.new_empty((problem.widths["BLOCK_D"], num_rows), dtype=wide)
        _launch_rows(problem, out, dout, lse, dlse, sums)
    else:
        _launch_queries(problem, q, k, v, dout, out, lse, dlse, dq, mask)
    _launch_keys(problem, q, k, v, dout, dk, dv, sums, mask)
    if sums is not None:
        _launch_finish(problem, sums, dq)


def _launch_rows(
    problem: _Problem, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None,
    sums: Tensor | None,
) -> None:  # fmt: skip
    heads = out.shape[2]
    tiles = cdiv(problem.lengths[0], PADDED) * (PADDED // ROWS)
    problem.operator.launch(
        attention_backward_rows_kernel, (tiles * heads * problem.batch,),
        out, dout, lse, dlse, *problem.scratch, sums, problem.extras[1],
        problem.lengths[0], heads, *problem.rows, *out.stride()[:3], *dout.stride()[:3],
        *lse.stride(), *_strides_of(dlse),
        D=problem.widths["D_V"], BLOCK_D=problem.widths["BLOCK_DV"],
        BLOCK_SUMS=problem.widths["BLOCK_D"], ROWS=ROWS,
        **problem.constants("PACKED", "ACC"), num_warps=4,
    )  # fmt: skip


def _launch_keys(
    problem: _Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dk: Tensor, dv: Tensor,
    sums: Tensor | None, mask: Mask,
) -> None:  # fmt: skip
    if SPLIT_HOPPER and sums is None and _hopper_takes(problem, q, k, v, dout):
        _launch_keys_hopper(problem, q, k, v, dout, dk, dv, mask)
        return
    tile = _tile(problem, "keys" if sums is None else "all", q)
    kv_heads = k.shape[2]
    widths = problem.widths["BLOCK_D"], problem.widths["BLOCK_DV"]
    read, tma = sources((q, dout), (tile.BLOCK_M, tile.BLOCK_M), widths)
    sums_tma = sums is not None and tma and not INTERPRETED
    target: Any = sums
    if sums is not None and sums_tma:
        block = [sums.shape[0], tile.BLOCK_M]
        target = TensorDescriptor(sums, list(sums.shape), list(sums.stride()), block)
    problem.operator.launch(
        attention_backward_keys_kernel,
        (cdiv(problem.lengths[1], tile.BLOCK_N) * kv_heads * problem.batch,),
        *read, q, k, v, dout, *problem.scratch, target, dk, dv, *problem.extras, *problem.lengths,
        kv_heads, *problem.window, *problem.rows, *strides(q, k, v, dout, dk, dv),
        **problem.flags, **problem.widths, TMA=tma, SUMS_TMA=sums_tma, **tile._asdict(),
    )  # fmt: skip


def _launch_queries(
    problem: _Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor,
    dlse: Tensor | None, dq: Tensor, mask: Mask,
) -> None:  # fmt: skip
    if SPLIT_HOPPER and _hopper_takes(problem, q, k, v, dout):
        _launch_queries_hopper(problem, q, k, v, dout, out, lse, dlse, dq, mask)
        return
    tile = _tile(problem, "queries", q)
    heads = q.shape[2]
    widths = problem.widths["BLOCK_D"], problem.widths["BLOCK_DV"]
    read, tma = sources((k, v), (tile.BLOCK_N, tile.BLOCK_N), widths)
    problem.operator.launch(
        attention_backward_queries_kernel,
        (cdiv(problem.lengths[0], PADDED) * (PADDED // tile.BLOCK_M) * heads * problem.batch,),
        *read, q, k, v, dout, out, lse, dlse, *problem.scratch, dq, *problem.extras,
        *problem.lengths, heads, *problem.window, problem.rows[0],
        *strides(q, k, v, dout, out, dq), *lse.stride(), *_strides_of(dlse),
        **problem.flags, **problem.widths, TMA=tma, **tile._asdict(),
    )  # fmt: skip


def _launch_keys_hopper(
    problem: _Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dk: Tensor, dv: Tensor,
    mask: Mask,
) -> None:  # fmt: skip
    # Imported here: Gluon is there where Triton is, and this file must not need it.
    from tilewright_kernels.flash_attention.backward_keys_hopper import launch_backward_keys_hopper

    _, cu_seqlens_q, cu_seqlens_k, scale, softcap, _ = problem.extras
    kv_heads = k.shape[2] * problem.batch
    bytes_per_query = (q.shape[3] + v.shape[3]) * q.element_size() * problem.flags["GROUP"]
    together = heads_together(problem.lengths[0], bytes_per_query, 1)
    launch_backward_keys_hopper(
        problem.operator, q, k, v, dout, *problem.scratch, dk, dv, mask=mask,
        scale=scale, softcap=softcap, cap=problem.flags["CAP"], together=min(together, kv_heads),
        rows_per_head=problem.rows[0], batches=problem.batch, lengths=problem.lengths,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip


def _launch_queries_hopper(
    problem: _Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor,
    dlse: Tensor | None, dq: Tensor, mask: Mask,
) -> None:  # fmt: skip
    # Imported here: Gluon is there where Triton is, and this file must not need it.
    from tilewright_kernels.flash_attention.backward_queries_hopper import (
        launch_backward_queries_hopper,
    )

    _, cu_seqlens_q, cu_seqlens_k, scale, softcap, _ = problem.extras
    heads = q.shape[2] * problem.batch
    bytes_per_key = (q.shape[3] + v.shape[3]) * q.element_size()
    together = heads_together(problem.lengths[1], bytes_per_key, problem.flags["GROUP"])
    launch_backward_queries_hopper(
        problem.operator, q, k, v, dout, out, lse, dlse, *problem.scratch, dq, mask=mask,
        scale=scale, softcap=softcap, cap=problem.flags["CAP"], together=min(together, heads),
        rows_per_head=problem.rows[0], batches=problem.batch, lengths=problem.lengths,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip


def _strides_of(dlse: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if dlse is None else dlse.stride()


def _launch_finish(problem: _Problem, sums: Tensor, dq: Tensor) -> None:
    heads = dq.shape[2]
    _, cu_seqlens_q, _, scale, _, _ = problem.extras
    problem.operator.launch(
        attention_backward_finish_kernel,
        (cdiv(problem.lengths[0], ROWS) * heads * problem.batch,),
        sums, dq, cu_seqlens_q, scale, problem.lengths[0], heads, *problem.rows,
        *dq.stride()[:3], D=problem.widths["D"], BLOCK_D=problem.widths["BLOCK_D"], ROWS=ROWS,
        **problem.constants("PACKED", "ACC"), num_warps=4,
    )  # fmt: skip


def _hopper_takes(problem: _Problem, *inputs: Tensor) -> bool:
    """Whether the kernel of `backward_hopper` is for these."""
    width, width_v = problem.widths["D"], problem.widths["D_V"]
    return (
        is_hopper(inputs[0].device)
        and inputs[0].element_size() == 2
        and HOPPER_WIDTHS[0] <= min(width, width_v)
        and max(width, width_v) <= HOPPER_WIDTHS[1]
        and not problem.flags["HAS_DROPOUT"]
        and describable(*inputs)
    )


def _hopper_width(problem: _Problem) -> int:
    return 64 if max(problem.widths["D"], problem.widths["D_V"]) <= 64 else 128


def _keys_seen(problem: _Problem) -> float:
    """About how many keys a query sees in the mean: half of all lie on each side of its place."""
    half = problem.lengths[1] / 2
    return sum(half if limit < 0 else min(limit, half) for limit in problem.window)


def _launch_hopper(
    problem: _Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, mask: Mask,
) -> None:  # fmt: skip
    # Imported here: Gluon is there where Triton is, and this file must not need it.
    from tilewright_kernels.flash_attention.backward_hopper import launch_backward_hopper

    _, cu_seqlens_q, cu_seqlens_k, scale, softcap, _ = problem.extras
    rows_per_head, num_rows = problem.rows
    block_d = _hopper_width(problem)
    sums = q.new_zeros((num_rows, block_d), dtype=torch.float32)
    launch_backward_hopper(
        problem.operator, q, k, v, dout, problem.scratch[0], problem.scratch[1], sums, dk, dv,
        scale=scale, softcap=softcap, cap=problem.flags["CAP"], window=problem.window,
        bottom_right=mask.bottom_right,
        rows_per_head=rows_per_head, batch=problem.batch, lengths=problem.lengths,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    problem.operator.launch(
        attention_backward_unpack_kernel,
        (cdiv(problem.lengths[0], 64) * q.shape[2] * problem.batch,),
        sums, dq, cu_seqlens_q, scale, problem.lengths[0], q.shape[2], rows_per_head,
        *dq.stride()[:3], D=problem.widths["D"], BLOCK_D=block_d,
        **problem.constants("PACKED"), num_warps=4,
    )  # fmt: skip


def _tile(problem: _Problem, kernel: str, q: Tensor) -> Tile:
    width = max(problem.widths["BLOCK_D"], problem.widths["BLOCK_DV"])
    dropout = problem.flags["HAS_DROPOUT"]
    return tile_for(kernel, width, q.element_size(), *problem.lengths, dropout)
