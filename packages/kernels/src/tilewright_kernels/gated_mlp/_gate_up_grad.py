"""The backward kernel: the gradient of h, and what follows from it in the epilogue.

    dh = dy · Wd          dgate = dh · up · f'(gate)          dup = dh · f(gate)

dh never reaches memory; it is rounded as if it did, which is what the Hopper kernel does to hand it
over. gate and up are read there anyway, so h = f(gate) · up, which forward did not keep, is written
beside: the gradient of Wd needs it.
"""

from typing import Any

from torch import Tensor

from tilewright_kernels._launch import cdiv, is_hopper, num_programs
from tilewright_kernels._operator import Operator, accumulator
from tilewright_kernels._product_tiles import Tile, operands
from tilewright_kernels._triton import tl, triton
from tilewright_kernels.gated_mlp._launch import describable, describe, tile_for
from tilewright_kernels.matmul.tiles import dot_pointers, store_pointers, tile_in_groups

PERSISTENT_TILE = Tile(128, 256, 64, 8, 4, 8)

PARTS = 4
"""The epilogue takes the columns of a tile in so many parts: in two, registers do not suffice."""


@triton.jit
def gate_up_grad_persistent_kernel(
    dy_desc, w_desc, gate_desc, up_desc, dgate_desc, dup_desc, h_desc, M, N, K,
    FUNCTION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """dgate, dup and h [M, N], the last where it has a descriptor; one program a multiprocessor."""
    PART_N: tl.constexpr = BLOCK_N // 4
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m, n = tile_in_groups(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row = m * BLOCK_M
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in tl.range(0, tl.cdiv(K, BLOCK_K)):
            dy = dy_desc.load([row, k * BLOCK_K])
            acc = tl.dot(dy, w_desc.load([k * BLOCK_K, n * BLOCK_N]), acc)
        left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        parts = (
            left.reshape(BLOCK_M, 2, PART_N).permute(0, 2, 1).split()
            + right.reshape(BLOCK_M, 2, PART_N).permute(0, 2, 1).split()
        )
        for part in tl.static_range(4):
            col = n * BLOCK_N + part * PART_N
            dh = parts[part].to(dgate_desc.dtype).to(tl.float32)
            gate = gate_desc.load([row, col]).to(tl.float32)
            up = up_desc.load([row, col]).to(tl.float32)
            f = FUNCTION(gate)
            dgate_desc.store([row, col], (dh * up * SLOPE(gate)).to(dgate_desc.dtype))
            dup_desc.store([row, col], (dh * f).to(dup_desc.dtype))
            if h_desc is not None:
                h_desc.store([row, col], (f * up).to(h_desc.dtype))


@triton.jit
def gate_up_grad_pointer_kernel(
    dy_ptr, w_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, h_ptr, M, N, K,
    dy_m_stride, dy_k_stride, w_k_stride, w_n_stride, gate_m_stride, dgate_m_stride, h_m_stride,
    FUNCTION: tl.constexpr, SLOPE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """The same through pointers, for any strides and sizes; h alone where dgate_ptr is None."""
    m, n = tile_in_groups(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    dh = None
    if dgate_ptr is not None:
        dh = dot_pointers(
            dy_ptr, w_ptr, m, n, M, N, K, dy_m_stride, dy_k_stride, w_k_stride, w_n_stride,
            ACC, PRECISION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES,
        ).to(dy_ptr.dtype.element_ty).to(ACC)  # fmt: skip
    rows, cols = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    offsets = rows[:, None].to(tl.int64) * gate_m_stride + cols[None, :]
    gate = tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(ACC)
    up = tl.load(up_ptr + offsets, mask=mask, other=0.0).to(ACC)
    f = FUNCTION(gate)
    if h_ptr is not None:
        store_pointers(
            f * up, h_ptr, None, m, n, M, N, h_m_stride, 1, 0, 0, False, False, BLOCK_M, BLOCK_N
        )
    if dh is not None:
        store_pointers(
            dh * up * SLOPE(gate), dgate_ptr, None, m, n, M, N, dgate_m_stride, 1, 0, 0,
            False, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        store_pointers(
            dh * f, dup_ptr, None, m, n, M, N, dgate_m_stride, 1, 0, 0, False, False,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip


def launch_gate_up_grad(
    operator: Operator, dy: Tensor, w_down: Tensor, gate_up: Tensor, dgate_up: Tensor | None,
    h: Tensor | None, function: Any, slope: Any,
) -> None:  # fmt: skip
    """Write the gradient of gate_up, and h, each where it is given.

    Args:
        operator: whose launch it is.
        dy: [M, K], any strides.
        w_down: [K, I], any strides.
        gate_up: [M, 2I], contiguous.
        dgate_up: contiguous, gate_up itself to overwrite it, or None.
        h: [M, I], contiguous, or None.
        function: f, a device function.
        slope: f', a device function.
    """
    (M, K), N = dy.shape, w_down.shape[1]
    if M == 0 or N == 0:
        return
    gate, up = gate_up.chunk(2, dim=1)
    dgate, dup = (None, None) if dgate_up is None else dgate_up.chunk(2, dim=1)
    if dgate_up is not None and describable(dy, w_down, gate, up, dgate, dup, h):
        if is_hopper(dy.device):
            # Imported here: Gluon is there where Triton is, and this file must not need it.
            from tilewright_kernels.gated_mlp._hopper import launch_gate_up_grad_hopper

            launch_gate_up_grad_hopper(operator, dy, w_down, gate_up, dgate_up, h, function, slope)
            return
        tile = PERSISTENT_TILE
        part = [tile.BLOCK_M, tile.BLOCK_N // PARTS]
        tiles = cdiv(M, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N)
        operator.launch(
            gate_up_grad_persistent_kernel, (min(tiles, num_programs(dy.device, per_sm=1)),),
            describe(dy, [tile.BLOCK_M, tile.BLOCK_K]),
            describe(w_down, [tile.BLOCK_K, tile.BLOCK_N]),
            *(describe(t, part) for t in (gate, up, dgate, dup, h)), M, N, K,
            FUNCTION=function, SLOPE=slope, **tile._asdict(),
        )  # fmt: skip
        return
    precision = "ieee"
    if dgate_up is not None:
        dy, w_down, precision = operands(operator, dy, w_down)
    tile = tile_for(M, N, K, dy.element_size())
    operator.launch(
        gate_up_grad_pointer_kernel, (cdiv(M, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N),),
        dy, w_down, gate, up, dgate, dup, h, M, N, K, *dy.stride(), *w_down.stride(),
        gate.stride(0), 0 if dgate is None else dgate.stride(0), 0 if h is None else h.stride(0),
        FUNCTION=function, SLOPE=slope, ACC=accumulator(dy.dtype), PRECISION=precision,
        EVEN_K=K % tile.BLOCK_K == 0, NUM_STAGES=tile.num_stages, **tile._asdict(),
    )  # fmt: skip
