"""Averages in 8 bits: blocks of 256 elements, a float32 scale each, codes on a root scale.

    m = s · sign(c) (c / 127)²    c = -127 … 127        v = s · (c / 255)⁴    c = 0 … 255

with s the largest magnitude of the block, in the order of memory. What the update divides is m by
√v, so both maps give m and √v one resolution: a code is 1.6 % of the value at the top, 16 % at
1/100 of it, and values down to 6·10⁻⁵ (m) and 1.5·10⁻⁵ (√v) of the largest are told from zero.
Linear codes end at 4·10⁻³, and one large element would silence its block.

m is rounded to the nearest code: it moves by a tenth of its distance to g each step. v moves by
1 - β₂ of it, a thousandth, which rounding to nearest would undo each time: v could neither fall nor
rise. It is rounded stochastically, right in the mean. A v that is not 0 keeps a code that is not 0,
or the next update would divide by ε. (Blocks: Dettmers et al. 2022, arXiv:2110.02861.)
"""

import torch
from torch import Tensor

from tilewright_kernels.authoring import tl, triton
from tilewright_optim._layout import in_memory_order, like_in_memory

BLOCK = 256
"""Elements that share a scale; a shard of a tensor starts at a multiple of it."""

_TOP = tl.constexpr(255.0**4)


# A float of 1.5 · 2²³ plus an integer holds the integer in its lower bits. Additions of it convert
# between both, four times as fast as conversions do.
_MAGIC = tl.constexpr(12582912.0)
_MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def decode_signed(code, scale):
    """m from int8 codes and their blocks' scales."""
    root = (code.to(tl.int32) + _MAGIC_BITS).to(tl.float32, bitcast=True) - _MAGIC
    return root * tl.abs(root) * (scale * (1.0 / (127 * 127)))


@triton.jit
def decode_square(code, scale):
    """v from uint8 codes and their blocks' scales."""
    root = (code.to(tl.int32) | _MAGIC_BITS).to(tl.float32, bitcast=True) - _MAGIC
    root *= root
    return root * root * (scale * (1.0 / _TOP))


@triton.jit
def encode_signed(m):
    """(codes, scales [rows, 1]) of m [rows, BLOCK]."""
    bits = m.to(tl.float32).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    scale = _largest_float(size)
    code = tl.sqrt(size.to(tl.float32, bitcast=True) * (_inverse(scale) * (127 * 127)))
    code = (code.to(tl.int32, bitcast=True) | (bits ^ size)).to(tl.float32, bitcast=True)
    return (code + _MAGIC).to(tl.int32, bitcast=True).to(tl.int8), scale


@triton.jit
def _largest_float(bits):
    """[rows, 1] of the bits of floats of at least 0, whose order integers have too.

    A NaN is the largest then, and spoils its block, where a maximum of floats passes it over.
    """
    return tl.max(bits, axis=1)[:, None].to(tl.float32, bitcast=True)


@triton.jit
def encode_square(v, root, random):
    """(codes, scales [rows, 1]) of v [rows, BLOCK] ≥ 0, whose root is given.

    Uses the upper bits of random uint32.
    """
    v, root = v.to(tl.float32), root.to(tl.float32)
    scale = _largest_float(v.to(tl.int32, bitcast=True))
    squared = root * tl.sqrt(_inverse(scale) * _TOP)
    below = tl.minimum(tl.sqrt(squared), 255.0) - 0.5 + _MAGIC  # rounds: the code below v
    code = below.to(tl.int32, bitcast=True)
    below -= _MAGIC
    low = below * below
    low *= low
    gap = ((4 * below + 6) * below + 4) * below + 1  # (below + 1)⁴ - below⁴
    # 23 random bits as a float of 1 to 2, one more than the share of the gap that v must exceed.
    share = (random >> 9 | 0x3F800000).to(tl.float32, bitcast=True)
    code += tl.where(share * gap - gap < squared * squared - low, 1, 0)
    least = tl.where(v > 0, _MAGIC_BITS + 1, _MAGIC_BITS)
    return tl.maximum(code, least).to(tl.uint8), scale


@triton.jit
def _inverse(scale):
    # Blocks of denormals would have an infinite one; they count as zeros.
    return tl.where(scale > 1e-37, 1.0 / scale, 0.0)


def quantize_signed(m: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of m's shape and strides, and float32 scales [⌈size / 256⌉]."""
    blocks = _blocks(m)
    scale = blocks.abs().amax(1, keepdim=True)
    code = (blocks.abs() * (_inverted(scale) * 127**2)).sqrt().copysign(blocks).round()
    return _unblock(code.to(torch.int8), m), scale.flatten()


def quantize_square(v: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 codes of v's shape and strides, and float32 scales [⌈size / 256⌉].

    Args:
        v: at least 0.
        random: int64 [size] in [0, 2³²), in the order of memory.
    """
    blocks = _blocks(v)
    scale = blocks.amax(1, keepdim=True)
    squared = blocks.sqrt() * (_inverted(scale) * _TOP.value).sqrt()
    below = (squared.sqrt().clamp(max=255) - 0.5).round()
    gap = (below + 1) ** 4 - below**4
    share = _blocks(random >> 9) * 2.0**-23
    up = share * gap < squared * squared - below**4
    code = torch.where(blocks > 0, (below + up).clamp(min=1), 0)
    return _unblock(code.to(torch.uint8), v), scale.flatten()


def dequantize_signed(code: Tensor, scale: Tensor) -> Tensor:
    """float32 m of what `quantize_signed` gave."""
    root = _blocks(code)
    return _unblock(root * root.abs() * (scale * (1 / 127**2))[:, None], code)


def dequantize_square(code: Tensor, scale: Tensor) -> Tensor:
    """float32 v of what `quantize_square` gave."""
    root = _blocks(code)
    root *= root
    return _unblock(root * root * (scale * (1 / _TOP.value))[:, None], code)


def num_blocks(size: int) -> int:
    """Scales of a tensor of this many elements."""
    return (size + BLOCK - 1) // BLOCK


def _inverted(scale: Tensor) -> Tensor:
    return torch.where(scale > 1e-37, 1 / scale, 0.0)


def _blocks(x: Tensor) -> Tensor:
    """float32 [blocks, BLOCK] in the order of memory, the last filled up with zeros."""
    flat = in_memory_order(x).float()
    missing = num_blocks(flat.numel()) * BLOCK - flat.numel()
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, BLOCK)


def _unblock(blocks: Tensor, like: Tensor) -> Tensor:
    return like_in_memory(blocks.flatten()[: like.numel()], like)
