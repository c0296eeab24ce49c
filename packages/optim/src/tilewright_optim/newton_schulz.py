"""Newton–Schulz iteration: the nearest matrix with orthonormal rows, by matrix products alone.

    X₀ = X / max(‖X‖, ε)                     ‖·‖ Frobenius, so that no singular value is above 1
    Xₖ₊₁ = a Xₖ + (b A + c A²) Xₖ            A = Xₖ·Xₖᵀ

With X = U·diag(σ)·Vᵀ every step maps each σ to a σ + b σ³ + c σ⁵ and leaves U and V alone, so that
Xₖ tends to about U·Vᵀ (Jordan et al. 2024; Bernstein & Newhouse 2024, arXiv:2409.20325). A tall X
is iterated as Xᵀ, whose A is smaller.

On a CUDA device all matrices of a batch are iterated at once in float16, whose mantissa has three
bits more than bfloat16's; X₀ ≤ 1 leaves nothing to overflow. The products and the choice between
two forms of the iteration are in `_newton_schulz_products`. Elsewhere it runs as written, in
float32 (float64 for float64).
"""

from typing import Literal

import torch
from torch import Tensor

from tilewright_optim._coefficients import QUINTIC, Coefficients, Triple, triples
from tilewright_optim._newton_schulz_products import iterate
from tilewright_optim._normalize_kernel import OPERATOR, normalize

Form = Literal["auto", "standard", "gram"]
FORMS: tuple[Form, ...] = ("auto", "standard", "gram")


def newton_schulz_reference(
    x: Tensor,
    *,
    steps: int = 5,
    coefficients: Coefficients = QUINTIC,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The definition in plain torch.

    Args:
        x: [*, M, N], real.
        steps: how many.
        coefficients: as in `newton_schulz`.
        eps: least norm to divide by.
        dtype: of the arithmetic; None is float64 for float64, else float32.

    Returns:
        [*, M, N] in the dtype of the arithmetic.
    """
    dtype = dtype or _wide(x)
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).to(dtype)
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for a, b, c in triples(coefficients, steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return y.mT if tall else y


def polynomial(value: float, coefficients: Coefficients = QUINTIC, steps: int = 5) -> float:
    """What the steps make of one singular value, in exact arithmetic."""
    for a, b, c in triples(coefficients, steps):
        value = a * value + b * value**3 + c * value**5
    return value


def newton_schulz(
    x: Tensor,
    *,
    steps: int = 5,
    coefficients: Coefficients = QUINTIC,
    eps: float = 1e-7,
    form: Form = "auto",
) -> Tensor:
    """Orthogonalize matrices: singular values to about 1, singular vectors kept.

    Args:
        x: [*, M, N] in float16, bfloat16, float32 or float64, any strides; not changed.
        steps: of the iteration; 0 normalizes only.
        coefficients: "quintic", "polar_express", (a, b, c), or a triple for each step, of which
            the last is repeated.
        eps: least Frobenius norm to divide by; a matrix of zeros stays one.
        form: "standard" as written above, "gram" on the small side (`_newton_schulz_products`),
            "auto" whichever has less to do. It matters on CUDA devices only.

    Returns:
        [*, M, N] of x's dtype, contiguous or of a contiguous transpose. Not differentiable.

    Raises:
        ValueError: less than two dimensions, steps or coefficients that make no sense.
        TypeError: x is not floating point.
    """
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [*, M, N], as in x[None]")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; give a floating-point tensor, as in x.float()")
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; choose from {', '.join(FORMS)}")
    steps_triples = triples(coefficients, steps)
    with torch.no_grad():
        if x.numel() == 0:
            return x.clone()
        if not OPERATOR.uses_triton(x):
            y = newton_schulz_reference(x, steps=steps, coefficients=coefficients, eps=eps)
            return y.to(x.dtype)
        return _on_device(x, steps_triples, eps, form)


def _on_device(x: Tensor, steps: tuple[Triple, ...], eps: float, form: Form) -> Tensor:
    tall = x.shape[-2] > x.shape[-1]
    matrix = x.mT if tall else x
    y = matrix.reshape(-1, *matrix.shape[-2:]).contiguous()
    half = torch.empty_like(y, dtype=torch.float16)
    norms = torch.linalg.vector_norm(y, dim=(-2, -1), dtype=_wide(y)).float()
    normalize(y, half, norms.square(), eps)
    y = iterate(half, steps, form, x.dtype).view(matrix.shape)
    return y.mT if tall else y


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
