"""How float32 results become bfloat16 parameters without losing small updates, in Triton and torch.

Exact masters keep the float32 value x in two halves: the bfloat16 parameter `high`, which is x
rounded to nearest with ties away from zero, and a signed 16-bit `low`, the rest:

    high = (bits(x) + 0x8000) >> 16     low = bits(x) - (high << 16)     bits(x) = high · 2¹⁶ + low

so training is float32 training at 2 more bytes a parameter instead of 4. Stochastic rounding
(Gupta et al. 2015, arXiv:1502.02551) keeps nothing: x goes up or down with probabilities that make
the result right in the mean. Its random bits are a hash of element, tensor and step, so that a
resumed run repeats them. The torch forms give the bits of the Triton forms.
"""

import torch
from torch import Tensor

from tilewright_kernels.authoring import tl, triton

_WORD = 0xFFFFFFFF
_NAN = 0x7FC00000
"""A NaN whose upper half is one too; the GPU's own, 0x7FFFFFFF, would round to -0."""

# The multipliers of a 32-bit mixer with little bias (Wellons' hash prospector).
_MIX1, _MIX2 = tl.constexpr(0x7FEB352D), tl.constexpr(0x846CA68B)
_GOLDEN = tl.constexpr(0x9E3779B9)
_NAN_BITS = tl.constexpr(_NAN)


@triton.jit
def join_halves(high, low):
    """float32 from the int16 bits of its bfloat16 half and the signed rest."""
    return ((high.to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def split_halves(x):
    """(high, low) as int16 of float32 x."""
    bits = tl.where(x != x, _NAN_BITS, x.to(tl.int32, bitcast=True))
    high = (bits + 0x8000) >> 16
    return high.to(tl.int16), (bits - (high << 16)).to(tl.int16)


@triton.jit
def stochastic_half(x, random):
    """int16 bits of x rounded to bfloat16, up with the probability of its lower 16 bits.

    `random` is uint32, its upper 16 bits are used.
    """
    bits = x.to(tl.int32, bitcast=True).to(tl.uint32, bitcast=True)
    bits = tl.where(x != x, _NAN_BITS, bits + (random >> 16))
    return (bits >> 16).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= _MIX1
    x ^= x >> 15
    x *= _MIX2
    return x ^ (x >> 16)


@triton.jit
def random_keys(seed, step):
    """Two uint32 [1] of a tensor's number and its step."""
    # Of shape [1], because numpy, the interpreter's, warns where numbers overflow and not arrays.
    first = tl.full((1,), 0, tl.uint32) + seed.to(tl.uint32)
    first = _mix(_mix(first + _GOLDEN) ^ step.to(tl.uint32))
    return first, _mix(first ^ _GOLDEN)


@triton.jit
def random_words(index, first, second):
    """uint32 of each element's index under the two keys; its upper bits are the better ones."""
    x = (index.to(tl.uint32) ^ first) * _MIX1
    return (x ^ (x >> 15)) * _MIX2 + second


def split_master(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 and the int16 half of float32 x."""
    bits = torch.where(x.isnan(), _NAN, x.view(torch.int32))
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_master(high: Tensor, low: Tensor) -> Tensor:
    """float32 from the halves that `split_master` gave."""
    bits = (high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
    return bits.view(torch.float32)


def stochastic_round(x: Tensor, random: Tensor) -> Tensor:
    """float32 x in bfloat16, up with the probability of its lower 16 bits.

    Args:
        x: any shape.
        random: int64 in [0, 2³²), of the same shape.
    """
    bits = x.view(torch.int32).to(torch.int64) & _WORD
    bits = torch.where(x.isnan(), _NAN, bits + (random >> 16))
    half = (bits >> 16) & 0xFFFF
    return torch.where(half < 0x8000, half, half - 0x10000).to(torch.int16).view(torch.bfloat16)


def random_bits(size: int, seed: int, step: Tensor) -> Tensor:
    """int64 [size] in [0, 2³²): the kernels' random words of a tensor of this many elements.

    Args:
        size: elements, in the order of memory.
        seed: the tensor's number.
        step: 0-d, on the device where the words are wanted.
    """
    step = step.to(torch.int64) & _WORD
    first = _mixed(_mixed((step * 0 + seed + _GOLDEN.value) & _WORD) ^ step)
    second = _mixed(first ^ _GOLDEN.value)
    x = (((torch.arange(size, device=step.device) & _WORD) ^ first) * _MIX1.value) & _WORD
    return ((x ^ (x >> 15)) * _MIX2.value + second) & _WORD


def _mixed(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * _MIX1.value) & _WORD
    x = ((x ^ (x >> 15)) * _MIX2.value) & _WORD
    return x ^ (x >> 16)
