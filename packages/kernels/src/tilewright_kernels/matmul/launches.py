"""How a product is launched: which rung, which tiles, and batches of any strides.

`launch_matmul` is what the operators call that need a product: `matmul` itself, `linear`, the fused
ones. It writes into memory that it is given and computes nothing else.
"""

from functools import lru_cache
from itertools import repeat
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tilewright_kernels import _math
from tilewright_kernels._launch import cdiv, next_power_of_2, num_programs
from tilewright_kernels._operator import Operator, accumulator
from tilewright_kernels._tf32 import rounded_to_tf32, tf32_is_allowed
from tilewright_kernels._triton import HAS_TRITON
from tilewright_kernels.matmul.descriptors import describable, describe, varies
from tilewright_kernels.matmul.grouped import matmul_grouped_kernel
from tilewright_kernels.matmul.naive import matmul_naive_kernel
from tilewright_kernels.matmul.persistent import matmul_persistent_kernel
from tilewright_kernels.matmul.pipelined import matmul_pipelined_kernel
from tilewright_kernels.matmul.stream_k import (
    matmul_stream_k_kernel,
    matmul_stream_k_sum_kernel,
)

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

Algorithm = Literal["naive", "grouped", "pipelined", "persistent", "stream_k"]
Activation = Literal["relu", "gelu", "silu", "relu_squared"]
Precision = Literal["tf32", "ieee"]

ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_FUNCTIONS: dict[str | None, Any] = {None: None} | {
    name + suffix: getattr(_math, name + suffix) for name in ACTIVATIONS for suffix in ("", "_grad")
}
"""Device functions by name; backward takes the derivatives."""


class Tile(NamedTuple):
    """A tile of the result, the step along K, and how the program is built."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    num_stages: int
    num_warps: int
    PARTS: int = 1


# Bytes of an element -> tile. The last two rungs on an H200, bfloat16, over the products of six
# layers: 256 x 128 takes about 8 % longer, 128 x 128 with 4 warps and two programs a multiprocessor
# 6 %, steps of 128 in two stages 40 %; a fourth stage or whole tiles instead of halves a few per
# cent; groups of 4 or 16 rows nothing, no groups 10 % at N = 22016, where the cache cannot hold B.
# Pipelined: 128 x 128 is 8 % faster where both operands are adjacent along K, else 16 % slower.
TILES: dict[str, dict[int, Tile]] = {
    "naive": {
        2: Tile(128, 128, 64, 1, 1, 8),
        4: Tile(128, 128, 32, 1, 1, 8),
        8: Tile(32, 32, 16, 1, 1, 4),
    },
    "grouped": {
        2: Tile(128, 128, 64, 8, 1, 8),
        4: Tile(128, 128, 32, 8, 1, 8),
        8: Tile(32, 32, 16, 8, 1, 4),
    },
    "pipelined": {
        2: Tile(128, 256, 64, 8, 3, 8),
        4: Tile(128, 128, 32, 8, 3, 8),
        8: Tile(32, 32, 16, 8, 2, 4),
    },
    "persistent": {
        2: Tile(128, 256, 64, 8, 3, 8, 2),
        4: Tile(128, 128, 32, 8, 3, 8, 1),
    },
    "stream_k": {
        2: Tile(128, 256, 64, 8, 3, 8, 2),
        4: Tile(128, 128, 32, 8, 3, 8, 1),
    },
}

STREAM_K_STEPS = 64
"""Steps along K that sharing the last tiles must save to be worth its traffic and second launch.

On an H200, bfloat16, it takes 0.78, 0.87 and 0.95 of the fourth rung's time where it saves 116, 140
and 147 steps (of 256, 512 and 2816), and 1.02 and 1.08 where it saves 39 and 31.
"""

LEAST_STEPS = 8
"""Steps along K that a part of a tile must have to be worth being written and read again."""

SUM_ROWS = 16
"""Rows of a tile that one program of the second kernel of stream-K adds up."""


SHARED_MEMORY = 227 * 1024 - 1024
"""Bytes for the buffers of one program on Hopper; the last KiB is for barriers and the like."""

MOST_MATRICES = 65535
"""Programs along the second axis of a launch, as CUDA limits them."""


@lru_cache(maxsize=4096)
def tile_for(algorithm: str, M: int, N: int, K: int, element_size: int) -> Tile:
    """The rung's tile, made smaller where the matrices are."""
    tile = TILES[algorithm][element_size]
    block_m, block_n, block_k = (
        min(block, max(16, next_power_of_2(size)))
        for block, size in zip(tile[:3], (M, N, K), strict=True)
    )
    parts = tile.PARTS if block_n >= 128 else 1
    num_warps = tile.num_warps if block_m * block_n >= 128 * 128 else min(4, tile.num_warps)
    return tile._replace(
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, PARTS=parts, num_warps=num_warps
    )


def stages_for(tile: Tile, element_size: int, ends: int) -> int:
    """Steps along K that find room in shared memory beside the tiles of the epilogue.

    All that the table was measured with fits. A float32 residual under 16-bit operands does not.

    Args:
        tile: with the number of stages that it is to have at most.
        element_size: bytes of an element of A and B.
        ends: bytes of an element of out and of the residual together.
    """
    step = (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K * element_size
    room = SHARED_MEMORY - tile.BLOCK_M * tile.BLOCK_N // tile.PARTS * ends
    return max(1, min(tile.num_stages, room // step))


def launch_matmul(
    operator: Operator,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    factor: Tensor | None = None,
    scale: float = 1.0,
    accumulate: bool = False,
    algorithm: str | None = None,
    precision: str | None = None,
) -> None:
    """out = activation(scale · A·B + bias) + residual, or · factor; added to out if accumulate.

    Args:
        operator: whose launch it is.
        a: [*, M, K] of any strides, expanded ones too; read in place, but for tf32, for which both
            operands are rounded first.
        b: [*, K, N] of a's dtype.
        out: [*, M, N] of any dtype and strides.
        bias: [N] or None.
        activation: a name of ACTIVATIONS, one with _grad after it for its derivative, or None.
        residual: [*, M, N], added at the end, or None.
        factor: [*, M, N], multiplied at the end, or None; not together with a residual.
        scale: multiplies the product, in the accumulator's type.
        accumulate: add to what out holds, as for a gradient.
        algorithm: a name of ALGORITHMS, or None for the best that takes these operands.
        precision: of float32 operands; None follows torch's switches (`tf32_is_allowed`).
    """
    assert residual is None or factor is None
    if out.numel() == 0:
        return
    if a.dtype == torch.float64 and scale != 1.0:
        a, scale = a * scale, 1.0  # a kernel's floating-point arguments are float32
    precision = _precision(a.dtype, precision)
    if precision == "tf32":
        a, b = rounded_to_tf32(operator, a), rounded_to_tf32(operator, b)
    other = factor if residual is None else residual
    batch = out.shape[:-2]
    a, b = a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:])
    if other is not None:
        other = other.expand_as(out)
    constants = {
        "ACTIVATION": _FUNCTIONS[activation],
        "MULTIPLY": factor is not None,
        "ACCUMULATE": accumulate,
        "ACC": accumulator(a.dtype),
        "PRECISION": precision,
    }
    epilogue = (None if bias is None else bias.contiguous(), None if scale == 1.0 else scale)
    _launch_batches(operator, [a, b, out, other], epilogue, constants, algorithm)


def _launch_batches(
    operator: Operator,
    tensors: list[Tensor | None],
    epilogue: tuple[Tensor | None, float | None],
    constants: dict[str, Any],
    algorithm: str | None,
) -> None:
    """Bring the batch to [outer, inner], with a launch for each matrix of what is left over."""
    tensors = _merge_batch(tensors)
    out = tensors[2]
    assert out is not None
    if out.dim() > 4:
        for i in range(out.shape[0]):
            one = [None if t is None else t[i] for t in tensors]
            _launch_batches(operator, one, epilogue, constants, algorithm)
        return
    while out.dim() < 4:
        tensors = [None if t is None else t[None] for t in tensors]
        out = tensors[2]
        assert out is not None
    a, b, out, other = tensors
    assert a is not None
    assert b is not None
    assert out is not None
    usable = describable(*tensors)
    if constants["ACCUMULATE"] and out.dtype != torch.float32:
        usable = False  # the memory would round what is added before it adds
    if algorithm in (None, "persistent", "stream_k"):
        if usable:
            _launch_descriptors(operator, a, b, out, other, epilogue, constants, algorithm)
            return
        algorithm = "pipelined"
    _launch_pointers(operator, a, b, out, other, epilogue, constants, algorithm)


def _merge_batch(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Drop dimensions of one matrix; make two neighbours one where every tensor allows it.

    Last, a batch of A with one B for all is one taller matrix, where A and out allow it.
    """
    given = [t for t in tensors if t is not None]
    for dim in range(given[0].dim() - 3, -1, -1):
        if given[0].shape[dim] == 1:
            tensors = [None if t is None else t.squeeze(dim) for t in tensors]
            given = [t for t in tensors if t is not None]
        elif dim + 1 < given[0].dim() - 2 and all(_mergeable(t, dim) for t in given):
            tensors = [None if t is None else t.flatten(dim, dim + 1) for t in tensors]
            given = [t for t in tensors if t is not None]
    a, b, out, other = tensors
    assert a is not None
    assert b is not None
    assert out is not None
    if out.dim() == 3 and b.stride(0) == 0:
        rows = [t for t in (a, out, other) if t is not None]
        if all(_mergeable(t, 0) for t in rows):
            a, out = a.flatten(0, 1), out.flatten(0, 1)
            return [a, b[0], out, None if other is None else other.flatten(0, 1)]
    return tensors


def _mergeable(x: Tensor, dim: int) -> bool:
    """Whether x.flatten(dim, dim + 1) is a view."""
    return x.shape[dim + 1] == 1 or x.stride(dim) == x.shape[dim + 1] * x.stride(dim + 1)


def _launch_pointers(
    operator: Operator, a: Tensor, b: Tensor, out: Tensor, other: Tensor | None,
    epilogue: tuple[Tensor | None, float | None], constants: dict[str, Any], algorithm: str,
) -> None:  # fmt: skip
    """Launch one of the first three rungs over [outer, inner, …] operands."""
    outer, inner, M, N = out.shape
    if outer * inner > MOST_MATRICES:
        dim, most = (0, max(1, MOST_MATRICES // inner)) if outer > 1 else (1, MOST_MATRICES)
        others = repeat(None) if other is None else other.split(most, dim)
        parts = zip(*(t.split(most, dim) for t in (a, b, out)), others, strict=False)
        for a, b, out, other in parts:
            _launch_pointers(operator, a, b, out, other, epilogue, constants, algorithm)
        return
    K = a.shape[-1]
    tile = tile_for(algorithm, M, N, K, a.element_size())
    kernel, options = {
        "naive": (matmul_naive_kernel, {}),
        "grouped": (matmul_grouped_kernel, {"GROUP_M": tile.GROUP_M}),
        "pipelined": (
            matmul_pipelined_kernel, {"GROUP_M": tile.GROUP_M, "NUM_STAGES": tile.num_stages}
        ),
    }[algorithm]  # fmt: skip
    operator.launch(
        kernel, (cdiv(M, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N), outer * inner),
        a, b, out, other, *epilogue, M, N, K, inner, *a.stride(), *b.stride(), *out.stride(),
        *((0, 0, 0, 0) if other is None else other.stride()),
        **constants, **options, EVEN_K=K % tile.BLOCK_K == 0,
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _launch_descriptors(
    operator: Operator, a: Tensor, b: Tensor, out: Tensor, other: Tensor | None,
    epilogue: tuple[Tensor | None, float | None], constants: dict[str, Any], algorithm: str | None,
) -> None:  # fmt: skip
    """Launch the fourth or fifth rung over operands that `describable` has seen."""
    outer, inner, M, N = out.shape
    K = a.shape[-1]
    tile = tile_for(algorithm or "persistent", M, N, K, a.element_size())
    ends = out.element_size() + (0 if other is None else other.element_size())
    tile = tile._replace(num_stages=stages_for(tile, a.element_size(), ends))
    tiles = cdiv(M, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N) * outer * inner
    steps = cdiv(K, tile.BLOCK_K)
    programs = num_programs(a.device, per_sm=1)
    if algorithm is None:
        algorithm = rung_for(tiles, steps, programs)
    batched = outer * inner > 1
    part = [tile.BLOCK_M, tile.BLOCK_N // tile.PARTS]
    a_desc, a_transposed = describe(a, [tile.BLOCK_M, tile.BLOCK_K], batched)
    b_desc, b_transposed = describe(b, [tile.BLOCK_K, tile.BLOCK_N], batched)
    out_desc, _ = describe(out, part, batched)
    other_desc = None if other is None else describe(other, part, batched)[0]
    descriptors = a_desc, b_desc, out_desc, other_desc
    sizes = M, N, K, outer * inner, inner
    options = constants | tile._asdict() | varies("A", a) | varies("B", b)
    options |= varies("OTHER", out if other is None else other)
    options |= {"A_TRANSPOSED": a_transposed, "B_TRANSPOSED": b_transposed, "BATCHED": batched}
    shared = tiles % programs
    if algorithm == "persistent" or shared == 0:
        grid = (min(tiles, programs),)
        operator.launch(
            matmul_persistent_kernel, grid, *descriptors, *epilogue, *sizes, **options
        )  # fmt: skip
        return
    stretch = stretch_for(shared, steps, programs)
    slots = cdiv(steps, stretch) * shared + programs
    parts = out.new_empty((slots * tile.BLOCK_M, tile.BLOCK_N), dtype=torch.float32)
    operator.launch(
        matmul_stream_k_kernel, (programs,), *descriptors,
        TensorDescriptor.from_tensor(parts, part), *epilogue, *sizes, tiles // programs, stretch,
        **options,
    )  # fmt: skip
    rows = min(SUM_ROWS, tile.BLOCK_M)
    names = "ACTIVATION", "MULTIPLY", "ACCUMULATE", "ACC", "BLOCK_M", "BLOCK_N", "BLOCK_K"
    operator.launch(
        matmul_stream_k_sum_kernel, (shared, tile.BLOCK_M // rows),
        parts, out, other, *epilogue, M, N, K, inner, tiles - shared, shared, stretch,
        *out.stride(), *((0, 0, 0, 0) if other is None else other.stride()),
        BATCHED=batched, **{name: options[name] for name in names}, GROUP_M=tile.GROUP_M,
        ROWS=rows, num_warps=4,
    )  # fmt: skip


def stretch_for(shared: int, steps: int, programs: int) -> int:
    """Steps that each program takes of the tiles after the last whole wave, evenly or nearly so.

    A last band of a few steps would be many parts of little work each, so the bands before it are
    made a little higher instead.
    """
    stretch = max(1, cdiv(shared * steps, programs))
    bands = steps // stretch
    return cdiv(steps, bands) if 0 < steps - bands * stretch < LEAST_STEPS else stretch


def rung_for(tiles: int, steps: int, programs: int) -> Algorithm:
    """The fourth rung, or the fifth where that shortens the last wave by enough.

    Args:
        tiles: of the result.
        steps: along K.
        programs: that run at one time.
    """
    idle = -tiles % programs / programs
    return "stream_k" if idle * steps > STREAM_K_STEPS else "persistent"


def _precision(dtype: torch.dtype, asked: str | None) -> str:
    """How tl.dot multiplies: it matters for float32 alone."""
    if dtype != torch.float32:
        return "ieee"
    if asked is not None:
        return asked
    return "tf32" if tf32_is_allowed() else "ieee"
