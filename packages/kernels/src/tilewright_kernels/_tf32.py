"""float32 rounded to tf32, the 10 bits of mantissa that tensor cores read of it.

They drop the other 13. That shifts every element towards zero and does not average out: a sum of
squares is off by 2⁻¹⁰ of its size, eight times the error of torch, which rounds.
"""

import torch
from torch import Tensor

from tilewright_kernels._elementwise import as_walked, load, store, tile_of_program, tiles
from tilewright_kernels._operator import Operator
from tilewright_kernels._triton import tl, triton


@triton.jit
def round_to_tf32_kernel(
    x_ptr, y_ptr, x_row_stride, num_rows, n_cols,
    FLAT: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = x with a mantissa of 10 bits, rounded to nearest; one read, one write an element.

    To add half of the last bit that stays and drop the 13 below rounds, into the exponent if need
    be. An exponent of all ones, infinity or NaN, is left alone.
    """
    rows, cols, mask, full = tile_of_program(num_rows, n_cols, FLAT, ROWS, BLOCK_N)
    bits = load(x_ptr + rows * x_row_stride + cols, mask, full).to(tl.int32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    bits = tl.where(finite, (bits + 0x1000) & ~0x1FFF, bits)
    store(y_ptr + rows * n_cols + cols, bits.to(tl.float32, bitcast=True), mask, full)


def tf32_is_allowed() -> bool:
    """What torch's switches say of float32 products: allow_tf32 and the newer fp32_precision.

    Any of them shows in fp32_precision; allow_tf32 raises once the newer ones have been used.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def rounded_to_tf32(operator: Operator, x: Tensor) -> Tensor:
    """A copy of x as tensor cores should read it, for a launch of `operator`.

    Of the last two dimensions the one that is adjacent in memory stays so.
    """
    if x.dim() > 1 and x.stride(-1) != 1 and x.stride(-2) == 1:
        return rounded_to_tf32(operator, x.mT).mT
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() > 0:
        source, target = as_walked(x, y)
        grid, tile = tiles(*source.shape)
        operator.launch(
            round_to_tf32_kernel, grid, source, target, source.stride(0), *source.shape,
            **tile._asdict(),
        )  # fmt: skip
    return y
