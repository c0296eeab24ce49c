"""Softmax of a row that comes in pieces, as the kernels of the forward and of decoding take it.

A row's state is m, the largest score so far, l = Σ exp(s - m) and acc = Σ exp(s - m) · v. Where a
piece brings a larger maximum, l and acc are first multiplied by exp(m - m_new) (Milakov &
Gimelshein 2018, arXiv:1805.02867).

Exponentials are powers of two, which the hardware has: m counts in base 2. The factor log2(e), and
with it the scale of q·k, is multiplied in where the maximum is subtracted, in one instruction.
"""

import torch
from torch import Tensor

from tilewright_kernels._math import tanh as exact_tanh
from tilewright_kernels._triton import tl, triton

_LOG2_E = 1.4426950408889634


def score_factors(scale: float, softcap: float) -> tuple[float | None, float]:
    """(before, factor) for the kernels: `scores` · factor are the scores in base 2.

    factor is positive, so that the largest score stays the largest.

    Args:
        scale: of q·k.
        softcap: c of c · tanh(s / c), 0 for none.
    """
    if softcap > 0:
        return scale / softcap, softcap * _LOG2_E
    if scale > 0:
        return None, scale * _LOG2_E
    return scale * _LOG2_E, 1.0


def cap_of(softcap: float, x: Tensor) -> str:
    """How kernels take the tanh of a softcap, their CAP: "" without one, "exact", or "approximate".

    Args:
        softcap: c of c · tanh(s / c), 0 for none.
        x: one of q, k and v. 16 bits have room for no more than the approximation gives.
    """
    if softcap <= 0:
        return ""
    nvidia = x.is_cuda and torch.version.hip is None
    return "approximate" if nvidia and x.element_size() == 2 else "exact"


@triton.jit
def tanh(x, CAP: tl.constexpr):
    """Hyperbolic tangent of what a softcap caps; CAP is "exact" or "approximate".

    Approximate is the one instruction that the hardware has, with a relative error of 2⁻¹¹.
    """
    if CAP == "approximate":
        t = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        t = exact_tanh(x)
    return t


@triton.jit
def scores(products, before, CAP: tl.constexpr):
    """Scores, less factor, from q·k."""
    s = products
    if before is not None:
        s = products * before
    if CAP != "":
        s = tanh(s, CAP)
    return s


@triton.jit
def take_piece(s, m, l, factor, MASKED: tl.constexpr):
    """One piece of each row: its exp(s - m_new), and the row's new state.

    Args:
        s: [rows, keys] from `scores`, -inf where a key is hidden.
        m: [rows], -inf before the first visible key.
        l: [rows].
        factor: from `score_factors`.
        MASKED: whether s may be -inf; without it a row may not be wholly hidden.

    Returns:
        p, m_new, l_new, and alpha, which acc is to be multiplied by.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * factor)
    base = m_new
    if MASKED:  # -inf - -inf is NaN
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * factor - base[:, None])
    alpha = tl.exp2(m - base)
    return p, m_new, l * alpha + tl.sum(p, 1), alpha


@triton.jit
def as_operand(p, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Probabilities, or their gradients, as the next product takes them.

    Tensor cores drop the 13 bits that tf32 lacks. p is never negative, so all of them would shrink,
    and out with them: half of the last bit that stays is added before. Not to infinity and NaN,
    whose bits it would carry over into those of zero.
    """
    if PRECISION == "tf32":
        bits = p.to(tl.int32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        p = tl.where(finite, (bits + 0x1000) & ~0x1FFF, bits).to(tl.float32, bitcast=True)
    return p.to(dtype)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, PIECE: tl.constexpr):
    """acc + a · b, PIECE numbers of the sum at a time, or all where it is 0.

    Without tensor cores the compiler gives a thread its rows of a and columns of b in registers,
    and multiplies a pair of them to the end before the next pair: for 4 x 4 results of 128 numbers
    each they are 1024 registers.
    """
    if PIECE > 0 and a.shape[1] > PIECE:
        HALF: tl.constexpr = a.shape[1] // 2
        a0, a1 = a.reshape(a.shape[0], 2, HALF).permute(0, 2, 1).split()
        b0, b1 = b.T.reshape(b.shape[1], 2, HALF).permute(0, 2, 1).split()
        acc = product(a0, b0.T, acc, PRECISION, PIECE)
        acc = product(a1, b1.T, acc, PRECISION, PIECE)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def finish_rows(m, l, acc):
    """acc / l and the log-sum-exp in base e; 0 and -inf for a row that saw nothing."""
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    lse = tl.where(empty, float("-inf"), m * 0.6931471805599453 + tl.log(l))
    return acc / l[:, None], lse
