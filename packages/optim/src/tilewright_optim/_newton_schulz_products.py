"""The matrix products of Newton–Schulz iterations, for a batch [B, n, m] of wide matrices, n ≤ m.

**Standard form**, a step:  A = X·Xᵀ    W = a + b A + c A²    X ← W·X

**Gram form**: Xₖ = Qₖ·X₀ with Qₖ a polynomial of R₀ = X₀·Xᵀ₀, so that the steps can work on n x n
matrices alone (Gram Newton–Schulz, Dao-AILab 2026). All of them are symmetric and commute:

    R = X·Xᵀ, Q = 1;  each step  W = a + b R + c R²    Q ← Q·W    P = R·W    R ← P·W
    at the end  X ← Q·X

Rounding makes eigenvalues of R that should be tiny wrong by about 2⁻¹¹, of either sign, and each
step multiplies them by a²; so after `SEGMENT` steps the form starts again from X = Q·X. In float16
the error then is one to two times that of the standard form, for spectra from flat to exponential,
and a quarter to a tenth of torch.optim.Muon's, which is bfloat16's.

A, A², R², Q·W, P and R are symmetric: half the tiles (`symmetric_matmul`, `commuting_matmul`). With
full products counted as n²m or n³, five steps take 5 (n²m / 2 + n³ / 2 + n²m), or in Gram form
n²m + 2 n²m + 14 n³ / 2: less from m / n of about 1.4 on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tilewright_kernels import commuting_matmul, matmul, symmetric_matmul
from tilewright_optim._coefficients import Triple

SCALE = 16.0
"""Factor by which every X but the last is larger than in the formulas: of a Frobenius norm of 1,
products would be of the size 1 / (n √m), subnormal in float16. R is 256 times larger, W, Q and P
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


def iterate(
    x: Tensor, steps: Sequence[Triple], form: str = "auto", dtype: torch.dtype = torch.float16
) -> Tensor:
    """Newton–Schulz steps on matrices that are normalized.

    Args:
        x: [B, n, m] in float16 with n ≤ m, contiguous, of Frobenius norm `SCALE` each.
        steps: coefficients.
        form: "standard", "gram" or "auto".
        dtype: of the result.

    Returns:
        [B, n, m], without that factor.
    """
    if not steps:
        return (x / SCALE).to(dtype)
    gram = form == "gram" or (form == "auto" and gram_is_less(x.shape[-2], x.shape[-1], len(steps)))
    length = SEGMENT if gram else 1
    *segments, last = [steps[i : i + length] for i in range(0, len(steps), length)]
    for segment in segments:
        x = torch.bmm(_factor(_gram_matrix(x), segment), x)
    q = _factor(_gram_matrix(x), last)
    if dtype == torch.float16:
        return torch.baddbmm(x, q, x, beta=0, alpha=1 / SCALE)
    return matmul(q, x, scale=1 / SCALE, out_dtype=dtype)


def gram_is_less(n: int, m: int, steps: int) -> bool:
    """Whether the Gram form takes less time, by products of n x n x n.

    A symmetric product of n²m takes 0.6 of a full one on an H200; one of n³ 0.75, since it moves
    more for its work.
    """
    segments, ratio = [min(SEGMENT, steps - i) for i in range(0, steps, SEGMENT)], m / n
    gram = len(segments) * 1.6 * ratio + 0.75 * sum(4 * k - 3 for k in segments)
    return gram < steps * (1.6 * ratio + 0.75)


def _factor(r: Tensor, steps: Sequence[Triple]) -> Tensor:
    """Q of some steps from R; of one step, W."""
    q = None
    for k, (a, b, c) in enumerate(steps):
        w = _polynomial(r, a, b, c)
        q = w if q is None else _commuting(q, w)
        if k + 1 < len(steps):
            r = _commuting(_commuting(r, w, 1 / _SQUARE), w, _SQUARE)
    assert q is not None
    return q


def _gram_matrix(x: Tensor) -> Tensor:
    return torch.bmm(x, x.mT) if _few(*x.shape[:2]) else symmetric_matmul(x)


def _polynomial(r: Tensor, a: float, b: float, c: float) -> Tensor:
    """a + b R + c R², of the R in the formulas."""
    beta, alpha = b / _SQUARE, c / _SQUARE**2
    if r.shape[-1] < FEW_ROWS:
        w = torch.baddbmm(r, r, r, beta=beta, alpha=alpha)
    else:
        w = symmetric_matmul(r, alpha=alpha, beta=beta, c=r)
    w.diagonal(dim1=-2, dim2=-1).add_(a)
    return w


def _commuting(a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """alpha · A·B, all of them symmetric."""
    if not _few(*a.shape[:2]):
        return commuting_matmul(a, b, alpha=alpha)
    return torch.bmm(a, b) if alpha == 1.0 else torch.baddbmm(a, a, b, beta=0, alpha=alpha)


def _few(batch: int, n: int) -> bool:
    """Whether torch's full products are faster than half ones."""
    side = -(-n // 128)
    return n < FEW_ROWS or (n < 1024 and batch * side * (side + 1) // 2 < FEW_BLOCKS)
