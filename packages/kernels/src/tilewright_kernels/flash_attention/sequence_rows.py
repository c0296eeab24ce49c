"""Which tile is whose, where a sequence lies, and its rows: what forward and backward share.

Tensors are [B, T, H, D], or packed, all sequences in one row of the batch. A tile is rows of one
head of one sequence; what of it lies past the sequence's end is read as zeros and never written.
"""

from tilewright_kernels._triton import tl, triton


@triton.jit
def place_of_program(program, tiles, heads, together):
    """(tile, head) of a program, the last tiles first: under a causal mask they are the longest.

    Heads come in groups of `together`, whose keys and values stay in the second-level cache while
    all tiles of the group are worked on.
    """
    first = program // (tiles * together) * together
    group = tl.minimum(heads - first, together)
    within = program - first * tiles
    return tiles - 1 - within // group, first + within % group


@triton.jit
def sequence(batch, len_q, len_k, cu_q_ptr, cu_k_ptr):
    """Where sequence `batch` lies: (index in the tensors, first query, queries, first key, keys).

    Packed sequences lie in one row of the batch; len_q and len_k are then the longest ones'.
    """
    if cu_q_ptr is None:
        index = batch
        first_q, first_k = len_q * 0, len_k * 0
    else:
        index = batch * 0
        first_q, first_k = tl.load(cu_q_ptr + batch), tl.load(cu_k_ptr + batch)
        len_q = tl.load(cu_q_ptr + batch + 1) - first_q
        len_k = tl.load(cu_k_ptr + batch + 1) - first_k
    return index, first_q, len_q, first_k, len_k


@triton.jit
def load_rows(
    source, index, head, first, row, length, strides, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr, CLEAR: tl.constexpr,
):  # fmt: skip
    """Rows row … row + ROWS - 1 of a sequence that begins at `first`, zeros past its end.

    source is a descriptor of [B, H, T, WIDTH], or a pointer, which needs the strides of the batch,
    the rows and the heads. A descriptor sees the tensor's end only: with CLEAR what lies between
    the sequence's and that one becomes zero, since a probability of zero times a NaN is a NaN.
    """
    inside = row + tl.arange(0, ROWS)[:, None] < length
    if TMA:
        tile = source.load([index, head, first + row, 0]).reshape(ROWS, COLS)
        if CLEAR:
            tile = tl.where(inside, tile, 0.0)
    else:
        batch_stride, row_stride, head_stride = strides
        rows = (first + row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        cols = tl.arange(0, COLS)[None, :]
        source += tl.cast(index, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride
        tile = tl.load(
            source + rows * row_stride + cols, mask=inside & (cols < WIDTH), other=0.0
        )  # fmt: skip
    return tile


@triton.jit
def store_rows(
    tile, pointer, index, head, first, row, length, strides,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write what of a tile lies within the sequence, in the type of the memory."""
    batch_stride, row_stride, head_stride = strides
    inside = row + tl.arange(0, ROWS)[:, None] < length
    rows = (first + row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    pointer += tl.cast(index, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride
    tl.store(
        pointer + rows * row_stride + cols, tile.to(pointer.dtype.element_ty),
        mask=inside & (cols < WIDTH),
    )  # fmt: skip
