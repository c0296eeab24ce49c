"""How the backward is launched: which kernels, which tiles, and scratch memory linear in T.

    queries | queries_hopper    dq, and a number or two a query        3 products
    keys | keys_hopper          dk, dv                                 4 products

or, where dq is added up,

    rows                        the same numbers                       reads out, dout
    keys | hopper               dk, dv, and atomically dq              5 products
    finish | unpack             dq from its sums

In µs on an H200 (bfloat16, causal, 16 K tokens, 16 heads of 128 where it says no other):

                                            queries, keys   _hopper, two   hopper
    T 4096                                           1764           1434     1574
    T 16384                                          6225           5393     5669
    T 16384, window 1024                              929            845      960
    T 4096, 32 query heads, 8 key heads              3786           2907     3256
    T 4096, 32 heads of 64                           2127           1803     1757

Nothing here computes: `launch_backward` writes into memory that it is given, and launches nothing
for gradients that nobody wants.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv
from tilewright_kernels._operator import Operator
from tilewright_kernels._tf32 import rounded_to_tf32
from tilewright_kernels._triton import HAS_TRITON, INTERPRETED
from tilewright_kernels.flash_attention.backward_keys import attention_backward_keys_kernel
from tilewright_kernels.flash_attention.backward_problem import Problem, problem_of
from tilewright_kernels.flash_attention.backward_queries import attention_backward_queries_kernel
from tilewright_kernels.flash_attention.backward_rows import (
    attention_backward_finish_kernel,
    attention_backward_rows_kernel,
    attention_backward_unpack_kernel,
)
from tilewright_kernels.flash_attention.masks import Mask
from tilewright_kernels.flash_attention.operands import (
    dot_precision,
    sources,
    strides,
    strides_of,
)
from tilewright_kernels.flash_attention.tiles import (
    HOPPER_QUERIES,
    Tile,
    fitted,
    hopper_takes,
    hopper_width,
    narrowest,
)

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

ROWS = 32
"""Queries, at most, that one program of the kernels before and after the tiles takes."""

HOPPER_HEAD = 40
"""The least head dimension that the kernels for Hopper take."""

DESCRIBED_ROWS = 2**31 - 1
"""Rows of scratch memory, at most, that a descriptor reaches: its coordinates are int32."""

FUSED_KEYS = 1536
"""Keys that a query must see in the mean for one kernel to be faster on Hopper than two.

Clearing and rounding the sums of dq costs the same for few keys as for many. H200, bfloat16,
causal, 32 heads of 64, 16 K tokens: 8192 keys 6.27 against 6.73 ms, 2048 keys 1.76 against 1.80 ms.
With 16 heads of 128 it is the slower one, 5.67 against 5.39 and 1.57 against 1.51 ms, and is not
built: there the fifth product and what it adds through take the registers of the others.
"""

ADDS_PAY = {2: False, 4: True, 8: True}
"""Bytes of an element -> whether dq is added up atomically where bits need not repeat.

It saves two products of seven. In 16 bits it is slower all the same (H200, bfloat16, causal, 16 K
tokens in sequences of 4096, the best tiles of each): 2.10 ms against 0.95 + 0.75 at D 128, 1.86 ms
against 1.01 + 0.70 at D 64, before 0.09 ms to clear its sums and to round them. The fifth product
and what it adds through take registers and shared memory: at D 128 two programs fit on a
multiprocessor with tiles of 32 x 64 only. float32 of 4 x 2048 tokens and 12 heads: 15.5 against
9.6 + 12.7 ms at D 128, in tf32 2.0 against 1.2 + 1.5, each with its own roundings.
"""

# Kernel -> bytes of an element -> head dimension (the padded one, of k or v) -> tile. Two programs
# of four warps on a multiprocessor, of which one multiplies while the other is at its exponentials,
# beat one of eight warps with larger tiles: in the case above 0.95 ms against 1.11 (keys) and 0.75
# against 0.77 (queries) at D 128, 1.01 against 1.39 and 0.70 against 0.72 at D 64.
# float32, without tensor cores (the case of ADDS_PAY, all at D = 64, 128, 256): 6.7, 15.5, 26.4 ms.
# With whole sums of operands that are kept, and four warps: 43.6, 101, 216 ms. There ptxas gave a
# thread 32 registers and spilled nearly all; held to 255, 27.0 ms at D = 128. Larger tiles are
# faster until they spill much, and compile longer: 64 x 64 at D = 128 14.9 ms, 32 x 32 at D = 256
# 40.0. Timed with maxnreg=255, but queries; without, as here, loops have 1 % more instructions at
# most, that of keys at D = 64 5 %.
# Keys and queries at D = 256, and other types, are not measured.
TILES: dict[str, dict[int, dict[int, Tile]]] = {
    # With dq among its products, for types in which that pays.
    "all": {
        4: {64: Tile(32, 64, 1, 8, 32), 128: Tile(32, 64, 1, 8, 16), 256: Tile(16, 32, 1, 8, 16)},
        8: {256: Tile(16, 16, 1, 4)},
    },
    "keys": {
        2: {64: Tile(128, 64, 2, 4), 128: Tile(64, 64, 2, 4), 256: Tile(32, 64, 2, 8)},
        4: {64: Tile(32, 64, 1, 8, 32), 128: Tile(32, 64, 1, 8, 16), 256: Tile(16, 32, 1, 8, 16)},
        8: {256: Tile(16, 16, 1, 4)},
    },
    "queries": {
        2: {64: Tile(64, 64, 3, 4), 128: Tile(64, 64, 2, 4), 256: Tile(64, 32, 2, 8)},
        4: {64: Tile(64, 64, 1, 8, 16), 128: Tile(32, 64, 1, 8, 16), 256: Tile(32, 32, 1, 8, 32)},
        8: {256: Tile(16, 16, 1, 4)},
    },
}

# The same in tf32 (all): 1.49, 2.03, 5.78 ms. At D = 128 two programs of 32 x 32, for the tensor
# cores' older instruction, beat one for Hopper's: 32 x 64 2.61 ms, 64 x 64 2.75. At D = 64, 32 x 64
# 1.58; at D = 256, 16 x 32 7.04. Keys and queries alone are not measured at D = 256.
TF32_TILES: dict[str, dict[int, Tile]] = {
    "all": {64: Tile(64, 64, 1, 4), 128: Tile(32, 32, 2, 4), 256: Tile(32, 32, 1, 8)},
    "keys": {64: Tile(32, 64, 2, 4), 128: Tile(32, 32, 2, 4), 256: Tile(16, 32, 1, 4)},
    "queries": {64: Tile(64, 32, 2, 4), 128: Tile(32, 32, 2, 4), 256: Tile(32, 16, 1, 4)},
}


@cache
def tile_for(
    kernel: str, width: int, element_size: int, len_q: int, len_k: int, dropout: bool = False,
    tf32: bool = False,
) -> Tile:  # fmt: skip
    """The kernel's tile for a padded head dimension; BLOCK_M is 128 at most."""
    by_width = TF32_TILES[kernel] if tf32 else TILES[kernel][element_size]
    tile = narrowest(by_width, width)
    if dropout and kernel != "queries":
        # Random words of a whole tile do not fit in registers beside both sums.
        tile = tile._replace(BLOCK_M=max(16, tile.BLOCK_M // 2))
    return fitted(tile, len_q, len_k)


def launch_backward(
    operator: Operator, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, *, mask: Mask, scale: float,
    softcap: float, dropout_p: float, seed: Tensor | None,
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
        dq: like q, to be written; None where it is not wanted. Rows of packed tensors that are in
            no sequence are not written.
        dk: like k, or None.
        dv: like v, or None where dk is.
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
            is faster (`ADDS_PAY`, `FUSED_KEYS`).
        dlse: gradient of lse, like it, or None.
    """
    if cu_seqlens_q is not None:
        dout, q, k, v, out, lse = (x[None] for x in (dout, q, k, v, out, lse))
        dq, dk, dv, dlse = (None if x is None else x[None] for x in (dq, dk, dv, dlse))
    if dot_precision(q.dtype) == "tf32":
        dout, q, k, v = (rounded_to_tf32(operator, x) for x in (dout, q, k, v))
    problem = problem_of(
        operator, q, k, v, mask=mask, scale=scale, softcap=softcap, dropout_p=dropout_p, seed=seed,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    dropout, long = problem.flags["HAS_DROPOUT"], problem.lengths[0] > HOPPER_QUERIES
    countable = len(problem.lse2) <= DESCRIBED_ROWS
    hopper = not dropout and long and countable and hopper_takes(HOPPER_HEAD, q, k, v, dout)
    if not deterministic and dq is not None and dk is not None and dv is not None:
        if hopper and hopper_width(q, v) == 64 and problem.keys_seen >= FUSED_KEYS:
            _launch_rows(problem, out, dout, lse, dlse, None)
            _launch_hopper(problem, q, k, v, dout, dq, dk, dv)
            return
        if not hopper and ADDS_PAY[q.element_size()]:
            sums = q.new_empty((problem.widths["BLOCK_D"], len(problem.lse2)), dtype=lse.dtype)
            _launch_rows(problem, out, dout, lse, dlse, sums)
            _launch_keys(problem, q, k, v, dout, dk, dv, sums, None)
            _launch_finish(problem, sums, dq)
            return
    # How many tiles have been taken, by each of two kernels.
    counters = q.new_zeros((2, 1), dtype=torch.int32) if hopper else (None, None)
    if dq is None:
        _launch_rows(problem, out, dout, lse, dlse, None)
    else:
        _launch_queries(problem, q, k, v, dout, out, lse, dlse, dq, counters[0])
    if dk is not None and dv is not None:
        _launch_keys(problem, q, k, v, dout, dk, dv, None, counters[1])


def _launch_rows(
    problem: Problem, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None,
    sums: Tensor | None,
) -> None:  # fmt: skip
    padding = problem.flags["PADDED"]
    rows = min(ROWS, padding)
    tiles = cdiv(problem.lengths[0], padding) * (padding // rows)
    problem.operator.launch(
        attention_backward_rows_kernel, (tiles * problem.heads * problem.batch,),
        out, dout, lse, dlse, problem.lse2, problem.minus_delta, sums, problem.cu_seqlens_q,
        problem.lengths[0], problem.heads, problem.rows_per_head, len(problem.lse2),
        *strides(out, dout), *strides_of(lse), *strides_of(dlse),
        D=problem.widths["D_V"], BLOCK_D=problem.widths["BLOCK_DV"],
        BLOCK_SUMS=problem.widths["BLOCK_D"], ROWS=rows,
        **problem.constants("PACKED", "PADDED", "ACC"), num_warps=4,
    )  # fmt: skip


def _launch_queries(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor,
    dlse: Tensor | None, dq: Tensor, counter: Tensor | None,
) -> None:  # fmt: skip
    if counter is not None:
        # Imported here, as below: Gluon is there where Triton is, and this file must not need it.
        from tilewright_kernels.flash_attention.backward_queries_hopper import (
            launch_backward_queries_hopper,
        )

        launch_backward_queries_hopper(problem, q, k, v, dout, out, lse, dlse, dq, counter)
        return
    tile = _tile(problem, "queries", q)
    widths = problem.widths["BLOCK_D"], problem.widths["BLOCK_DV"]
    read, tma = sources((k, v), (tile.BLOCK_N, tile.BLOCK_N), widths)
    padding = problem.flags["PADDED"]
    tiles = cdiv(problem.lengths[0], padding) * (padding // tile.BLOCK_M)
    problem.operator.launch(
        attention_backward_queries_kernel, (tiles * problem.heads * problem.batch,),
        *read, q, k, v, dout, out, lse, dlse, problem.lse2, problem.minus_delta, dq,
        *problem.extras, *problem.lengths, problem.heads, *problem.mask.window,
        problem.rows_per_head, *strides(q, k, v, dout, out, dq), *strides_of(lse),
        *strides_of(dlse), **problem.flags, **problem.widths, TMA=tma, **tile._asdict(),
    )  # fmt: skip


def _launch_keys(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dk: Tensor, dv: Tensor,
    sums: Tensor | None, counter: Tensor | None,
) -> None:  # fmt: skip
    if counter is not None:
        from tilewright_kernels.flash_attention.backward_keys_hopper import (
            launch_backward_keys_hopper,
        )

        launch_backward_keys_hopper(problem, q, k, v, dout, dk, dv, counter)
        return
    tile = _tile(problem, "keys" if sums is None else "all", q)
    widths = problem.widths["BLOCK_D"], problem.widths["BLOCK_DV"]
    read, tma = sources((q, dout), (tile.BLOCK_M, tile.BLOCK_M), widths)
    sums_tma = sums is not None and tma and not INTERPRETED and len(problem.lse2) <= DESCRIBED_ROWS
    target: Any = sums
    if sums is not None and sums_tma:
        block = [sums.shape[0], tile.BLOCK_M]
        target = TensorDescriptor(sums, list(sums.shape), list(sums.stride()), block)
    tiles = cdiv(problem.lengths[1], tile.BLOCK_N)
    problem.operator.launch(
        attention_backward_keys_kernel, (tiles * problem.kv_heads * problem.batch,),
        *read, q, k, v, dout, problem.lse2, problem.minus_delta, target, dk, dv, *problem.extras,
        *problem.lengths, problem.kv_heads, *problem.mask.window, problem.rows_per_head,
        len(problem.lse2), *strides(q, k, v, dout, dk, dv),
        **problem.flags, **problem.widths, TMA=tma, SUMS_TMA=sums_tma, **tile._asdict(),
    )  # fmt: skip


def _launch_finish(problem: Problem, sums: Tensor, dq: Tensor) -> None:
    rows = min(ROWS, problem.flags["PADDED"])
    tiles = cdiv(problem.lengths[0], rows)
    problem.operator.launch(
        attention_backward_finish_kernel, (tiles * problem.heads * problem.batch,),
        sums, dq, problem.cu_seqlens_q, problem.scale, problem.lengths[0], problem.heads,
        problem.rows_per_head, len(problem.lse2), *strides(dq),
        D=problem.widths["D"], BLOCK_D=problem.widths["BLOCK_D"], ROWS=rows,
        **problem.constants("PACKED", "PADDED", "ACC"), num_warps=4,
    )  # fmt: skip


def _launch_hopper(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    from tilewright_kernels.flash_attention.backward_hopper import launch_backward_hopper

    sums = q.new_zeros((len(problem.lse2), 64), dtype=torch.float32)
    launch_backward_hopper(problem, q, k, v, dout, sums, dk, dv)
    tiles = cdiv(problem.lengths[0], 64)
    problem.operator.launch(
        attention_backward_unpack_kernel, (tiles * problem.heads * problem.batch,),
        sums, dq, problem.cu_seqlens_q, problem.scale, problem.lengths[0], problem.heads,
        problem.rows_per_head, *strides(dq), D=problem.widths["D"],
        **problem.constants("PACKED", "PADDED"), num_warps=4,
    )  # fmt: skip


def _tile(problem: Problem, kernel: str, q: Tensor) -> Tile:
    width = max(problem.widths["BLOCK_D"], problem.widths["BLOCK_DV"])
    dropout, tf32 = problem.flags["HAS_DROPOUT"], problem.flags["PRECISION"] == "tf32"
    return tile_for(kernel, width, q.element_size(), *problem.lengths, dropout, tf32)
