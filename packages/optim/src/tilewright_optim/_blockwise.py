"""Averages in 8 bits: blocks of 256 elements, a float32 scale each, codes on a root scale.

    m = s · sign(c) (c / 127)²    c = -127 … 127        v = s · (c / 255)⁴    c = 0 … 255

with s the largest magnitude of the block, in the order of memory. What the update divides is m by
√v, so both maps give m and √v one resolution: a code is 1.6 % of the value at the top, 10 % at
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

_TOP = 255.0**4


@triton.jit
def decode_signed(code, scale):
    """m from int8 codes and their blocks' scales."""
    root = code.to(tl.float32) * (1.0 / 127)
    return root * tl.abs(root) * scale


@triton.jit
def decode_square(code, scale):
    """v from uint8 codes and their blocks' scales."""
    root = code.to(tl.float32) * (1.0 / 255)
    root *= root
    return root * root * scale


@triton.jit
def encode_signed(m):
    """(codes, scales [rows, 1]) of m [rows, BLOCK]."""
    size = tl.where(m != m, float("inf"), tl.abs(m))  # max passes NaN over: inf spoils the block
    scale = tl.max(size, axis=1)[:, None]
    code = tl.floor(127 * tl.sqrt_rn(size * _inverse(scale)) + 0.5)
    return tl.where(m < 0, -code, code).to(tl.int8), scale


@triton.jit
def encode_square(v, random):
    """(codes, scales [rows, 1]) of v [rows, BLOCK] ≥ 0; uses the upper 16 bits of random uint32."""
    scale = tl.max(tl.where(v != v, float("inf"), v), axis=1)[:, None]
    t = v * _inverse(scale)
    below = tl.minimum(tl.floor(255 * tl.sqrt_rn(tl.sqrt_rn(t))), 254)
    low, high = below * below, (below + 1) * (below + 1)
    low, high = low * low, high * high
    share = (random >> 16).to(tl.float32) * (1.0 / 65536)
    up = share * (high - low) < t * (255.0 * 255.0 * 255.0 * 255.0) - low
    code = tl.where(up, below + 1, below)
    return tl.where(v > 0, tl.maximum(code, 1), 0).to(tl.uint8), scale


@triton.jit
def _inverse(scale):
    # Blocks of denormals would have an infinite one; they count as zeros.
    return tl.where(scale > 1e-37, 1.0 / scale, 0.0)


def quantize_signed(m: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of m's shape and strides, and float32 scales [⌈size / 256⌉]."""
    blocks = _blocks(m)
    scale = _largest(blocks.abs())
    code = (127 * (blocks.abs() * _inverted(scale)).sqrt() + 0.5).floor()
    return _unblock(code.copysign(blocks).to(torch.int8), m), scale.flatten()


def quantize_square(v: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 codes of v's shape and strides, and float32 scales [⌈size / 256⌉].

    Args:
        v: at least 0.
        random: int64 [size] in [0, 2³²), in the order of memory.
    """
    blocks = _blocks(v)
    scale = _largest(blocks)
    t = blocks * _inverted(scale)
    below = (255 * t.sqrt().sqrt()).floor().clamp(max=254)
    low, high = below**2, (below + 1) ** 2
    low, high = low * low, high * high
    share = _blocks(random >> 16) * (1.0 / 65536)
    up = share * (high - low) < t * _TOP - low
    code = torch.where(blocks > 0, (below + up).clamp(min=1), 0)
    return _unblock(code.to(torch.uint8), v), scale.flatten()


def dequantize_signed(code: Tensor, scale: Tensor) -> Tensor:
    """float32 m of what `quantize_signed` gave."""
    root = _blocks(code) * (1.0 / 127)
    return _unblock(root * root.abs() * scale[:, None], code)


def dequantize_square(code: Tensor, scale: Tensor) -> Tensor:
    """float32 v of what `quantize_square` gave."""
    root = _blocks(code) * (1.0 / 255)
    root *= root
    return _unblock(root * root * scale[:, None], code)


def num_blocks(size: int) -> int:
    """Scales of a tensor of this many elements."""
    return (size + BLOCK - 1) // BLOCK


def _largest(blocks: Tensor) -> Tensor:
    """[blocks, 1]; infinite where one is NaN."""
    return blocks.nan_to_num(nan=torch.inf, posinf=torch.inf).amax(1, keepdim=True)


def _inverted(scale: Tensor) -> Tensor:
    return torch.where(scale > 1e-37, 1 / scale, 0.0)


def _blocks(x: Tensor) -> Tensor:
    """float32 [blocks, BLOCK] in the order of memory, the last filled up with zeros."""
    flat = in_memory_order(x).float()
    missing = num_blocks(flat.numel()) * BLOCK - flat.numel()
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, BLOCK)


def _unblock(blocks: Tensor, like: Tensor) -> Tensor:
    return like_in_memory(blocks.flatten()[: like.numel()], like)
