"""X₀ of Newton–Schulz in Triton: matrices divided by their norms, in float16, in one launch."""

from torch import Tensor

from tilewright_kernels.authoring import Operator, cdiv, tl, triton
from tilewright_optim._newton_schulz_products import SCALE

CHUNK = 4096
"""Elements of a program, 32 a thread."""

OPERATOR = Operator("newton_schulz")


@triton.jit
def _normalize_kernel(
    u_ptr, x_ptr, squares_ptr, size,
    # pyrefly: ignore[not-a-type]
    eps: tl.float64, scale: tl.float64,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """X from u, which lies in the same memory."""
    chunks = tl.cdiv(size, CHUNK)
    matrix = (tl.program_id(0) // chunks).to(tl.int64)
    at = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    mask = at < size
    norm = tl.sqrt(tl.load(squares_ptr + matrix))
    # A comparison keeps NaN, which maximum may drop.
    eps = tl.full((), eps, tl.float32)
    factor = tl.full((), scale, tl.float32) / tl.where(norm < eps, eps, norm)
    u = tl.load(u_ptr + matrix * size + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + matrix * size + at, (u * factor).to(tl.float16), mask=mask)


def normalize(u: Tensor, x: Tensor, squares: Tensor, eps: float) -> None:
    """x = SCALE · u / max(√squares, eps), for each matrix.

    Args:
        u: [B, n, m], contiguous.
        x: [B, n, m] in float16, contiguous; may lie in the memory of a u of two bytes an element.
        squares: [B] float32, sums of the squares of u.
        eps: least norm to divide by.
    """
    size = u.shape[1] * u.shape[2]
    OPERATOR.launch(
        _normalize_kernel, (u.shape[0] * cdiv(size, CHUNK),), u, x, squares, size, eps, SCALE,
        CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip
