"""The matrix products of Newton–Schulz iterations, for a batch [B, n, m] of wide matrices, n ≤ m.

**Standard form**, a step:  A = X·Xᵀ    Z = b A + c A²    X ← a X + Z·X

**Gram form**: Xₖ = Qₖ·X₀ with Qₖ a polynomial of R₀ = X₀·Xᵀ₀, so that the steps can work on n x n
matrices alone (Gram Newton–Schulz, Dao-AILab 2026). All of them are symmetric and commute:

    R = X·Xᵀ, Q = 1;  each step  Z = b R + c R²    Q ← a Q + Q·Z    P = a R + R·Z    R ← a P + P·Z
    at the end  X ← Q·X

Rounding makes eigenvalues of R that should be tiny wrong by about 2⁻¹¹, of either sign, and each
step multiplies them by a²; so after `SEGMENT` steps the form starts again from X = Q·X. In float16
the error then is that of the standard form within a few per cent, for spectra from flat to
exponential; with bfloat16, or five steps in one segment, it would be ten times that.

A, A², R², Q·Z, P and R are symmetric: half the tiles (`symmetric_matmul`, `commuting_matmul`). With
full products counted as n²m or n³, five steps take 5 (n²m / 2 + n³ / 2 + n²m), or in Gram form
n²m + 2 n²m + 14 n³ / 2: less from m / n of about 1.4 on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tilewright_kernels import commuting_matmul, symmetric_matmul
from tilewright_optim._coefficients import Triple

SCALE = 16.0
"""Factor by which every X but the last is larger than in the formulas: of a Frobenius norm of 1,
products would be of the size 1 / (n √m), subnormal in float16. R is 256 times larger, Z, Q and P
are not."""

_SQUARE = SCALE**2

SEGMENT = 3
"""Steps of the Gram form between X and X. Two, then three, for polar_express on a square Gaussian
matrix of 256: error 0.05, against 0.005 here and 0.013 of torch's bfloat16."""

FEW_ROWS = 512
"""Below this n, torch's products are faster: 64 x 256 x 1024 0.72 of their speed on an H200."""

FEW_BLOCKS = 264
"""128 x 128 blocks of the result under which they are too, two for each of 132 multiprocessors,
unless n is large: 8 x 768 x 768 has 168, and 0.89 of their speed; 4 x 1536 x 1536 312, and 1.12."""


def iterate(x: Tensor, steps: Sequence[Triple], form: str = "auto") -> Tensor:
    """Newton–Schulz steps on matrices that are normalized.

    Args:
        x: [B, n, m] with n ≤ m, contiguous, of Frobenius norm `SCALE` each.
        steps: coefficients.
        form: "standard", "gram" or "auto".

    Returns:
        [B, n, m], without that factor.
    """
    if not steps:
        return x / SCALE
    gram = form == "gram" or (form == "auto" and gram_is_less(x.shape[-2], x.shape[-1], len(steps)))
    return _gram(x, steps) if gram else _standard(x, steps)


def gram_is_less(n: int, m: int, steps: int) -> bool:
    """Whether the Gram form takes less time, by products of n x n x n.

    A symmetric product of n²m takes 0.6 of a full one on an H200; one of n³ 0.75, since it moves
    more for its work.
    """
    full, ratio = [min(SEGMENT, steps - i) for i in range(0, steps, SEGMENT)], m / n
    products = sum(max(1, 4 * k - 3) for k in full)
    gram = len(full) * 1.6 * ratio + 0.75 * products
    return gram < steps * (1.6 * ratio + 0.75)


def _standard(x: Tensor, steps: Sequence[Triple]) -> Tensor:
    for k, (a, b, c) in enumerate(steps):
        z = _polynomial(_gram_matrix(x), b, c)
        scale = 1 / SCALE if k + 1 == len(steps) else 1.0
        x = torch.baddbmm(x, z, x, beta=a * scale, alpha=scale)
    return x


def _gram(x: Tensor, steps: Sequence[Triple]) -> Tensor:
    for first in range(0, len(steps), SEGMENT):
        q = _gram_factor(_gram_matrix(x), steps[first : first + SEGMENT])
        scale = 1 / SCALE if first + SEGMENT >= len(steps) else 1.0
        x = torch.baddbmm(x, q, x, beta=0, alpha=scale)
    return x


def _gram_factor(r: Tensor, steps: Sequence[Triple]) -> Tensor:
    """Q of some steps from R."""
    q = None
    for k, (a, b, c) in enumerate(steps):
        z = _polynomial(r, b, c)
        if k + 1 < len(steps):
            p = _commuting(r, z, 1 / _SQUARE, a / _SQUARE, r)
            r = _commuting(p, z, _SQUARE, a * _SQUARE, p)
        if q is None:
            q = z
            q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            q = _commuting(q, z, 1.0, a, q)
    assert q is not None
    return q


def _few(batch: int, n: int) -> bool:
    """Whether torch's full products are faster than half ones."""
    side = -(-n // 128)
    return n < FEW_ROWS or (n < 1024 and batch * side * (side + 1) // 2 < FEW_BLOCKS)


def _gram_matrix(x: Tensor) -> Tensor:
    return torch.bmm(x, x.mT) if _few(*x.shape[:2]) else symmetric_matmul(x)


def _polynomial(r: Tensor, b: float, c: float) -> Tensor:
    """b R + c R², of the R in the formulas."""
    beta, alpha = b / _SQUARE, c / _SQUARE**2
    if _few(*r.shape[:2]):
        return torch.baddbmm(r, r, r, beta=beta, alpha=alpha)
    return symmetric_matmul(r, alpha=alpha, beta=beta, c=r)


def _commuting(a: Tensor, b: Tensor, alpha: float, beta: float, c: Tensor) -> Tensor:
    """alpha · A·B + beta · C, all of them symmetric."""
    if _few(*a.shape[:2]):
        return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)
    return commuting_matmul(a, b, alpha=alpha, beta=beta, c=c)
