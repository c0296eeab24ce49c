"""The forward of FlashAttention-2 (Dao 2023, arXiv:2307.08691): out and log-sum-exp, tile by tile.

    out_i = Σ_j p_ij · v_j / l_i      p_ij = exp(s_ij - m_i)      lse_i = m_i + log l_i

A program holds BLOCK_M queries of one head and walks the keys they see in blocks of BLOCK_N, so
that neither the scores nor the probabilities are ever in memory. Reads q once, k and v once a
program (mostly from the second-level cache), writes out and lse. 4 · T_q · T_k · D operations a
head, half of them where a causal mask hides half of the keys: blocks that nobody sees are not
visited, and only those at an edge of what is seen are masked.
"""

from functools import cache

from torch import Tensor

from tilewright_kernels._launch import cdiv
from tilewright_kernels._operator import Operator, accumulator
from tilewright_kernels._tf32 import rounded_to_tf32
from tilewright_kernels._triton import tl, triton
from tilewright_kernels.dropout import kept_words
from tilewright_kernels.flash_attention.masks import (
    Mask,
    keep,
    key_blocks,
    shift_of,
    visible,
)
from tilewright_kernels.flash_attention.online_softmax import (
    as_operand,
    cap_of,
    finish_rows,
    product,
    score_factors,
    scores,
    take_piece,
)
from tilewright_kernels.flash_attention.operands import dot_precision, sources, strides
from tilewright_kernels.flash_attention.sequence_rows import (
    load_rows,
    place_of_program,
    sequence,
    store_rows,
)
from tilewright_kernels.flash_attention.tiles import (
    HOPPER_QUERIES,
    Tile,
    fitted,
    heads_together,
    hopper_takes,
    narrowest,
    padded,
)

# Bytes of an element -> head dimension (the padded one, of k or v, at most) -> tile. TFLOP/s on an
# H200, bfloat16, causal, T = 4096: D = 128: 402, with (128, 64, 2, 8) 343. D = 64: 391, with
# (128, 128, 2, 8) 274: there several programs of four warps share a multiprocessor, and one takes
# exponentials while another multiplies. At D = 128 registers and shared memory allow one.
# float32 (4 x 2048 tokens, 12 heads, causal), D = 64, 128, 256: 14.5, 10.0, 6.2; with whole sums,
# whose operands were spilled, 9.5, 5.8, 5.7. The more results a thread has, the more share what it
# reads: at D = 64 eight warps in place of four make it 10.0, at D = 128 tiles of 32 x 32 6.1.
TILES: dict[int, dict[int, Tile]] = {
    2: {64: Tile(128, 64, 3, 4), 128: Tile(128, 128, 2, 8), 256: Tile(128, 64, 2, 8)},
    4: {64: Tile(64, 64, 1, 4, 16), 128: Tile(64, 64, 1, 8, 16), 256: Tile(32, 32, 1, 8, 32)},
    8: {256: Tile(16, 16, 1, 4)},
}

# The same in tf32: 35, 67, 71 TFLOP/s. Of a tile of 32 queries, 34 and 31 at D = 128 and 256: fewer
# than 64 the tensor cores of Hopper take by their older instruction alone.
TF32_TILES = {64: Tile(64, 64, 2, 4), 128: Tile(128, 64, 2, 8), 256: Tile(128, 32, 1, 8)}

HOPPER_HEAD = 33
"""The least head dimension that `forward_hopper` is for."""

DROPOUT_BLOCK_N = 32
"""Keys at a time with dropout, by 8 warps: random words take the registers of the rest."""


@triton.jit
def _walk(
    q, q_source, head, first_q, first_query, len_q, q_strides,
    k, v, m, l, acc, begin, end, index, kv_head, first_k, query, len_k, shift, left, right,
    k_strides, v_strides, seed, drop_head, len_q_max, len_k_max, kept, before, factor,
    CAP: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, MASKED: tl.constexpr,
    DROPOUT: tl.constexpr, CLEAR: tl.constexpr, TMA: tl.constexpr,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Take the keys begin … end - 1 into the rows' state (m, l, acc)."""
    for j in tl.range(begin, end, BLOCK_N):
        k_tile = load_rows(
            k, index, kv_head, first_k, j, len_k, k_strides, D, BLOCK_N, BLOCK_D, TMA, False
        )
        if PIECE > 0:
            # Kept as an operand it is 512 registers a thread. The row that is none of its own, and
            # never negative, is for the compiler, which would load it before the loop.
            q = load_rows(
                q_source, index, head, first_q, first_query + tl.minimum(j, 0), len_q, q_strides,
                D, BLOCK_M, BLOCK_D, TMA, False,
            )  # fmt: skip
        products = product(q, k_tile.T, tl.zeros((BLOCK_M, BLOCK_N), ACC), PRECISION, PIECE)
        s = scores(products, before, CAP)
        key = (j + tl.arange(0, BLOCK_N))[None, :]
        if MASKED:
            seen = visible(query, key, len_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
            s = tl.where(seen, s, float("-inf"))
        p, m, l, alpha = take_piece(s, m, l, factor, MASKED)
        if DROPOUT:
            p = tl.where(keep(seed, drop_head, query, key, len_q_max, len_k_max, kept), p, 0.0)
        v_tile = load_rows(
            v, index, kv_head, first_k, j, len_k, v_strides, D_V, BLOCK_N, BLOCK_DV,
            TMA, CLEAR and MASKED,
        )  # fmt: skip
        acc = acc * alpha[:, None]
        acc = product(as_operand(p, v_tile.dtype, PRECISION), v_tile, acc, PRECISION, PIECE)
    return m, l, acc


@triton.jit(
    do_not_specialize=[
        *("batches", "heads", "len_q_max", "len_k_max", "left", "right", "kept"),
        *("together", "lse_batch_stride", "lse_head_stride"),
    ]
)
def attention_forward_kernel(
    q, k, v, out_ptr, lse_ptr, seed_ptr, cu_q_ptr, cu_k_ptr,
    # float64, so that they are exact there.
    # pyrefly: ignore[not-a-type]
    before: tl.float64, factor: tl.float64,
    batches, heads, len_q_max, len_k_max, left, right, kept, together,
    q_batch_stride, q_row_stride, q_head_stride, k_batch_stride, k_row_stride, k_head_stride,
    v_batch_stride, v_row_stride, v_head_stride, out_batch_stride, out_row_stride, out_head_stride,
    lse_batch_stride, lse_head_stride,
    HAS_BEFORE: tl.constexpr, CAP: tl.constexpr, GROUP: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    DROPOUT: tl.constexpr, TMA: tl.constexpr,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_M queries of a head; grid (tiles · heads · batches)."""
    tiles = tl.cdiv(len_q_max, BLOCK_M)
    tile, batch_head = place_of_program(tl.program_id(0), tiles, heads * batches, together)
    batch, head = batch_head // heads, batch_head % heads
    index, first_q, len_q, first_k, len_k = sequence(
        batch, len_q_max, len_k_max, cu_q_ptr, cu_k_ptr
    )  # fmt: skip
    first_query = tile * BLOCK_M
    if first_query >= len_q:
        return
    shift = shift_of(len_q, len_k, BOTTOM_RIGHT)
    last_query = tl.minimum(first_query + BLOCK_M, len_q) - 1
    begin, full_begin, full_end, end = key_blocks(
        first_query, last_query, len_k, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )  # fmt: skip

    q_strides = q_batch_stride, q_row_stride, q_head_stride
    k_strides = k_batch_stride, k_row_stride, k_head_stride
    v_strides = v_batch_stride, v_row_stride, v_head_stride
    PACKED: tl.constexpr = tl.constexpr(cu_q_ptr is not None)
    q_tile = load_rows(
        q, index, head, first_q, first_query, len_q, q_strides, D, BLOCK_M, BLOCK_D, TMA, False
    )
    rows = first_query + tl.arange(0, BLOCK_M)
    query = rows[:, None]
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    before = tl.full((), before, ACC) if HAS_BEFORE else None
    factor = tl.full((), factor, ACC)
    m = tl.full((BLOCK_M,), float("-inf"), dtype=ACC)
    l = tl.zeros((BLOCK_M,), dtype=ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), dtype=ACC)
    for part in tl.static_range(3):
        if part == 0:
            part_begin, part_end = begin, full_begin
        elif part == 1:
            part_begin, part_end = full_begin, full_end
        else:
            part_begin, part_end = full_end, end
        if HAS_LEFT or part > 0:
            m, l, acc = _walk(
                q_tile, q, head, first_q, first_query, len_q, q_strides,
                k, v, m, l, acc, part_begin, part_end, index, head // GROUP, first_k,
                query, len_k, shift, left, right, k_strides, v_strides,
                seed, batch_head, len_q_max, len_k_max, kept, before, factor,
                CAP, HAS_LEFT, HAS_RIGHT, part != 1, DROPOUT, PACKED, TMA,
                D, D_V, BLOCK_D, BLOCK_DV, ACC, PRECISION, BLOCK_M, BLOCK_N, PIECE,
            )  # fmt: skip

    acc, lse = finish_rows(m, l, acc)
    if DROPOUT:
        acc = acc * (4294967296.0 / tl.maximum(kept, 1).to(ACC))
    out_strides = out_batch_stride, out_row_stride, out_head_stride
    store_rows(
        acc, out_ptr, index, head, first_q, first_query, len_q, out_strides,
        D_V, BLOCK_M, BLOCK_DV,
    )  # fmt: skip
    lse_ptr += (
        tl.cast(index, tl.int64) * lse_batch_stride + tl.cast(head, tl.int64) * lse_head_stride
    )
    tl.store(lse_ptr + first_q + rows, lse, mask=rows < len_q)


@cache
def tile_for(
    width: int, element_size: int, len_q: int, len_k: int, dropout: bool, tf32: bool = False
) -> Tile:
    """The tile for a padded head dimension, made smaller where sequences are short."""
    tile = narrowest(TF32_TILES if tf32 else TILES[element_size], width)
    if dropout:
        tile = tile._replace(BLOCK_N=min(tile.BLOCK_N, DROPOUT_BLOCK_N), num_warps=8)
    return fitted(tile, len_q, len_k)


def launch_forward(
    operator: Operator, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
    mask: Mask, scale: float, softcap: float, dropout_p: float, seed: Tensor | None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0, max_seqlen_k: int = 0,
) -> None:  # fmt: skip
    """Write out and lse.

    Args:
        operator: whose launch it is.
        q: [B, T_q, H, D], or packed [N_q, H, D]; like all others with adjacent columns.
        k: [B, T_k, K, D] or [N_k, K, D]; H is a multiple of K.
        v: [B, T_k, K, D_v] or [N_k, K, D_v].
        out: [B, T_q, H, D_v] or [N_q, H, D_v]. Rows of packed tensors that are in no sequence are
            not written.
        lse: [B, H, T_q] or [H, N_q], float32 (float64 for float64), in base e.
        mask: what a query sees.
        scale: of q·k.
        softcap: c of c · tanh(s / c), 0 for none.
        dropout_p: of the probabilities; lse is without it.
        seed: int64 scalar on q's device, None without dropout.
        cu_seqlens_q: [B + 1] int32 on q's device where sequences are packed.
        cu_seqlens_k: likewise.
        max_seqlen_q: of the packed sequences' queries.
        max_seqlen_k: of their keys.
    """
    batches, len_q, len_k = q.shape[0], q.shape[1], k.shape[1]
    if cu_seqlens_q is not None:
        q, k, v, out, lse = (x[None] for x in (q, k, v, out, lse))
        batches, len_q, len_k = len(cu_seqlens_q) - 1, max_seqlen_q, max_seqlen_k
    if out.numel() == 0:
        return
    precision = dot_precision(q.dtype)
    if precision == "tf32":
        q, k, v = (rounded_to_tf32(operator, x) for x in (q, k, v))
    heads, kv_heads, width, width_v = q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    blocks = [padded(n) for n in (width, width_v)]
    kept = kept_words(dropout_p)
    dropout = kept < 2**32
    before, factor = score_factors(scale, softcap)
    group = heads // max(1, kv_heads)
    bytes_per_head = len_k * (width + width_v) * q.element_size()
    together = heads_together(bytes_per_head, kv_heads * batches) * group
    if not dropout and len_q > HOPPER_QUERIES and hopper_takes(HOPPER_HEAD, q, k, v):
        # Imported here: Gluon is there where Triton is, and this file must not need it.
        from tilewright_kernels.flash_attention.forward_hopper import launch_forward_hopper

        launch_forward_hopper(
            operator, q, k, v, out, lse, mask=mask, before=before, factor=factor,
            cap=cap_of(softcap, q), together=together,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, batches=batches, len_q=len_q,
            len_k=len_k,
        )  # fmt: skip
        return
    tf32 = precision == "tf32"
    tile = tile_for(max(blocks), q.element_size(), len_q, len_k, dropout, tf32)
    rows = tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_N
    (q_source, k_source, v_source), tma = sources(
        (q, k, v), rows, (blocks[0], blocks[0], blocks[1])
    )
    left, right = mask.window
    operator.launch(
        attention_forward_kernel, (cdiv(len_q, tile.BLOCK_M) * heads * batches,),
        q_source, k_source, v_source, out, lse, seed, cu_seqlens_q, cu_seqlens_k,
        1.0 if before is None else before, factor,
        batches, heads, len_q, len_k, left, right, kept if dropout else 0, together,
        *strides(q, k, v, out), *lse.stride()[:2],
        HAS_BEFORE=before is not None, CAP=cap_of(softcap, q), GROUP=group,
        BOTTOM_RIGHT=mask.bottom_right, HAS_LEFT=left >= 0, HAS_RIGHT=right >= 0,
        DROPOUT=dropout, TMA=tma, D=width, D_V=width_v, BLOCK_D=blocks[0], BLOCK_DV=blocks[1],
        ACC=accumulator(q.dtype), PRECISION=precision, **tile._asdict(),
    )  # fmt: skip
