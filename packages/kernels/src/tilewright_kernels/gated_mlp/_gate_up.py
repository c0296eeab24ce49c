"""The forward kernel: both projections of x, and the gated unit of the two in the epilogue.

    gate = x · Wgᵀ          up = x · Wuᵀ          h = f(gate) · up

x is read once for both. The sums of gate and up of one tile are in registers at the same time, so h
is computed where they are: gate and up reach memory where backward will ask for them, and else
never. They are rounded as if they did, so that h has the same bits in forward and in backward.
"""

from typing import Any

from torch import Tensor

from tilewright_kernels._launch import cdiv, is_hopper, num_programs
from tilewright_kernels._operator import Operator, accumulator
from tilewright_kernels._product_tiles import Tile, operands
from tilewright_kernels._triton import tl, triton
from tilewright_kernels.gated_mlp._launch import describable, describe, tile_for
from tilewright_kernels.matmul.tiles import dot_pointers, store_pointers, tile_in_groups

# A tile of gate and a tile of up, both of BLOCK_N columns. A fourth stage has room on Hopper alone,
# which has `_hopper` instead (and with which `_hopper` was compared).
PERSISTENT_TILE = Tile(128, 128, 64, 8, 3, 8)


@triton.jit
def gate_up_persistent_kernel(
    x_desc, w_desc, h_desc, gate_desc, up_desc, M, N, K,
    FUNCTION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """h [M, N], gate and up where they have descriptors; one program a multiprocessor.

    w_desc describes both weights as [2, N, K], so that one load brings a tile of each, one above
    the other: one product with 2 · BLOCK_N columns, which reads x from shared memory once.
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m, n = tile_in_groups(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row, col = m * BLOCK_M, n * BLOCK_N
        acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), dtype=tl.float32)
        for k in tl.range(0, tl.cdiv(K, BLOCK_K)):
            x = x_desc.load([row, k * BLOCK_K])
            w = w_desc.load([0, col, k * BLOCK_K]).reshape(2 * BLOCK_N, BLOCK_K)
            acc = tl.dot(x, w.T, acc)
        gate, up = acc.to(x_desc.dtype).reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
        if gate_desc is not None:
            gate_desc.store([row, col], gate)
            up_desc.store([row, col], up)
        if h_desc is not None:
            h = FUNCTION(gate.to(tl.float32)) * up.to(tl.float32)
            h_desc.store([row, col], h.to(h_desc.dtype))


@triton.jit
def gate_up_pointer_kernel(
    x_ptr, w_ptr, h_ptr, gate_ptr, up_ptr, M, N, K,
    x_m_stride, x_k_stride, w_n_stride, w_k_stride, h_m_stride, gate_m_stride,
    FUNCTION: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """The same through pointers, for any strides and sizes: two walks along K, a tile a program."""
    m, n = tile_in_groups(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    w_up_ptr = w_ptr + tl.cast(N, tl.int64) * w_n_stride
    dtype = x_ptr.dtype.element_ty
    gate = dot_pointers(
        x_ptr, w_ptr, m, n, M, N, K, x_m_stride, x_k_stride, w_k_stride, w_n_stride,
        ACC, PRECISION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES,
    ).to(dtype).to(ACC)  # fmt: skip
    up = dot_pointers(
        x_ptr, w_up_ptr, m, n, M, N, K, x_m_stride, x_k_stride, w_k_stride, w_n_stride,
        ACC, PRECISION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES,
    ).to(dtype).to(ACC)  # fmt: skip
    if gate_ptr is not None:
        store_pointers(
            gate, gate_ptr, None, m, n, M, N, gate_m_stride, 1, 0, 0, False, False,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
        store_pointers(
            up, up_ptr, None, m, n, M, N, gate_m_stride, 1, 0, 0, False, False,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if h_ptr is not None:
        store_pointers(
            FUNCTION(gate) * up, h_ptr, None, m, n, M, N, h_m_stride, 1, 0, 0, False, False,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip


def launch_gate_up(
    operator: Operator, x: Tensor, w_gate_up: Tensor, h: Tensor | None, gate_up: Tensor | None,
    function: Any,
) -> None:  # fmt: skip
    """Write h [M, I] and gate_up [M, 2I], each where it is given.

    Args:
        operator: whose launch it is.
        x: [M, K], any strides.
        w_gate_up: [2I, K], any strides.
        h: contiguous, or None.
        gate_up: contiguous, or None.
        function: f, a device function.
    """
    (M, K), N = x.shape, w_gate_up.shape[0] // 2
    if M == 0 or N == 0:
        return
    gate, up = (None, None) if gate_up is None else gate_up.chunk(2, dim=1)
    if describable(x, w_gate_up, h, gate, up):
        if is_hopper(x.device):
            # Imported here: Gluon is there where Triton is, and this file must not need it.
            from tilewright_kernels.gated_mlp._hopper import launch_gate_up_hopper

            launch_gate_up_hopper(operator, x, w_gate_up, h, gate_up, function)
            return
        tile = PERSISTENT_TILE
        out = [tile.BLOCK_M, tile.BLOCK_N]
        weights = w_gate_up.unflatten(0, (2, N))
        tiles = cdiv(M, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N)
        operator.launch(
            gate_up_persistent_kernel, (min(tiles, num_programs(x.device, per_sm=1)),),
            describe(x, [tile.BLOCK_M, tile.BLOCK_K]),
            describe(weights, [2, tile.BLOCK_N, tile.BLOCK_K]),
            *(describe(t, out) for t in (h, gate, up)), M, N, K,
            FUNCTION=function, **tile._asdict(),
        )  # fmt: skip
        return
    x, w_gate_up, precision = operands(operator, x, w_gate_up)
    tile = tile_for(M, N, K, x.element_size())
    options = tile._asdict()
    operator.launch(
        gate_up_pointer_kernel, (cdiv(M, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N),),
        x, w_gate_up, h, gate, up, M, N, K, *x.stride(), *w_gate_up.stride(),
        0 if h is None else h.stride(0), 0 if gate is None else gate.stride(0),
        FUNCTION=function, ACC=accumulator(x.dtype), PRECISION=precision,
        EVEN_K=K % tile.BLOCK_K == 0, NUM_STAGES=tile.num_stages, **options,
    )  # fmt: skip
