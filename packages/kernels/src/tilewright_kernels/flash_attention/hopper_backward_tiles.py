# What Gluon's decorators and annotations say of themselves is not what they do.
# pyrefly: ignore-errors
"""What the backward's kernels for Hopper do with a tile of scores.

A softcap is in two steps, with the mask between them: the tanh, then exponential and slope. Neither
p nor its product with the slope, 32 registers each, has to be kept across the mask.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tilewright_kernels.flash_attention.masks import visible
from tilewright_kernels.flash_attention.online_softmax import tanh


@gluon.jit
def shown(
    s, lse2, inner, edge, rows, cols, len_k, shift, window, CAP: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, BY_KEYS: gl.constexpr,
):  # fmt: skip
    """exp(s - lse), 0 where a query does not see a key; with a softcap c the scores over c.

    Args:
        s: products, queries by keys or (BY_KEYS) keys by queries.
        lse2: shaped as s or broadcast; +inf where a query sees nothing.
        inner: of `score_scales`.
        edge: whether some query does not see some key.
        rows: the first query of s, or the first key.
        cols: the first of the others.
        len_k: keys of the sequence.
        shift: of the sequence.
        window: (left, right).
        CAP: of `cap_of`.
        HAS_LEFT: whether left is a limit.
        HAS_RIGHT: likewise.
        BY_KEYS: see s.
    """
    # A capped score of -2⁶³ has the probability 0 and a finite slope.
    HIDDEN: gl.constexpr = -(2.0**63) if CAP != "" else 0.0
    left, right = window
    t = tanh(s * inner, CAP) if CAP != "" else gl.exp2(s * inner - lse2)
    if edge:
        row = (rows + gl.arange(0, s.shape[0], gl.SliceLayout(1, s.type.layout)))[:, None]
        col = (cols + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout)))[None, :]
        if BY_KEYS:
            seen = visible(col, row, len_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
        else:
            seen = visible(row, col, len_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
        t = gl.where(seen, t, HIDDEN)
    return t


@gluon.jit
def weights(t, lse2, outer, CAP: gl.constexpr):
    """p, and p times the slope of the softcap, from what `shown` returned."""
    if CAP != "":
        p = gl.exp2(t * outer - lse2)
        ds = p * (1.0 - t * t)
    else:
        p, ds = t, t
    return p, ds
